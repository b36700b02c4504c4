"""`main.py` as its users start it: mistakes, one process, two ranks, and being killed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anymixer.entry_point import run
from anymixer.models.checkpoint_weights import model_weights, read_checkpoint
from anymixer.pretrain import places
from data_prep.convert import ConvertOptions, convert

ROOT = Path(__file__).parents[1]
SMALL = [
    "model.mixer={name: hydra, d_state: 4, headdim: 8}",
    "model.model_config={vocab_size: 300, hidden_size: 16, num_hidden_layers: 2, hidden_dropout_prob: 0.0}",
    "max_seq_len=32",
    "global_train_batch_size=8",
    "max_duration=8ba",
    "eval_interval=0",
    "save_interval=2ba",
    "train_loader.num_workers=0",
    "eval_loader.num_workers=0",
    "device=cpu",
    "progress_bar=false",
]
# main.py, which kills itself when half of its second checkpoint is written.
DYING = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "tests" / "training")!r})
from tiny_run import kill_while_saving
kill_while_saving(2)
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus of a few hundred short documents, a tokenizer trained on it, shards of 32-token rows."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["the", "a", "cat", "dog", "house", "tree", "sees", "likes", "finds", "old", "young", "red", "with"]
    g = torch.Generator().manual_seed(0)
    documents = [
        " ".join(words[i] for i in torch.randint(len(words), (20,), generator=g).tolist()) + "." for _ in range(400)
    ]
    (folder / "text.txt").write_text("\n\n".join(documents))
    out = folder / "mds"
    convert(
        ConvertOptions(
            dataset="text",
            input=(folder / "text.txt",),
            out_root=out,
            train_tokenizer=300,
            concat_tokens=32,
            val_fraction=0.1,
        )
    )
    return out


def arguments(data, folder=None, *more):
    saving = [f"save_folder={folder}", "autoresume=true"] if folder else ["save_folder=null", "autoresume=false"]
    places = [f"data_local={data}", f"tokenizer_name={data}/tokenizer"]
    return [str(ROOT / "yamls/demo/hydra.yaml"), *places, *SMALL, *saving, "eval_first=false", *more]


def call_main(arguments):
    """main.py in this process; returns its exit code."""
    spec = importlib.util.spec_from_file_location("main_under_test", ROOT / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run(module.main, arguments)


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def start(command, arguments):
    """Run it to its end; returns exit code and output."""
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout


def train(arguments, launcher=()):
    code, output = start([*launcher, "main.py"], arguments)
    assert code == 0, output
    return output


def final_weights(folder):
    return model_weights(read_checkpoint((folder / "latest-rank0.pt").resolve(), "test"), "test")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["optimzer.lr=1"], "command line: optimzer: unknown key; did you mean 'optimizer'?"),
        (["max_seq_len=long"], "command line: max_seq_len: expected a whole number, got 'long'"),
        (["data_local=/nowhere"], "/nowhere/train: no such data folder"),
        (["model.model_config.vocab_size=64"], "model.model_config.vocab_size: 64 is smaller than the"),
        (["precision=amp_bf16"], "precision: amp_bf16 needs a GPU"),
        (["device=gpu"], "device: gpu, but torch sees no CUDA device"),
        (["autoresume=true"], "autoresume: needs save_folder"),
        (["model.mixer.name=hydar"], "unknown mixer 'hydar'; did you mean 'hydra'"),
        (["callbacks.lr_monitr={}"], "callbacks.lr_monitr"),
        (["tokenizer_name=/nowhere/vocab.txt"], "tokenizer_name: no such file"),
        (["global_train_batch_size=8192"], "global_train_batch_size: 8192 is more than the"),
        (["load_path=/nowhere/run"], "load_path: /nowhere/run does not exist"),
        ([f"load_path={ROOT / 'docs'}"], "docs holds no whole checkpoint; name a run's folder"),
        ([f"load_path={ROOT / 'main.py'}"], "main.py is no whole checkpoint"),
        ([f"save_folder={ROOT / 'main.py'}"], "main.py is a file; name a folder"),
        ([f"save_folder={ROOT / 'main.py' / 'x'}"], "main.py is a file; name a folder"),
        (["--dryrun"], "main.py: unrecognized arguments: --dryrun (see main.py --help)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(data, capsys, more, message):
    if torch.cuda.is_available() and ("device=gpu" in more or "precision=amp_bf16" in more):
        pytest.skip("this machine has what the option asks for")
    assert call_main(arguments(data, None, *more)) == 2
    captured = capsys.readouterr()
    assert "parameters" not in captured.out  # no model was built
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("file", "folder", "flags"),
    [
        ("pretrain/hydra", "/nowhere", "--tokenizer bert-base-uncased --pack_tokens 128"),
        ("pretrain/hf_bert", "/nowhere", "--tokenizer bert-base-uncased --sequence_tokens 128"),
        ("demo/hydra", "/nowhere/demo", "--train_tokenizer 4096 --pack_tokens 128"),
    ],
)
def test_missing_data_names_the_command_that_makes_it(capsys, file, folder, flags):
    places = [f"data_local={folder}", f"tokenizer_name={folder}/tokenizer"]
    assert call_main([str(ROOT / f"yamls/{file}.yaml"), *places[: 2 if "demo" in file else 1]]) == 2
    message = capsys.readouterr().err
    assert "python -m data_prep.convert" in message and f"--out_root {folder} {flags} (" in message


def test_a_cut_shard_is_named_before_any_work(data, tmp_path, capsys):
    import shutil

    copy = tmp_path / "mds"
    shutil.copytree(data, copy)
    shard = next((copy / "train").rglob("shard.*"))
    shard.write_bytes(shard.read_bytes()[:-7])
    assert call_main(arguments(copy)) == 2
    assert str(shard) in capsys.readouterr().err


def test_dry_run_prints_configuration_parameters_and_budget(data, capsys):
    assert call_main([str(ROOT / "yamls/pretrain/hydra.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "save_folder: runs/hydra" in out
    assert "bert.backbone.layers.22" in out and "3,826,760" in out
    assert "112,086,712 parameters" in out
    assert "70,000 steps, 36.700 billion tokens" in out


def test_the_report_names_no_checkpoint_that_is_not_there(tmp_path):
    """As of a run that goes on from another's last step, with nothing left to train."""
    config = SimpleNamespace(data_local="data")
    assert "checkpoint" not in places(config, tmp_path)
    (tmp_path / "latest-rank0.pt").touch()
    assert places(config, tmp_path)["checkpoint"] == str(tmp_path / "latest-rank0.pt")


