"""Reading GLUE's two layouts, and making batches: shuffled, bucketed, padded, packed."""

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from anymixer.errors import UserError
from anymixer.glue.batches import BUCKET_BATCHES, Batches, encode, pack
from anymixer.glue.data import Examples, SplitMissing, check_data, data_digest, load_split
from anymixer.glue.tasks import TASKS, get_task

# GLUE's own files: what a line of each looks like, and what must be read from it.
ORIGINAL = {
    "CoLA": {
        "train.tsv": 'gj04\t1\t\tThe "cat" sat.\ngj04\t0\t*\tCat the sat.\n',
        "dev.tsv": "gj04\t1\t\tA dog.\n",
        "test.tsv": "index\tsentence\n0\tA bird.\n1\tA tree.\n",
    },
    "SST-2": {"train.tsv": "sentence\tlabel\nfine \t1\n", "dev.tsv": "sentence\tlabel\nbad\t0\n"},
    "MRPC": {
        "train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA cat .\tThe cat .\n",
        "dev.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\tA dog .\tThe cat .\n",
    },
    "STS-B": {
        "train.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tA cat.\tA dog.\t2.500\n",
        "dev.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tA cat.\tA cat.\t5.000\n",
    },
    "QQP": {
        "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow?\t0\n1\t2\tbroken\n",
        "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tWhy?\t1\n",
    },
    "MNLI": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tA cat.\tA dog.\tx\tcontradiction\n",
        "dev_mismatched.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tA cat.\tA cat.\tx\tentailment\n",
    },
    "diagnostic": {"diagnostic.tsv": "index\tsentence1\tsentence2\n0\tA cat.\tNo cat.\n"},
    "QNLI": {
        "train.tsv": "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment\n",
        "dev.tsv": "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tentailment\n",
    },
    "RTE": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA cat.\tA dog.\tnot_entailment\n",
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA cat.\tA cat.\tentailment\n",
    },
    "WNLI": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA cat.\tA dog.\t0\n",
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA cat.\tA cat.\t1\n",
    },
}
TRAIN_LABELS = {"cola": [1, 0], "sst2": [1], "mrpc": [1], "stsb": [2.5], "qqp": [0]}
TRAIN_LABELS |= {"mnli": [2], "qnli": [1], "rte": [1], "wnli": [0]}


@pytest.fixture
def original(tmp_path):
    for folder, files in ORIGINAL.items():
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text, encoding="utf-8")
    return str(tmp_path)


def test_every_glue_task_is_there():
    names = [name for name, task in TASKS.items() if task.glue]
    assert sorted(names) == sorted(TRAIN_LABELS)


@pytest.mark.parametrize("name", TRAIN_LABELS)
def test_original_files(original, name):
    task = TASKS[name]
    check_data(task, original)
    examples = load_split(task, "train", original)
    assert examples.labels is not None and examples.labels.tolist() == TRAIN_LABELS[name]
    assert len(examples.texts) == len(task.texts) and all(len(c) == len(examples) for c in examples.texts)


def test_original_files_in_detail(original):
    assert load_split(TASKS["cola"], "train", original).texts == (['The "cat" sat.', "Cat the sat."],)
    assert load_split(TASKS["cola"], "test", original, labelled=False).texts == (["A bird.", "A tree."],)
    assert load_split(TASKS["mrpc"], "train", original).texts == (["A cat ."], ["The cat ."])
    assert load_split(TASKS["qqp"], "train", original).unreadable == 1
    ax = load_split(TASKS["mnli"], "test", original, labelled=False, other="ax")
    assert ax.texts == (["A cat."], ["No cat."]) and ax.labels is None


def test_parquet_under_the_names_of_the_hub_and_of_parts(tmp_path, data):
    table = parquet.read_table(data / "rte" / "train.parquet")
    (tmp_path / "rte").mkdir()
    half = len(table) // 2
    parquet.write_table(table[:half], tmp_path / "rte" / "train-00000-of-00002.parquet")
    parquet.write_table(table[half:], tmp_path / "rte" / "train-00001-of-00002.parquet")
    parquet.write_table(table[:5], tmp_path / "rte" / "validation_subset.parquet")
    whole = load_split(TASKS["rte"], "train", str(tmp_path))
    assert whole.texts[0] == table["sentence1"].to_pylist() and not whole.partial
    part = load_split(TASKS["rte"], "validation", str(tmp_path))
    assert len(part) == 5 and part.partial


def test_a_missing_split_has_an_error_of_its_own(tmp_path, original):
    (tmp_path / "RTE" / "dev.tsv").unlink()
    with pytest.raises(SplitMissing, match=r"rte: no validation split in .*rte/validation.parquet or RTE/dev.tsv"):
        check_data(TASKS["rte"], original)
    check_data(TASKS["mnli"], original)  # one of two validation sets is enough
    with pytest.raises(SplitMissing, match="mnli: no validation_matched split"):
        load_split(TASKS["mnli"], "validation_matched", original)
    with pytest.raises(UserError, match="data_local: no such folder"):
        check_data(TASKS["rte"], str(tmp_path / "nowhere"))


