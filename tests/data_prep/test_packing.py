import numpy as np
import pytest

from data_prep.packing import BestFitRows, Cutting, add_document


def packed(lengths, row_length, special=2, ends=(), **options):
    """Rows of (document, begin, end), in the order in which they are finished."""
    cutting = Cutting(row_length, special)
    rows = BestFitRows(row_length, smallest=special + 1, **options)
    finished = []
    for document, length in enumerate(lengths):

        def piece(begin, end, document=document):
            return document, begin, end

        finished += add_document(rows, cutting, piece, length, ends)
    return finished + list(rows.finish())


@pytest.mark.parametrize("row_length", [8, 16, 128, 513])
@pytest.mark.parametrize("mean", [3, 40, 900])
@pytest.mark.parametrize("max_open", [1, 512])
def test_every_token_is_in_one_row_and_whole_documents_stay_whole(row_length, mean, max_open):
    generator = np.random.default_rng(row_length + mean)
    lengths = (1 + generator.exponential(mean, 400)).astype(int).tolist()
    ends = sorted(set(generator.integers(1, max(lengths), 60).tolist()))
    rows = packed(lengths, row_length, ends=ends, max_open=max_open)
    assert all(sum(end - begin + 2 for _, begin, end in row) <= row_length for row in rows)
    pieces = sorted(piece for row in rows for piece in row)
    for document, length in enumerate(lengths):
        own = [(begin, end) for number, begin, end in pieces if number == document]
        assert [begin for begin, _ in own] == [0, *(end for _, end in own[:-1])] and own[-1][1] == length
        assert len(own) == 1 or length > row_length - 2
        # One more piece than needed for the head that fills a gap, and one for what cuts at sentences leave over.
        assert len(own) <= length // (row_length - 2 - row_length // 64) + 3
        shortest = max(min(16, row_length // 16), 1)
        assert len(own) == 1 or min(end - begin for begin, end in own) >= shortest


def test_the_fullest_row_that_has_room_is_taken():
    rows = BestFitRows(20, smallest=3)
    for name, size in (("a", 10), ("b", 14), ("c", 12)):
        assert rows.add(name, size) == []
    assert rows.smallest_gap(6) == 6 and rows.smallest_gap(7) == 8 and rows.smallest_gap(11) == 0
    assert rows.add("d", 6) == [["b", "d"]]
    assert rows.add("e", 7) == [["c", "e"]]  # a gap of one is too small for anything
    assert list(rows.finish()) == [["a"]]


def test_with_too_many_open_the_fullest_leaves():
    rows = BestFitRows(20, max_open=2)
    assert rows.add("a", 15) == [] and rows.add("b", 12) == []
    assert rows.add("c", 11) == [["a"]]
    assert list(rows.finish()) == [["b"], ["c"]]


def test_one_document_a_row():
    rows = BestFitRows(20, smallest=20)
    assert [rows.add(name, 5) for name in "abc"] == [[["a"]], [["b"]], [["c"]]]


def test_what_does_not_fit_is_refused():
    for size in (0, 21):
        with pytest.raises(ValueError, match="does not fit"):
            BestFitRows(20).add("a", size)


def test_cuts_are_at_sentences_where_one_is_near():
    cutting = Cutting(row_length=640, special_tokens=2)  # near: within 10 tokens
    assert cutting.cut(2000, 0, 640, [100, 630, 635]) == 635
    assert cutting.cut(2000, 0, 640, [100, 628, 700]) == 628
    assert cutting.cut(2000, 0, 640, [100, 627, 700]) == 638  # too far away
    assert cutting.cut(2000, 635, 640, []) == 635 + 638
    assert cutting.cut(700, 100, 640, [650]) == 700  # the rest fits
    assert cutting.cut(645, 0, 640, []) == 322  # the rest would be too short
    assert cutting.cut(2000, 0, 66, [62]) == 62  # a gap in a row that is open


@pytest.mark.parametrize("row_length", [128, 512, 2048])
@pytest.mark.parametrize("median", [100, 330, 3000])
def test_rows_are_full(row_length, median):
    """Documents of any usual length, sentences of 25 tokens: more than 99 % of the positions hold tokens."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(np.log(median), 1, 4_000_000 // median)).astype(int) + 1
    ends = np.cumsum(generator.geometric(1 / 25, lengths.max() // 20)).tolist()
    rows = packed(lengths.tolist(), row_length, ends=ends)
    filled = sum(end - begin + 2 for row in rows for _, begin, end in row)
    assert filled / len(rows) / row_length > 0.99
