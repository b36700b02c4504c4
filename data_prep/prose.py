"""Plain English paragraphs out of docstrings, reference pages and licences.

Documentation is prose mixed with code, tables, parameter lists and markup. `paragraphs` keeps the prose;
`Deduplicator` drops what was said before, so that a text met in a hundred packages (a licence, an inherited
docstring) is learned once and cannot be in both the training and the held-out split.
"""

from __future__ import annotations

import inspect
import re

_HEADING = re.compile(r"^[^\n]*\n[ \t]*([-=~^*#])\1{2,}[ \t]*$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n[ \t]*\n")
# A line that begins an item of a list or of a parameter section: "- x", "* x", "2. x", ":param x: y",
# "x : int", "x (int, optional): y".
_ITEM = re.compile(
    r"(?P<mark>[-*•+]\s+|\(?(?:\d{1,2}|[a-z])[.)]\s+|:\w+(?:\s[\w*]+){0,2}:\s*|"
    r"[*\w][\w., *]{0,40} : |\*{0,2}\w+ \([^)]{0,60}\):\s+)"
)
_COMMENT_MARK = re.compile(r"^\s*(?:#+|//+|/?\*+/?|;+|%+)(?=\s|$)", re.MULTILINE)
_TYPOGRAPHY = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "..."}
    | {"\u2013": "-", "\u2014": "-", "\u2022": "*", "\u00a0": " "}
)
_MARKUP = (
    (re.compile(r"\.\. (?:note|warning|tip|important|seealso|versionadded|versionchanged)::\s*\S*"), ""),
    (re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)(?:\s*<[^>]*>)?`"), r"\1"),  # :func:`~a.b` -> a.b
    (re.compile(r"`+([^`]*?)(?:\s*<[^>]*>)?`+_{0,2}"), r"\1"),  # ``x``, `text <link>`_
    (re.compile(r"(?<![\w*])(\*{1,2})(?=\S)([^*]+?)(?<=\S)\1(?![\w*])"), r"\2"),  # *x*, **x**
    (re.compile(r"\s*\[\d+\]_?"), ""),  # footnote references
    (re.compile(r"\\(?=[*_`|])"), ""),
    (re.compile(r"\s*--\s*|\s+-\s+"), " - "),
)
# What code, tables, formulas and diagrams have and prose does not.
_NOT_PROSE = re.compile(
    r">>>|::=|[=+~^]{3,}|-{4,}|_{3,}|\|.*\||[{}\\<>]|\w=\w|\w\(\w*[,=]|\$|\.\. |::|https?:.*https?:"
)
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def paragraphs(text: str, *, min_words: int = 8) -> list[str]:
    """Return the prose paragraphs of `text`, each on one line, without markup.

    `text` is a docstring, a reStructuredText page or a licence. Code, doctests, tables, signatures and
    headings are left out; items of a list become paragraphs of their own.
    """
    text = text.replace("\r\n", "\n").replace("\f", "\n\n").translate(_TYPOGRAPHY)
    text = inspect.cleandoc(_COMMENT_MARK.sub("", text))
    text = _HEADING.sub("\n", text)
    found = []
    for block in _BLANK_LINES.split(text):
        if ">>>" in block or "\n..." in block:
            continue
        for piece in _pieces(block.split("\n")):
            plain = _plain(piece)
            if is_prose(plain, min_words=min_words):
                found.append(plain)
    return found


def is_prose(paragraph: str, *, min_words: int = 8) -> bool:
    """Say whether one line of text reads as whole English sentences."""
    words = _WORD.findall(paragraph)
    if len(words) < min_words or _NOT_PROSE.search(paragraph):
        return False
    if (not paragraph[0].isalpha() and paragraph[0] not in "\"'(") or paragraph[-1] not in ".!?:;)\"'":
        return False
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    short = sum(len(word) < 16 for word in words)
    return letters >= 0.88 * len(paragraph) and paragraph.isascii() and short >= 0.95 * len(words)


def _pieces(lines: list[str]) -> list[str]:
    """Split a block at list items and at parameter headings; join wrapped lines."""
    pieces: list[list[str]] = [[]]
    for line in lines:
        stripped = line.strip()
        item = _ITEM.match(stripped)
        if item:
            rest = "" if item["mark"].endswith(" : ") else stripped[item.end() :]
            pieces.append([rest])
        else:
            pieces[-1].append(stripped)
    return [" ".join(piece) for piece in pieces]


def _plain(paragraph: str) -> str:
    """Remove markup and repeated spaces."""
    for pattern, replacement in _MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    return " ".join(paragraph.split())


class Deduplicator:
    """Remembers word sequences and drops paragraphs that mostly repeat them.

    Two licences that differ in a name, or a docstring copied with one word changed, share most of their
    runs of `run` words: an exact comparison would keep both.
    """

    def __init__(self, run: int = 5, repeated: float = 0.3) -> None:
        self.run = run
        self.repeated = repeated
        self._seen: set[int] = set()

    def fresh(self, paragraphs: list[str]) -> list[str]:
        """Return the paragraphs of which at most the `repeated` share was seen before; remember them."""
        return [paragraph for paragraph in paragraphs if self._is_fresh(paragraph)]

    def _is_fresh(self, paragraph: str) -> bool:
        words = _WORD.findall(paragraph.lower())
        last = max(len(words) - self.run, 0)
        runs = {hash(tuple(words[start : start + self.run])) for start in range(last + 1)}
        if len(runs & self._seen) > self.repeated * len(runs):
            return False
        self._seen |= runs
        return True
