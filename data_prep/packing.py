"""Greedy best-fit packing of whole documents into rows: which piece of which document goes into which row.

Best fit puts a piece into the open row whose gap it fills best (D. S. Johnson, "Near-optimal bin packing
algorithms", 1973). What does not fit a row at all is cut; since it must be cut somewhere, its head is cut to
fill the gap that is hardest to fill otherwise. Only sizes matter here, so any kind of piece can be packed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Piece = TypeVar("Piece")

MAX_OPEN_ROWS = 512
_SHORTEST_PIECE = 16  # tokens; in short rows less, because fewer gaps could be filled
_SENTENCE_WINDOW = 64  # a cut moves back to a sentence's end within 1/64 of a row: this costs < 0.5 % of it


class BestFitRows(Generic[Piece]):
    """Rows of one capacity that are being filled; at most `max_open` at a time.

    A row leaves when nothing can be added to it any more, or, with too many open, when it is the fullest.
    The same pieces in the same order give the same rows.

    Args:
        capacity: what the sizes in one row may add up to.
        smallest: no piece is smaller than this; a row with a smaller gap is finished.
    """

    def __init__(self, capacity: int, *, smallest: int = 1, max_open: int = MAX_OPEN_ROWS) -> None:
        self.capacity = capacity
        self._smallest = smallest
        self._max_open = max_open
        self._rows: list[deque[list[Piece]]] = [deque() for _ in range(capacity + 1)]  # by gap, oldest first
        self._gaps = 0  # bit g is set where a row with a gap of g is open
        self._open = 0

    def add(self, piece: Piece, size: int) -> list[list[Piece]]:
        """Place a piece; return the rows that are finished now, each the list of its pieces in order."""
        if not 0 < size <= self.capacity:
            raise ValueError(f"a piece of {size} does not fit a row of {self.capacity}")
        gap = self.smallest_gap(size)
        row = self._take(gap) if gap else []
        row.append(piece)
        left = (gap or self.capacity) - size
        if left < self._smallest:
            return [row]
        self._rows[left].append(row)
        self._gaps |= 1 << left
        self._open += 1
        return [self._take(self.smallest_gap(1))] if self._open > self._max_open else []

    def smallest_gap(self, size: int) -> int:
        """Return the smallest gap of an open row that is at least `size`, or 0 if there is none."""
        gaps = self._gaps >> size
        return size + (gaps & -gaps).bit_length() - 1 if gaps else 0

    def finish(self) -> Iterator[list[Piece]]:
        """Yield the rows still open, the fullest first."""
        while self._gaps:
            yield self._take(self.smallest_gap(1))

    def _take(self, gap: int) -> list[Piece]:
        rows = self._rows[gap]
        row = rows.popleft()
        if not rows:
            self._gaps &= ~(1 << gap)
        self._open -= 1
        return row


@dataclass(frozen=True)
class Cutting:
    """How documents become pieces, each of which takes `special_tokens` more in its row.

    Args:
        row_length: tokens of a row.
        special_tokens: those a piece gets of its own, e.g. 2 for [CLS] and [SEP].
    """

    row_length: int
    special_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest piece, without its special ones."""
        return self.row_length - self.special_tokens

    @property
    def shortest(self) -> int:
        """Tokens of the shortest piece that a cut may leave."""
        return max(min(_SHORTEST_PIECE, self.row_length // 16), 1)

    def cut(self, length: int, start: int, room: int, sentence_ends: Sequence[int]) -> int:
        """Return the end of the piece of a document that begins at `start`, for a gap of `room` tokens.

        It is the last sentence's end there is within 1/64 of a row before the gap is full, else the token that
        fills it. Where less than the shortest piece would remain of the document, it is cut in the middle.

        Args:
            length: tokens of the document.
            sentence_ends: positions right after a sentence, in rising order.
        """
        room -= self.special_tokens
        if length - start <= room:
            return length
        end = start + room
        if length - end < self.shortest:
            end = min(end, (start + length) // 2)
        earliest = max(end - self.row_length // _SENTENCE_WINDOW, start + self.shortest)
        nearest = bisect_right(sentence_ends, end) - 1
        return sentence_ends[nearest] if nearest >= 0 and sentence_ends[nearest] >= earliest else end


def add_document(
    rows: BestFitRows[Piece], cutting: Cutting, piece: Callable[[int, int], Piece], length: int, ends: Sequence[int]
) -> list[list[Piece]]:
    """Place a document in as few pieces as it takes; return the rows that are finished now.

    A document that fits a row stays whole. The head of a longer one fills the smallest gap that is worth it;
    then come pieces of a whole row and, last, the remainder.

    Args:
        piece: makes the piece of the document from one token to another.
        length: tokens of the document, without special ones.
        ends: as `Cutting.cut` takes them; used for documents longer than a row only.
    """
    finished: list[list[Piece]] = []
    start = 0
    room = rows.capacity
    if length > cutting.longest:
        room = rows.smallest_gap(cutting.shortest + cutting.special_tokens) or room
    while start < length:
        end = cutting.cut(length, start, room, ends)
        finished += rows.add(piece(start, end), end - start + cutting.special_tokens)
        start, room = end, rows.capacity
    return finished