@pytest.mark.slow
def test_killed_while_it_saves_it_ends_with_the_same_weights(data, tmp_path):
    dropout = "model.model_config.hidden_dropout_prob=0.1"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(arguments(data, whole, dropout))
    code, output = start(["-c", DYING], arguments(data, broken, dropout))
    assert code == -signal.SIGKILL, output
    output = train(arguments(data, broken, dropout))
    assert f"continuing from {broken}/ep0-ba2-rank0.pt" in output and "ep0-ba4-rank0.pt.broken" in output
    expected, actual = final_weights(whole), final_weights(broken)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert "nothing left to train" in train(arguments(data, broken, dropout))


@pytest.mark.slow
def test_two_ranks_train_checkpoint_and_resume_as_one(data, tmp_path, master_port):
    one, two = tmp_path / "one", tmp_path / "two"
    schedule = ["scheduler.t_max=8ba", "scheduler.t_warmup=1ba"]
    launcher = ["-m", "composer", "-n", "2", "--master_port", str(master_port)]
    train(arguments(data, one, *schedule))
    train(arguments(data, two, *schedule, "max_duration=4ba"), launcher)
    assert "continuing from" in train(arguments(data, two, *schedule), launcher)
    losses = [json.loads((folder / "summary.json").read_text())["train_loss"] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    expected, actual = final_weights(one), final_weights(two)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-4, msg=name)
