"""`anymixer report matrices`: the matrices are those of the run's model, before and after training."""

import json

import numpy as np
import pytest
import torch

from anymixer.config import load_config
from anymixer.data import load_tokenizer
from anymixer.fill_mask import load_run
from anymixer.models import build_model
from anymixer.report.matrices import LayerMatrices, RunMatrices, draw_matrices, initial_model, run_matrices

TEXT = "the old tree sees a cat"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, write_run, call_main):
    """A run of four steps whose five layers are of two kinds."""
    folder = tmp_path_factory.mktemp("matrices")
    mixers = "[{name: hydra, d_state: 4, headdim: 8}, {name: attention, num_heads: 2}]"
    file = write_run(folder, "mixed", mixer=mixers)
    assert call_main(file, "model.model_config.num_hidden_layers=5") == 0
    return folder / "mixed"


def test_the_initial_model_is_the_one_that_training_began_with(run_folder):
    from composer.utils import reproducibility

    config = load_config(run_folder / "config.yaml")
    reproducibility.seed_all(config.seed)
    expected = build_model(config.model)
    for (name, a), (_, b) in zip(initial_model(config).named_parameters(), expected.named_parameters()):
        assert torch.equal(a, b), name


def test_the_matrices_are_those_of_the_first_middle_and_last_layer(run_folder):
    run = run_matrices(run_folder, TEXT)
    assert [layer.layer for layer in run.trained] == [0, 2, 4]
    assert [layer.mixer for layer in run.trained] == ["hydra"] * 3
    assert run.trained[0].heads == (0, 2, 3) and run.trained[0].num_heads == 4
    model, tokenizer, _ = load_run(run_folder)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    assert list(run.tokens) == tokenizer.convert_ids_to_tokens(ids[0].tolist())
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = model.bert.backbone.layers[2].sequence.mixer.matrix(states[2])[0, [0, 2, 3]]
    np.testing.assert_allclose(run.trained[1].matrices, expected.numpy(), rtol=1e-5, atol=1e-7)
    assert not np.allclose(run.initial[1].matrices, run.trained[1].matrices)


def test_pictures_and_index_are_written(run_folder, tmp_path, call_cli, capsys):
    assert call_cli("report", "matrices", run_folder, "--text", TEXT, "--output", tmp_path) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "mixed.png"), str(tmp_path / "README.md")]
    picture = (tmp_path / "mixed.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and 5_000 < len(picture) < 150_000
    index = (tmp_path / "README.md").read_text()
    loss = json.loads((run_folder / "summary.json").read_text())["after"]["loss"]
    assert "mixer: {name: hydra, d_state: 4, headdim: 8}\nmixer: {name: attention, num_heads: 2}\n" in index
    assert f"*{TEXT}*" in index and "(mixed.png)" in index and f"{loss:.3f} nats" in index
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "mixed.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere: no such file or folder"),
        (["{run}", "{run}"], "runs: two of them are called 'mixed'"),
        (["{run}", "--text", "the cat " * 40], "tokens are more than max_seq_len = 32"),
    ],
)
def test_mistakes_are_one_line(run_folder, tmp_path, call_cli, capsys, arguments, message):
    words = [a.format(run=run_folder) for a in arguments]
    assert call_cli("report", "matrices", *words, "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_mixers_is_said(tmp_path, write_run, call_main, call_cli, capsys):
    file = write_run(tmp_path, "baseline", mixer="null", max_duration="1ba")
    sizes = "{vocab_size: 300, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
    assert call_main(file, "model.name=hf_bert", f"model.model_config={sizes}") == 0
    assert call_cli("report", "matrices", tmp_path / "baseline", "--text", TEXT) == 2
    assert "its model (hf_bert) has no sequence mixer to draw" in capsys.readouterr().err


def test_a_layer_with_few_heads_leaves_gaps_and_zeros_are_drawn():
    zeros, one = np.zeros((2, 3, 3), np.float32), np.eye(3, dtype=np.float32)[None]
    layers = (
        LayerMatrices(0, "hydra", "", (0, 3), 4, zeros),
        LayerMatrices(1, "toeplitz", "", (0,), 1, one),
    )
    figure = draw_matrices(RunMatrices("mixed", "hydra", ("[CLS]", "$x$", "[SEP]"), layers, layers))
    drawn = [axes for axes in figure.axes if axes.get_images()]
    assert len(drawn) == 6
    norms = [axes.get_images()[0].norm for axes in drawn]
    assert all(norm.vmin == -norm.vmax and norm.vmax > 0 for norm in norms)


def test_entries_that_are_all_alike_are_told_apart():
    alike = np.linspace(0.9, 1.0, 9, dtype=np.float32).reshape(1, 3, 3)
    layers = (LayerMatrices(0, "a", "", (0,), 1, alike), LayerMatrices(1, "b", "", (0,), 1, -alike))
    figure = draw_matrices(RunMatrices("run", "a", ("x", "y", "z"), layers, layers))
    scales = [axes.get_images()[0].norm for axes in figure.axes]
    assert [norm.vmin for norm in scales[:2]] == pytest.approx([0.905, -0.995])
    assert [norm.vmax for norm in scales[:2]] == pytest.approx([0.995, -0.905])


def test_the_tokenizer_is_the_run_s_own(run_folder):
    assert run_matrices(run_folder, TEXT).tokens[0] == load_tokenizer(str(run_folder / "tokenizer")).cls_token
