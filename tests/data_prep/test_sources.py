import gzip
import json
import lzma
from pathlib import Path

import pytest

from anymixer.errors import UserError
from data_prep.sources import check_inputs, limited, read_documents

TEXT = "First line.\nSecond line.\n\n\n  \nOther document é.\n"


def test_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert list(read_documents([path])) == ["First line.\nSecond line.", "Other document é."]
    assert list(read_documents([path], separator="line")) == [
        "First line.",
        "Second line.",
        "Other document é.",
    ]
    assert list(read_documents([path], separator="file")) == [TEXT.strip()]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_files(tmp_path, suffix):
    zstandard = pytest.importorskip("zstandard")
    pytest.importorskip("pyarrow")
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    text, records = tmp_path / f"a.txt{suffix}", tmp_path / f"b.jsonl{suffix}"
    text.write_bytes(compress(TEXT.encode()))
    records.write_bytes(compress(b'{"text": "one"}\n\n{"text": "two"}\n'))
    check_inputs([text, records])
    assert list(read_documents([text, records])) == [
        "First line.\nSecond line.",
        "Other document é.",
        "one",
        "two",
    ]
    text.write_bytes(compress(TEXT.encode())[:-6])
    with pytest.raises(UserError, match="cannot be read"):
        list(read_documents([text]))
    text.write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_documents([text]))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, " two "]}), path)
    assert list(read_documents([path], column="body")) == ["one", "two"]
    with pytest.raises(UserError, match=r"no column 'text' \(it has: body\); see --text_column"):
        list(read_documents([path]))
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="Parquet"):
        list(read_documents([path]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        (json.dumps({"body": "x"}), r"line 2 has no text field 'text' \(it has: body\)"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(read_documents([path]))


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_documents([path]))


def test_inputs_are_checked_first(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        check_inputs([tmp_path / "absent.txt"])
    (tmp_path / "a.pdf.gz").write_text("")
    with pytest.raises(UserError, match=r"unknown kind of file; known: \.txt"):
        check_inputs([tmp_path / "a.pdf.gz"])


def test_limits():
    documents = ["aaaa", "bbbb", "cccc"]
    assert list(limited(documents, max_docs=2, max_bytes=None)) == documents[:2]
    assert list(limited(documents, max_docs=None, max_bytes=5)) == documents[:2]
    assert list(limited(iter(documents), max_docs=None, max_bytes=None)) == documents


def test_inputs_are_read_lazily(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    documents = read_documents([path, Path("absent.txt")])
    assert next(documents) == "one"
