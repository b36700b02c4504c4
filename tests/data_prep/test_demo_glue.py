"""The demo's two GLUE-format tasks: balanced, repeatable, read as GLUE's are, nothing of one split in the other."""

import random

import pytest

from anymixer.glue.data import check_data, load_split
from anymixer.glue.tasks import TASKS
from data_prep import demo_glue

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
SIZES = {"train": 60, "validation": 20}


@pytest.fixture
def documents():
    """Forty documents of three paragraphs of three sentences, no two alike."""
    rng = random.Random(0)

    def sentence(number):
        return f"Sentence {' '.join(rng.sample(WORDS, 6))} mark{number}x."

    return ["\n".join(" ".join(sentence(100 * d + 10 * p + s) for s in range(3)) for p in range(3)) for d in range(40)]


def test_both_tasks_are_balanced_repeatable_and_split_by_document(documents):
    tasks = demo_glue.make_tasks(documents, SIZES, seed=1)
    assert tasks == demo_glue.make_tasks(documents, SIZES, seed=1)
    assert tasks != demo_glue.make_tasks(documents, SIZES, seed=2)
    for splits in tasks.values():
        marks = {}
        for split, rows in splits.items():
            labels = rows["label"]
            assert sum(labels) == len(labels) // 2 and rows["idx"] == list(range(len(labels)))
            texts = [text for name, column in rows.items() if name.startswith("sentence") for text in column]
            marks[split] = {int(w.strip(".")[4:-1]) // 100 for text in texts for w in text.split() if "mark" in w}
        assert marks["train"] and marks["validation"] and not marks["train"] & marks["validation"]


def test_what_the_labels_mean(documents):
    tasks = demo_glue.make_tasks(documents, SIZES, seed=1)
    text = " ".join(documents).lower()
    rows = tasks["acceptability"]["train"]
    assert all((sentence in text) == bool(label) for sentence, label in zip(rows["sentence"], rows["label"]))
    rows = tasks["sentence_pairs"]["train"]
    for first, second, label in zip(rows["sentence1"], rows["sentence2"], rows["label"]):
        pair = f"{first} {second}" if label else f"{second} {first}"
        assert pair.lower() in text


def test_sentences():
    assert demo_glue.sentences("The first. The second (e.g. this). Third 3.14 one.") == [
        "The first.",
        "The second (e.g. this).",
        "Third 3.14 one.",
    ]


def test_what_is_written_is_read_as_glue_is(documents, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.demo_corpus.demo_documents", lambda: iter(documents))
    demo_glue.main(["--out_root", str(tmp_path), "--train", "30", "--validation", "10"])
    for name in ("acceptability", "sentence_pairs"):
        check_data(TASKS[name], str(tmp_path))
        assert len(load_split(TASKS[name], "train", str(tmp_path))) == 30
        assert sorted(load_split(TASKS[name], "validation", str(tmp_path)).labels.tolist()) == [0] * 5 + [1] * 5
