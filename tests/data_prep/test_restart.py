"""A conversion that is cut off anywhere, or spread over processes, jobs and starts, makes the same bytes."""

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anymixer.errors import UserError
from data_prep import duplicates, place, unit_work, units, workspace
from data_prep.convert import convert
from data_prep.options import ConvertOptions

ROOT = Path(__file__).parents[2]
KILLED = str(Path(__file__).with_name("kill_convert.py"))


@pytest.fixture(scope="module")
def files(tmp_path_factory, text_of) -> tuple[Path, ...]:
    """Six files of documents of one to 60 words, among them some copies."""
    folder = tmp_path_factory.mktemp("files")
    generator = random.Random(0)
    for number in range(6):
        begins = (generator.randrange(5, 20_000) for _ in range(80))
        documents = [text_of(begin, begin + generator.randrange(1, 60)) for begin in begins]
        (folder / f"{number}.txt").write_text("\n\n".join([*documents, "x5 x6", documents[0]]))
    return tuple(sorted(folder.iterdir()))


@pytest.fixture
def options(files, number_tokenizer, tmp_path):
    def make(name: str, **given) -> ConvertOptions:
        common = {"input": files, "out_root": tmp_path / name, "val_fraction": 0.2, "num_workers": 1, "dedup": True}
        return ConvertOptions(dataset="text", **{**common, "tokenizer": number_tokenizer, "pack_tokens": 32, **given})

    return make


@pytest.fixture
def unbroken(options, contents):
    """What an undisturbed conversion makes."""
    convert(options("unbroken"))
    return contents(options("unbroken").out_root)


def test_processes_do_not_matter(options, unbroken, contents):
    convert(options("two", num_workers=2))
    assert contents(options("two").out_root) == unbroken


def test_jobs_share_the_units(options, unbroken, contents):
    jobs = [options("shared", shard=(number, 3)) for number in range(3)]
    assert [convert(job) for job in jobs[:2]] == [None, None]  # others have documents that may be copies
    assert not (jobs[0].out_root / "train" / "index.json").exists()
    assert convert(jobs[2]) is None  # knows all copies, and converts its own units
    assert convert(jobs[0]) is None
    manifest = convert(jobs[1])
    assert manifest is not None and manifest["splits"]["train"]["duplicates"] > 6
    assert contents(jobs[0].out_root) == unbroken
    assert convert(jobs[0]) == manifest


def test_a_cut_anywhere_in_the_publishing(options, unbroken, contents, monkeypatch):
    calls = []

    def cut_at(number):
        def cut(*arguments, real):
            calls.append(arguments)
            if len(calls) == number:
                raise KeyboardInterrupt
            return real(*arguments)

        for module, name in (
            (os, "replace"),
            (workspace, "write_text_atomic"),
            (place, "write_text_atomic"),
            (unit_work, "_to_disk"),
        ):
            real = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *given, real=real: cut(*given, real=real))

    made = options("cut")
    number = 0
    while True:
        number += 1
        calls.clear()
        with monkeypatch.context() as monkeypatch:
            cut_at(number)
            try:
                convert(made)
                break
            except KeyboardInterrupt:
                continue
    assert number > 10 and contents(made.out_root) == unbroken


@pytest.mark.parametrize("full_at", [1, 4])
def test_a_full_disk_leaves_what_is_finished(options, unbroken, contents, monkeypatch, full_at):
    from data_prep.shards import PackedShards

    real, calls = PackedShards._process_file, []

    def write(*arguments):
        calls.append(arguments)
        if len(calls) >= full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    made = options("full")
    with monkeypatch.context() as patched:
        patched.setattr(PackedShards, "_process_file", write)
        with pytest.raises(UserError, match=r"the disk of .*full is full; make room and start the same command again"):
            convert(made)
    finished = len(list(made.out_root.glob(".work/*/units/*.json")))
    assert finished == (0 if full_at == 1 else 1)
    convert(made)
    assert contents(made.out_root) == unbroken


