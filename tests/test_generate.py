"""`anymixer generate` on a run folder as main.py leaves it, and what it says of its samples."""

import json

import pytest
import torch

from anymixer.generate import SamplingOptions, left_padded, sample, token_log_likelihoods
from anymixer.models.configuration_mixer_lm import MixerLMConfig
from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM

pytest.importorskip("composer")
MIXER = "{name: ssd, d_state: 4, headdim: 8}"
MODEL = f"{{name: causal_lm, mixer: {MIXER}, model_config: {{vocab_size: 300, hidden_size: 16, num_hidden_layers: 2}}}}"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, write_run, call_main):
    folder = tmp_path_factory.mktemp("runs")
    path = write_run(folder, "lm", model=MODEL)
    assert call_main(path) == 0
    return folder / "lm"


def test_prompts_are_continued_and_saved(run_folder, tmp_path, call_cli, capsys):
    output = tmp_path / "samples.jsonl"
    arguments = ("--prompt", "the old cat", "--prompt", "a dog", "--n-samples", 2, "--l-sample", 5, "--output", output)
    assert call_cli("generate", run_folder, *arguments) == 0
    assert "tokens/s" in capsys.readouterr().out
    samples = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(s["prompt"] for s in samples) == ["a dog", "a dog", "the old cat", "the old cat"]
    assert [s["log_likelihood"] for s in samples] == sorted((s["log_likelihood"] for s in samples), reverse=True)
    assert call_cli("generate", run_folder, *arguments) == 2  # nothing is overwritten
    assert "exists" in capsys.readouterr().err


def test_without_prompts_held_out_prefixes_are_continued(run_folder, call_cli, capsys):
    assert call_cli("generate", run_folder, "--n-samples", 3, "--l-prefix", 4, "--l-sample", 2, "--temperature", 0) == 0
    assert "3 rows at a time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", -1), "--temperature: -1.0 is negative"),
        (("--top-p", 0), "--top-k, --top-p"),
        (("--l-sample", 0), "--l-sample: 0 is not positive"),
        (("--n-samples", 0), "--n-samples, --l-prefix"),
    ],
)
def test_impossible_options_are_named(run_folder, call_cli, capsys, arguments, message):
    assert call_cli("generate", run_folder, *arguments) == 2
    assert message in capsys.readouterr().err


def test_an_encoder_does_not_generate(tmp_path, write_run, call_main, call_cli, capsys):
    assert call_main(write_run(tmp_path, "encoder", max_duration="1ba", save_interval="1ba")) == 0
    assert call_cli("generate", tmp_path / "encoder", "--prompt", "the") == 2
    assert "mixer_bert) does not generate" in capsys.readouterr().err


class Letters:
    """A tokenizer of single letters; `b` ends a text."""

    pad_token_id, eos_token_id = 0, 2

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(96 + i) for i in ids)


def test_log_likelihoods_are_those_of_each_row_alone():
    torch.manual_seed(0)
    config = MixerLMConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=2, mixer={"name": "hgrn2", "expand_ratio": 8}
    )
    config.initializer_range = 0.5
    model = MixerLMForCausalLM(config).eval()
    rows = [[3, 4, 5], [6]]
    samples, _ = sample(model, Letters(), rows, SamplingOptions(max_new_tokens=6, seed=1))
    for s in samples:
        ids = [ord(c) - 96 for c in s.prompt + s.continuation]
        one, mask = left_padded([ids], 0, model.device)
        with torch.no_grad():
            alone = token_log_likelihoods(model, one, mask[:, : len(s.prompt)], len(s.prompt))
        assert s.tokens == alone.shape[1]
        assert s.log_likelihood == pytest.approx(float(alone.mean()), abs=1e-5)
        assert "b" not in s.continuation[:-1]


def test_a_wrong_command_line_is_one_line(call_cli, capsys):
    assert call_cli("generate", "somewhere", "--promt", "x") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "--promt" in error and "generate --help" in error and error.count("\n") == 1
