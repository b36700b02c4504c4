"""`anymixer generate` on a run folder as main.py leaves it, and what it says of its samples."""

import json
import re

import pytest
import torch

from anymixer.errors import UserError
from anymixer.fill_mask import load_run
from anymixer.generate import SamplingOptions, first_sequence, sample
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


def letters_model(**options):
    config = MixerLMConfig(
        **{"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.5} | options
    )
    return MixerLMForCausalLM(config).eval()


MIXERS = [
    {"name": "hgrn2", "expand_ratio": 8},
    {"name": "attention", "num_heads": 2},
    {"name": "dma", "num_heads": 2, "keep_window_size": 4},
]


@pytest.mark.parametrize("rows", [[[3, 4, 5], [6], [3, 4, 5]], [[3], [6]]], ids=["padded", "single tokens"])
@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer["name"])
@pytest.mark.parametrize("temperature", [0, 0.5])
def test_log_likelihoods_are_those_of_each_row_alone(rows, mixer, temperature):
    model = letters_model(mixer=mixer)
    options = SamplingOptions(max_new_tokens=6, seed=1, temperature=temperature, top_k=3 if temperature else 0)
    samples, _ = sample(model, Letters(), rows, options)
    assert sorted(s.prompt for s in samples) == sorted(Letters().decode(row) for row in rows)
    for s in samples:
        ids = torch.tensor([[ord(c) - 96 for c in s.prompt + s.continuation]])
        with torch.no_grad():
            scores = model(ids).logits.log_softmax(-1)[0, len(s.prompt) - 1 : -1]
        alone = scores[torch.arange(s.tokens), ids[0, len(s.prompt) :]]
        assert s.log_likelihood == pytest.approx(float(alone.mean()), abs=1e-5)
        assert "b" not in s.continuation[:-1]
        if not temperature:
            assert torch.equal(scores.argmax(-1), ids[0, len(s.prompt) :])


def test_a_prompt_is_read_once_and_never_all_its_logits():
    model = letters_model(mixer=MIXERS[0])
    reads = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: reads.append(tuple(output.shape)))
    rows = [[3, 4, 5, 6], [7, 8, 5, 6]] * 3
    sample(model, Letters(), rows, SamplingOptions(max_new_tokens=3, top_k=1))
    assert reads[0] == (2, 1, 9) and set(reads[1:]) == {(6, 1, 9)} and len(reads) <= 4


def test_more_tokens_than_learned_positions_are_refused_before_work():
    model = letters_model(mixer="attention", position_embeddings="learned", max_position_embeddings=8)
    assert sample(model, Letters(), [[3, 4, 5]], SamplingOptions(max_new_tokens=6))[0][0].tokens <= 6
    with pytest.raises(UserError, match="--l-sample: 7 tokens after a prompt of 3; the model has learned 8 positions"):
        sample(model, Letters(), [[3, 4, 5]], SamplingOptions(max_new_tokens=7))


@pytest.mark.parametrize(
    ("row", "first"),
    [
        ([1, 5, 6, 2, 1, 7, 2], [1, 5, 6]),
        ([5, 6, 1, 7], [5, 6]),  # sequences that only have a start
        ([5, 6], [5, 6]),
        ([2, 5, 6, 2], [2, 5, 6]),  # one token starts and ends them
    ],
)
def test_a_prefix_ends_with_its_first_sequence(row, first):
    assert first_sequence(row, (1, 2)) == first


def test_every_kind_of_checkpoint_generates_the_same(run_folder, tmp_path, call_cli, capsys):
    def said(source):
        assert call_cli("generate", source, "--prompt", "the old cat", "--temperature", 0, "--l-sample", 4) == 0
        return capsys.readouterr().out.rpartition("tokens in")[0]

    model, tokenizer, _ = load_run(run_folder)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "exported")
    expected = said(run_folder)
    (newest,) = run_folder.glob("ep*-ba4-rank0.pt")
    for source in (newest, run_folder / "latest-rank0.pt", tmp_path / "exported"):
        assert said(source) == expected
    assert call_cli("generate", tmp_path / "exported") == 2
    assert "its held-out data is unknown" in capsys.readouterr().err
    assert call_cli("fill-mask", run_folder, "the [MASK]") == 2
    assert "(MixerLMForCausalLM) fills no masks" in capsys.readouterr().err


def test_fewer_and_shorter_prefixes_than_asked_for_are_said(run_folder, call_cli, capsys):
    arguments = ("--n-samples", 1000, "--l-prefix", 1000, "--l-sample", 1, "--temperature", 0)
    assert call_cli("generate", run_folder, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    there = int(re.fullmatch(r"--n-samples: 1000 asked for, (\d+) held-out rows are there", lines[0])[1])
    assert lines[1] == f"--l-prefix: {there} of {there} prefixes end before 1000 tokens, with their text or row"
    assert f"{there} rows at a time" in lines[-1]


def test_a_wrong_command_line_is_one_line(call_cli, capsys):
    assert call_cli("generate", "somewhere", "--promt", "x") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "--promt" in error and "generate --help" in error and error.count("\n") == 1