def test_other_settings_do_not_continue_it(options, files, number_tokenizer, tmp_path, monkeypatch):
    made = options("begun")
    monkeypatch.setattr(unit_work, "_publish", _fail_at_unit("00003", unit_work._publish))
    with pytest.raises(UserError, match="on purpose"):
        convert(made)
    changed = {"pack_tokens": 64, "tokenizer": number_tokenizer, "input": files[:5], "compression": "zstd"}
    for name, message in (
        ("pack_tokens", r"unfinished conversion with --pack_tokens 32 \(now 64\)"),
        ("input", r"with --input 0.txt of \d+ bytes .* \(now 0.txt"),
        ("compression", r"--compression None \(now zstd\)"),
    ):
        with pytest.raises(UserError, match=message):
            convert(options("begun", **{name: changed[name]}))
    with pytest.raises(UserError, match="unfinished conversion with --splits train val"):
        convert(options("begun", splits=("train",)))


def test_a_repaired_input_continues(tmp_path, number_tokenizer, text_of, read_samples):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{text_of(5, 9)}"}}\n')
    (tmp_path / "b.jsonl").write_text("not JSON")
    given = {"input": (tmp_path / "a.jsonl", tmp_path / "b.jsonl"), "splits": ("train",), "num_workers": 1}
    made = ConvertOptions(dataset="text", out_root=tmp_path / "out", **given)
    with pytest.raises(UserError, match=r"b.jsonl: line 1 is not JSON"):
        convert(made)
    (tmp_path / "b.jsonl").write_text('{"text": "repaired"}\n')
    convert(made)
    assert [row["text"] for row in read_samples(tmp_path / "out" / "train")] == [text_of(5, 9), "repaired"]


def _fail_at_unit(name, real):
    def publish(place, unit, temporary, record):
        if unit.name == name:
            raise UserError("on purpose")
        real(place, unit, temporary, record)

    return publish


def test_a_large_file_is_divided(options, files, tmp_path, monkeypatch, read_samples):
    whole = tmp_path / "whole.txt"
    whole.write_text("\n\n".join(path.read_text() for path in files))
    rows = {"pack_tokens": None, "tokenizer": None, "splits": ("train",), "input": (whole,), "dedup": False}
    convert(ConvertOptions(**{**vars(options("one")), **rows}))
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    manifest = convert(ConvertOptions(**{**vars(options("parts")), **rows}))
    assert len(list((tmp_path / "parts" / "train").glob("*/index.json"))) > 3
    assert [part["range"][0] for part in manifest["inputs"]][:2] == [0, 20_000]
    texts = [[row["text"] for row in read_samples(tmp_path / name / "train")] for name in ("one", "parts")]
    assert texts[0] == texts[1] and len(texts[0]) == 6 * 82


def test_duplicates_do_not_depend_on_how_many_are_compared_at_once(options, unbroken, contents, monkeypatch):
    monkeypatch.setattr(duplicates, "_AT_ONCE", 50)
    convert(options("bits"))
    assert contents(options("bits").out_root) == unbroken


def test_only_one_at_a_time(options):
    made = options("busy")
    with workspace.Workspace(made), pytest.raises(UserError, match="another conversion is writing to"):
        convert(made)
    with workspace.Workspace(options("busy", shard=(0, 2))), pytest.raises(UserError, match="another conversion"):
        convert(options("busy", shard=(0, 2)))
    assert convert(made) is not None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills processes")
def test_ten_kills(tmp_path, contents):
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghij", k=generator.randrange(2, 9))) for _ in range(3000)]
    paths = []
    for number in range(8):
        documents = (" ".join(generator.choices(words, k=generator.randrange(5, 400))) + "." for _ in range(800))
        paths.append(str(tmp_path / f"{number}.txt"))
        Path(paths[-1]).write_text("\n\n".join(documents))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    common = ["--dataset", "text", "--input", *paths, "--num_workers", "2", "--train_tokenizer", "500"]
    common += ["--pack_tokens", "128", "--compression", "zstd", "--dedup", "--out_root"]

    def start(name, *program):
        command = [sys.executable, *(program or ("-m", "data_prep.convert")), *common, str(tmp_path / name)]
        return subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=500).returncode

    assert start("unbroken") == 0
    for stage in ["start", "tokenizer", "hashes", *["units"] * 7]:
        assert start("killed", KILLED, stage, str(generator.uniform(0, 1))) == -signal.SIGKILL, stage
    assert start("killed") == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")
