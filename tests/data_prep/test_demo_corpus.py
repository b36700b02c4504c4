import sysconfig
from pathlib import Path

import pytest

from data_prep import demo_corpus


def test_docstrings_in_file_order(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        '"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n'
        'if 1:\n    def g():\n        """Four."""\n'
    )
    assert demo_corpus.docstrings(source) == ["One.", "Two.", "Three.", "Four."]
    source.write_text('"""unfinished')
    assert demo_corpus.docstrings(source) == []


def test_reference_pages():
    pages = list(demo_corpus.reference_pages(Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"))
    assert len(pages) > 50 and any("with statement" in page.lower() for page in pages)
    assert list(demo_corpus.reference_pages(Path("absent.py"))) == []


@pytest.fixture
def small_corpus(monkeypatch):
    """Only the reference pages and the licences."""
    monkeypatch.setattr(demo_corpus, "_modules", lambda stdlib: iter(()))


def test_documents_are_clean_english_without_repeats(small_corpus):
    documents = list(demo_corpus.demo_documents())
    lines = [line for document in documents for line in document.split("\n")]
    text = " ".join(lines).lower()
    assert len(text) > 150_000
    assert len(set(lines)) == len(lines)
    assert ">>>" not in text and "::" not in text and "====" not in text
    assert sum(character.isalpha() or character.isspace() for character in text) > 0.93 * len(text)
    # The best-known sentence of the MIT licence is in a hundred packages.
    assert text.count("the above copyright notice and this permission notice shall be included") <= 1
    assert documents == list(demo_corpus.demo_documents())
