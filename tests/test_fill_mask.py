"""`anymixer fill-mask` on a run folder as main.py leaves it."""

import sys

import pytest
import torch

from anymixer.cli import main
from anymixer.config import dump_config, load_config
from anymixer.data import load_tokenizer
from anymixer.models import build_model
from anymixer.pretrain import CONFIG_NAME, TOKENIZER_NAME
from data_prep.convert import ConvertOptions, convert


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run whose model always answers "tree": every weight 0 but the head's bias."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("\n\n".join(f"the old tree sees house number {i}" for i in range(200)))
    data = folder / "mds"
    options = {"input": (folder / "text.txt",), "out_root": data, "train_tokenizer": 256, "concat_tokens": 16}
    convert(ConvertOptions(dataset="text", val_fraction=0.2, **options))
    yaml = folder / "run.yaml"
    yaml.write_text(
        f"data_local: {data}\ntokenizer_name: {data}/tokenizer\nmax_seq_len: 16\n"
        "model:\n  mixer: {name: hydra, d_state: 4}\n"
        "  model_config: {vocab_size: 256, hidden_size: 16, num_hidden_layers: 1}\n"
    )
    config = load_config(yaml)
    (folder / CONFIG_NAME).write_text(dump_config(config))
    (data / "tokenizer").rename(folder / TOKENIZER_NAME)
    model = build_model(config.model)
    vocabulary = load_tokenizer(str(folder / TOKENIZER_NAME)).get_vocab()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.head.decoder.bias[vocabulary["tree"]] = 20.0
    state = {"state": {"model": {f"model.{name}": value for name, value in model.state_dict().items()}}}
    torch.save(state, folder / "latest-rank0.pt")
    return folder


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["anymixer", "fill-mask", *map(str, arguments)])
    with pytest.raises(SystemExit) as ending:
        main()
    return ending.value.code


def test_masks_of_a_text_and_of_held_out_rows_are_filled(run_folder, monkeypatch, capsys):
    assert call(monkeypatch, run_folder, "the old [MASK] sees", "--examples", 2, "--top", 1) == 0
    out = capsys.readouterr().out
    assert out.count("tree 100%") == 3
    assert "the old [MASK] sees" in " ".join(out.split())


def test_a_checkpoint_beside_its_run_is_enough(run_folder, monkeypatch, capsys):
    assert call(monkeypatch, run_folder / "latest-rank0.pt", "the old [MASK] sees", "--examples", 1, "--top", 1) == 0
    assert capsys.readouterr().out.count("tree 100%") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "no mask here"], "texts: no [MASK] in: no mask here"),
        (["{run}"], "texts: none given"),
        (["/nowhere", "a [MASK]"], "/nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_one_line(run_folder, monkeypatch, capsys, arguments, message):
    assert call(monkeypatch, *(a.format(run=run_folder) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_held_out_data_is_said(run_folder, monkeypatch, capsys):
    data = run_folder / "mds"
    data.rename(run_folder / "elsewhere")
    assert call(monkeypatch, run_folder, "--examples", 2) == 2
    assert "the run's held-out data is not at" in capsys.readouterr().err
    (run_folder / "elsewhere").rename(data)


def test_mixers_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["anymixer", "mixers"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert not ending.value.code
    out = capsys.readouterr().out
    assert "hydra" in out and "attention" in out and "d_state=64" in out