def test_mistakes_in_files_are_named(tmp_path):
    (tmp_path / "rte").mkdir()
    path = tmp_path / "rte" / "train.parquet"
    parquet.write_table(pyarrow.table({"sentence1": ["a"], "label": [0]}), path)
    with pytest.raises(UserError, match="has no column 'sentence2'"):
        load_split(TASKS["rte"], "train", str(tmp_path))
    parquet.write_table(pyarrow.table({"sentence1": ["a"], "sentence2": ["b"], "label": [2]}), path)
    with pytest.raises(UserError, match="label 2 is none of rte's"):
        load_split(TASKS["rte"], "train", str(tmp_path))
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="not a readable parquet file"):
        load_split(TASKS["rte"], "train", str(tmp_path))
    path.unlink()
    (tmp_path / "rte" / "train.tsv").write_text("index\tsentence1\tlabel\n0\ta\tentailment\n")
    with pytest.raises(UserError, match="has no column 'sentence2'"):
        load_split(TASKS["rte"], "train", str(tmp_path))


def test_unknown_tasks():
    with pytest.raises(UserError, match=r"tasks\.sst: unknown task; did you mean 'sst2'"):
        get_task("sst")
    with pytest.raises(UserError, match="the mnli job predicts it"):
        get_task("ax")


def test_the_hub_is_asked_for_what_is_not_local(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[1] == "qnli":
            raise ConnectionError("no network")
        return {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    examples = load_split(TASKS["rte"], "validation", None)
    assert asked == [(("nyu-mll/glue", "rte"), {"split": "validation"})]
    assert examples.texts == (["a"], ["b"]) and examples.labels.tolist() == [1]
    with pytest.raises(UserError, match="data_local: not set, and nyu-mll/glue cannot be fetched"):
        load_split(TASKS["qnli"], "train", None)


def test_the_digest_follows_the_files(tmp_path, original):
    before = data_digest(TASKS["rte"], original)
    (tmp_path / "RTE" / "test.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    assert data_digest(TASKS["rte"], original) == before
    with open(tmp_path / "RTE" / "train.tsv", "a") as file:
        file.write("1\ta\tb\tentailment\n")
    assert data_digest(TASKS["rte"], original) != before


@pytest.fixture
def encoded(data, tokenizer):
    return encode(load_split(TASKS["rte"], "train", str(data)), tokenizer, 32)


def batches(encoded, size=8, **options):
    return Batches(encoded, size, pad_token_id=0, longest_row=32, **options)


def rows(batch):
    """(ids, label) of every row without its padding."""
    return [
        (tuple(ids[mask.bool()].tolist()), label.item())
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"])
    ]


def test_texts_become_pairs_of_one_row(tokenizer):
    examples = Examples((["the cat"], ["a dog sees"]), np.array([1]))
    batch = next(iter(batches(encode(examples, tokenizer, 32))))
    # [CLS] the cat [SEP] a dog sees [SEP], rounded up to eight
    assert batch["input_ids"].tolist() == [[2, 5, 7, 3, 6, 8, 11, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1]


def test_the_length_that_texts_are_cut_to_is_always_today_s(data, tokenizer):
    examples = load_split(TASKS["rte"], "train", str(data))
    for longest in (32, 12):
        assert encode(examples, tokenizer, longest).lengths.max() <= longest
    assert encode(examples, tokenizer, 12).lengths.max() == 12


def test_a_pass_holds_every_example_once_and_in_another_order_each_time(encoded):
    made = batches(encoded, seed=5)
    first, second = list(made), list(made)
    everything = sorted(row for batch in batches(encoded) for row in rows(batch))
    for one in (first, second):
        assert len(one) == len(made) and sorted(row for batch in one for row in rows(batch)) == everything
    assert [rows(b) for b in first] != [rows(b) for b in second]
    again = batches(encoded, seed=5)
    assert [rows(b) for b in again] == [rows(b) for b in first]
    assert [rows(b) for b in batches(encoded, seed=6)] != [rows(b) for b in first]


def test_training_data_is_shuffled():
    lengths = np.full(1000, 10)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    data = type("Data", (), {"lengths": lengths, "starts": starts, "labels": None, "__len__": lambda self: 1000})()
    groups = Batches(data, 10, pad_token_id=0, longest_row=32).shuffled(1, 0)
    order = np.concatenate(groups)
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_rows_of_a_batch_are_of_like_length_and_padded_to_its_longest(encoded):
    made = list(batches(encoded, size=2, seed=5))
    padding = sum(int((b["attention_mask"] == 0).sum()) for b in made)
    assert BUCKET_BATCHES * 2 >= 64 and padding < 0.25 * sum(b["input_ids"].numel() for b in made)
    for batch in made:
        longest = int(batch["attention_mask"].sum(1).max())
        assert batch["input_ids"].shape[1] in (-(-longest // 8) * 8, 32)


def test_packed_rows_hold_the_same_examples(encoded):
    plain = list(batches(encoded, seed=5))
    for one, other in zip(plain, batches(encoded, seed=5, row_length=64)):
        assert len(other["input_ids"]) < len(one["input_ids"])
        found = []
        for ids, sequence, labels in zip(other["input_ids"], other["sequence_id"], other["labels"]):
            for number, label in enumerate(labels.tolist()):
                if label != -100:
                    found.append((tuple(ids[sequence == number].tolist()), label))
        assert sorted(found) == sorted(rows(one))
        assert torch.equal(other["attention_mask"].bool(), other["sequence_id"] >= 0)


def test_first_fit_decreasing():
    assert pack(np.array([5, 3, 7, 2, 3]), [0, 1, 2, 3, 4], 10) == [[2, 1], [0, 4, 3]]


def test_a_tokenizer_without_marks_is_refused(tokenizer):
    class Bare:
        @staticmethod
        def num_special_tokens_to_add(pair):
            return 0

    with pytest.raises(UserError, match="puts no tokens such as"):
        encode(Examples((["a"],), None), Bare(), 8)
