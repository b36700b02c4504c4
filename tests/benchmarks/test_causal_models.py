"""The benchmark of causal models: models of one size, whole in small, and decoding on its own."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from anymixer.config import load_config
from anymixer.describe import build_on_meta, count_parameters
from anymixer.errors import UserError
from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "yamls" / "causal" / "compare").glob("*.yaml"))


@pytest.fixture
def program(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("causal_models")


def test_the_models_are_of_one_size_with_and_without_embeddings():
    whole, bodies = [], []
    for path in FILES:
        config = load_config(path)
        model = build_on_meta(config)
        whole.append(count_parameters(model))
        bodies.append(whole[-1] - config.model.vocab_size() * model.config.hidden_size)
    assert len(FILES) == 5
    for counts in (whole, bodies):
        assert max(counts) <= 1.05 * min(counts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_decoding_is_timed_on_is_what_generating_computes(path, program):
    config = load_config(path, ["model.model_config.vocab_size=50", "model.model_config.num_hidden_layers=2"]).model
    torch.manual_seed(0)
    model = MixerLMForCausalLM(config.hugging_face_config()).eval()
    with torch.no_grad():
        step, size = program.continuation(model, context=9, rows=3)
        continued = torch.cat([step() for _ in range(4)], dim=1)
    ids = torch.randint(50, (1, 9), generator=torch.Generator().manual_seed(9))
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(continued, expected[:, 9:].expand(3, -1))
    assert size == sum(layer.sequence.mixer.state_size(9) for layer in model.model.backbone.layers)


def test_unequal_runs_are_refused(program, write_run, tmp_path):
    model = "{name: causal_lm, mixer: ssd, model_config: {vocab_size: 300, hidden_size: 64}}"
    files = [str(write_run(tmp_path, name, seed=seed, model=model)) for name, seed in (("a", 1), ("b", 2))]
    with pytest.raises(UserError, match="seed: the files differ"):
        program.check_comparable(program.plan_runs(files, []))
    program.check_comparable(program.plan_runs(files, ["seed=3"]))
    with pytest.raises(UserError, match=r"a: model\.name: mixer_bert does not generate"):
        program.check_comparable(program.plan_runs([str(write_run(tmp_path, "a"))], []))


def test_tokens_are_a_number_of_steps(program, write_run, tmp_path):
    assert program.duration([str(write_run(tmp_path, "a"))], ["global_train_batch_size=4"], 1000) == "8ba"


@pytest.mark.slow
def test_the_whole_of_it_in_small(program, tmp_path, tiny_corpus, child_environment, capsys):
    files = [str(path) for path in FILES if path.stem in ("hgrn2", "attention")]
    small = {
        "data_local": tiny_corpus,
        "tokenizer_name": f"{tiny_corpus}/tokenizer",
        "max_seq_len": 32,
        "global_train_batch_size": 4,
        "device_train_microbatch_size": 4,
        "train_loader.num_workers": 1,
        "eval_loader.num_workers": 0,
        "model.model_config.vocab_size": 304,
        "model.model_config.num_hidden_layers": 1,
        "save_folder": f"{tmp_path}/${{run_name}}",
    }
    arguments = [*files, *(f"{key}={value}" for key, value in small.items())]
    arguments += ["--tokens", "640", "--contexts", "8", "40", "--rows", "2", "--steps", "3", "--output", str(tmp_path)]
    program.main(arguments)
    assert str(tmp_path / "causal_models.md") in capsys.readouterr().out
    records = json.loads((tmp_path / "causal_models.json").read_text())
    assert {record["steps"] for record in records} == {5} and len({record["tokens"] for record in records}) == 1
    states = {r["name"]: [d["state_bytes"] for d in r["decoding"]] for r in records}
    assert states["causal-compare-hgrn2"][0] == states["causal-compare-hgrn2"][1]
    assert states["causal-compare-attention"][0] < states["causal-compare-attention"][1]
    heads = next(
        line for line in (tmp_path / "causal_models.md").read_text().splitlines() if line.startswith("| model")
    )
    assert heads.count("decode tokens/s") == 2 and "perplexity" in heads
    assert (tmp_path / "causal_models.png").stat().st_size > 1000
