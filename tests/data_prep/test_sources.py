import gzip
import json
import lzma
import random
from itertools import pairwise

import pytest

from anymixer.errors import UserError
from data_prep.sources import Meter, TextFormat, input_files, limited, read_file

TEXT = "First line.\nSecond line.\n\n\n  \nOther document é.\n"


def test_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert list(read_file(path, TextFormat())) == ["First line.\nSecond line.", "Other document é."]
    assert list(read_file(path, TextFormat("line"))) == [
        "First line.",
        "Second line.",
        "Other document é.",
    ]
    assert list(read_file(path, TextFormat("file"))) == [TEXT.strip()]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_files(tmp_path, suffix):
    zstandard = pytest.importorskip("zstandard")
    pytest.importorskip("pyarrow")
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    text, records = tmp_path / f"a.txt{suffix}", tmp_path / f"b.jsonl{suffix}"
    text.write_bytes(compress(TEXT.encode()))
    records.write_bytes(compress(b'{"text": "one"}\n\n{"text": "two"}\n'))
    assert input_files([text, records]) == [text, records]
    assert [document for path in (text, records) for document in read_file(path, TextFormat())] == [
        "First line.\nSecond line.",
        "Other document é.",
        "one",
        "two",
    ]
    text.write_bytes(compress(TEXT.encode())[:-6])
    with pytest.raises(UserError, match="cannot be read"):
        list(read_file(text, TextFormat()))
    text.write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_file(text, TextFormat()))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, " two "]}), path)
    assert list(read_file(path, TextFormat(column="body"))) == ["one", "two"]
    with pytest.raises(UserError, match=r"no column 'text' \(it has: body\); see --text_column"):
        list(read_file(path, TextFormat()))
    parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match=r"column 'text' holds int64, not text; see --text_column"):
        list(read_file(path, TextFormat()))
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="Parquet"):
        list(read_file(path, TextFormat()))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        (json.dumps({"body": "x"}), r"line 2 has no field 'text' \(it has: body\)"),
        ('{"text": 3}', "line 2: 'text' is a number, not text"),
        ('{"text": false}', "line 2: 'text' is true or false, not text"),
        ("[1]", "line 2 is a list, not an object with a field 'text'"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(read_file(path, TextFormat()))


def test_null_is_an_empty_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "one"}\n{"text": ""}\n')
    assert list(read_file(path, TextFormat())) == ["one"]


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_file(path, TextFormat()))


def test_inputs_are_checked_first(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        input_files([tmp_path / "absent.txt"])
    (tmp_path / "a.pdf.gz").write_text("")
    with pytest.raises(UserError, match=r"unknown kind of file; known: \.txt"):
        input_files([tmp_path / "a.pdf.gz"])


def test_an_input_given_twice_is_refused(tmp_path):
    folder, file = tmp_path / "in", tmp_path / "in" / "a.txt"
    folder.mkdir()
    file.touch()
    for given in ([file, file], [folder, file], [file, folder / "." / "a.txt"]):
        with pytest.raises(UserError, match=r"^--input: .*a\.txt is given twice$"):
            input_files(given)
    (tmp_path / "b.txt").symlink_to(file)
    with pytest.raises(UserError, match=r"b\.txt is given twice \(as .*in/a\.txt too\)$"):
        input_files([folder, tmp_path / "b.txt"])


def test_limits():
    documents = ["aaaa", "bbbb", "cccc"]
    assert list(limited(documents, max_docs=2, max_bytes=None)) == documents[:2]
    assert list(limited(documents, max_docs=None, max_bytes=5)) == documents[:2]
    assert list(limited(iter(documents), max_docs=None, max_bytes=None)) == documents


def test_a_folder_stands_for_its_files(tmp_path):
    with pytest.raises(UserError, match="no file of a known kind"):
        input_files([tmp_path])
    for name in ("b.txt", "a.json.gz", "part/c.parquet", "readme.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert input_files([tmp_path]) == [tmp_path / name for name in ("a.json.gz", "b.txt", "part/c.parquet")]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("separator", ["blank", "line"])
def test_ranges_of_a_file_give_every_document_once(tmp_path, name, separator):
    generator = random.Random(name + separator)
    for _ in range(60):
        documents = ["é" * generator.randrange(1, 9) + f"\n{number}" for number in range(generator.randrange(1, 12))]
        if name == "a.jsonl":
            data = "".join(json.dumps({"text": text}) + "\n" * generator.randrange(1, 3) for text in documents)
        else:
            data = "\n" * generator.randrange(3) + "".join(
                text + "\n" * generator.randrange(1, 4) for text in documents
            )
        path = tmp_path / name
        path.write_bytes(data.encode()[: -1 if generator.random() < 0.5 else None])
        form = TextFormat(separator)
        whole = list(read_file(path, form))
        size = path.stat().st_size
        borders = sorted({0, size, *(generator.randrange(size) for _ in range(generator.randrange(6)))})
        spans = list(pairwise(borders))
        assert [document for begin, end in spans for document in read_file(path, form, begin=begin, end=end)] == whole


def test_the_meter_tells_how_far_reading_has_come(tmp_path):
    meter = Meter()
    assert meter.position() == 0
    for name, opener in (("a.txt", open), ("a.txt.gz", gzip.open), ("a.txt.xz", lzma.open)):
        with opener(tmp_path / name, "wt") as file:
            file.write("\n\n".join(str(random.random()) for _ in range(30_000)))
        documents = read_file(tmp_path / name, TextFormat(), meter=meter)
        next(documents)
        size = (tmp_path / name).stat().st_size
        assert 0 < meter.position() < size
        list(documents)
        assert meter.position() == size


def test_windows_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert list(read_file(path, TextFormat())) == ["one\ntwo", "three"]
