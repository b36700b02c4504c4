from pathlib import Path

import numpy as np
import pytest

from data_prep.shards import PackedShards
from data_prep.sources import TextFormat
from data_prep.tokenizing import Vocabulary, batches, token_dtype, vocabulary_of
from data_prep.units import FileSource
from data_prep.writer import RowFormat


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("length", [1, 255, 256, 65_535, 65_536])
def test_packed_samples_are_streamings_own_bytes(tmp_path, dtype, length):
    from streaming import MDSWriter

    ids = np.arange(length).astype(dtype)
    lengths = np.array([length - 1, 1], np.uint32)
    ours = PackedShards(tmp_path / "ours", np.dtype(dtype), np.dtype(np.uint32), None)
    columns = {"tokens": f"ndarray:{np.dtype(dtype).name}", "lengths": "ndarray:uint32"}
    theirs = MDSWriter(out=str(tmp_path / "theirs"), columns=columns, hashes=["xxh64"])
    ours.write({"tokens": ids.tobytes(), "lengths": lengths.tobytes()})
    theirs.write({"tokens": ids, "lengths": lengths})
    for writer in (ours, theirs):
        writer.finish()
    for name in ("index.json", "shard.00000.mds"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_large_vocabularies_take_four_bytes(tmp_path, read_samples, number_tokenizer):
    backend = Path(number_tokenizer).read_text()
    vocabulary = Vocabulary(backend, 70_000, (0, 1, 2, 3, 4), bos=(2,), eos=(3,))
    for mode in ("concatenated", "packed"):
        writer = RowFormat(mode, 8, "zstd").writer(tmp_path / mode, vocabulary)
        writer.write(["a", "b"], [np.array([69_999] * 4, np.uint32), np.array([7, 8], np.uint32)])
        writer.finish()
        assert writer.token_counts[69_999] == 4 and writer.token_counts[2] == 0


def test_what_fills_no_row_is_counted(tmp_path, number_tokenizer):
    vocabulary = Vocabulary(Path(number_tokenizer).read_text(), 30_000, (0, 1, 2, 3, 4), bos=(2,), eos=(3,))
    writer = RowFormat("concatenated", 8).writer(tmp_path / "out", vocabulary)
    writer.write(["a"], [np.arange(5, 15, dtype=np.uint16)])
    writer.finish()
    assert (writer.counts.rows, writer.counts.dropped_tokens, writer.counts.document_tokens) == (1, 5, 10)


def test_markers(number_tokenizer):
    from anymixer.data import load_tokenizer

    tokenizer = load_tokenizer(number_tokenizer)
    assert (vocabulary_of(tokenizer, None, None).bos, vocabulary_of(tokenizer, None, None).eos) == ((2,), (3,))
    given = vocabulary_of(tokenizer, "", "x7 x8")
    assert (given.bos, given.eos, given.size) == ((), (7, 8), 30_000)


def test_batches_hold_every_document_once():
    documents = [str(number) * 3000 for number in range(3000)]
    grouped = list(batches(documents))
    assert [text for group in grouped for text in group] == documents and len(grouped) > 3


def test_stored_types():
    assert token_dtype(65_536) is np.uint16 and token_dtype(65_537) is np.uint32


def test_fingerprints_are_of_the_bytes_read(tmp_path):
    import xxhash

    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789" * 300_000)
    data = path.read_bytes()
    form = TextFormat()
    assert FileSource((path,), form).fingerprint() == xxhash.xxh64(data).hexdigest()
    part = FileSource((path,), form, 1_500_000, 2_999_999)
    assert part.fingerprint() == xxhash.xxh64(data[1_500_000:2_999_999]).hexdigest()
    assert part.describe() == [{"name": "a.txt", "bytes": 3_000_000, "range": [1_500_000, 2_999_999]}]
