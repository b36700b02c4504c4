"""Exported folders load, in a process that has torch and transformers alone, as what they were exported from."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from mixer_instances import CASES, CAUSAL_CASES

from anymixer.export import fresh_process
from anymixer.export.folder import exported, write_folder
from anymixer.export.heads import FAMILIES, config_class, model_classes
from anymixer.export.sample_rows import arbitrary_rows
from anymixer.export.verify import Expected, verify
from anymixer.models import ModelConfig, build_model

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "hidden_dropout_prob": 0.1}
# What a clean environment does not have, even where the tests run.
ABSENT = ["composer", "streaming", "omegaconf", "rich", "typer", "matplotlib", "triton", "mamba_ssm"]
SPECS = {case.id: case.values[0] for case in CASES}
# The first causal instance of each mixer that has one, as a language model.
CAUSAL = {f"lm-{case.values[0]['name']}": case.values[0] for case in reversed(CAUSAL_CASES)}
# Names in transformers are the same for both families but for the language models' own.
HEADS = {f"{family}-{auto}": (family, auto) for family in FAMILIES for auto in FAMILIES[family].heads}
MEAN = """\
import torch
from torch import nn
from anymixer.mixers import SequenceMixer, register_mixer

@register_mixer("my_exported_mean")
class Mean(SequenceMixer):
    def __init__(self, d_model, *, layer_idx=None, **options):
        super().__init__()
        self.config = self.Config(**options)
        self.in_proj = nn.Linear(d_model, d_model)
    def forward(self, hidden_states, packing=None):
        real = torch.ones_like(hidden_states[..., :1]) if packing is None else packing.real[..., None]
        values = self.in_proj(hidden_states) * real
        return (values.sum(1, keepdim=True) / real.sum(1, keepdim=True)).expand_as(hidden_states)
"""


def small_model(mixer, auto_class="AutoModelForMaskedLM", family="mixer_bert", **architecture):
    torch.manual_seed(0)
    config = config_class(family)(mixer=mixer, num_labels=3, **{**SMALL, **architecture})
    model = model_classes(family)[auto_class](config).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return model


@dataclass
class Made:
    """Exported folders by name, the models they are of, and what a fresh process said of them."""

    root: Path
    expected: dict[str, Expected] = field(default_factory=dict)
    blocked: set[str] = field(default_factory=set)
    verdicts: dict[str, Any] = field(default_factory=dict)

    def add(self, name, model, auto_class="AutoModelForMaskedLM"):
        made = exported(model, auto_class, None)
        # All in folders of one name: transformers 4 takes them for one and the same.
        folder = self.root / name / "model"
        write_folder(made, folder)
        self.blocked |= set(made.blocked)
        self.expected[name] = Expected(folder, model, auto_class, arbitrary_rows(96))
        return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every mixer, every head, and folders that are broken: all in one process, because starting it takes longest."""
    made = Made(tmp_path_factory.mktemp("exported"))
    for name, spec in SPECS.items():
        made.add(name, small_model(spec))
    for name, spec in CAUSAL.items():
        made.add(name, small_model(spec, "AutoModelForCausalLM", "mixer_lm"), "AutoModelForCausalLM")
    for name, (family, auto_class) in HEADS.items():
        mixer = "hydra" if family == "mixer_bert" else "attention"
        made.add(name, small_model(mixer, auto_class, family), auto_class)
    made.add("stack", small_model(["hydra", "attention"], channel_mixer={"name": "glu", "intermediate_size": 48}))
    made.add("positions", small_model("attention", position_embeddings="learned", max_position_embeddings=50))
    mean = tmp_path_factory.mktemp("mixers") / "my_exported_mean.py"
    mean.write_text(MEAN)
    made.add("own", small_model({"name": "my_exported_mean", "module": str(mean)}))
    bert = {"num_attention_heads": 2, "intermediate_size": 48, **SMALL}
    made.add("hf_bert", build_model(ModelConfig(name="hf_bert", model_config=bert)).eval())

    (made.add("no-file", small_model("hydra")) / "layers_packing.py").unlink()
    weights = made.add("no-weight", small_model("hydra")) / "model.safetensors"
    from safetensors.torch import load_file, save_file

    kept = {name: t for name, t in load_file(weights).items() if not name.endswith("A_log")}
    save_file(kept, weights, metadata={"format": "pt"})
    weights = made.add("wrong-weight", small_model("hydra")) / "model.safetensors"
    save_file({n: t + 1e-3 * (n == "head.norm.bias") for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    weights = made.add("nan", small_model("hydra")) / "model.safetensors"
    save_file({name: t * torch.nan for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    made.verdicts = dict(zip(made.expected, verify(list(made.expected.values()), sorted({*made.blocked, *ABSENT}))))
    return made


GOOD = [*SPECS, *CAUSAL, *HEADS, "stack", "positions", "own", "hf_bert"]


@pytest.mark.parametrize("name", GOOD)
def test_the_folder_gives_the_models_outputs(made, name):
    verdict = made.verdicts[name]
    assert verdict.problem is None and verdict.difference <= 1e-5


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no-file", "cannot be loaded without anymixer: .*layers_packing"),
        ("no-weight", "missing keys: bert.backbone.layers.0.sequence.mixer.A_log"),
        ("wrong-weight", "its logits differ by 0.00.*, more than 1e-05"),
        ("nan", "its logits differ by nan, more than 1e-05"),
    ],
)
def test_a_folder_that_is_not_the_model_is_found_out(made, name, problem):
    assert re.match(problem, made.verdicts[name].problem)


@pytest.mark.slow
def test_saved_again_in_the_clean_environment_it_is_the_same(made, tmp_path):
    """The first instance of every mixer; what was saved has all the code, for another head too."""
    encoders = [*(name for name in SPECS if name.endswith("-0")), "own"]
    script = tmp_path / "again.py"
    script.write_text(
        "import json, runpy, sys, tempfile\n"
        "common = runpy.run_path(sys.argv[1])\n"
        "request = json.loads(sys.argv[2])\n"
        "common['Blocker'](request['blocked'])\n"
        "import torch\n"
        "for folder, head, other in request['folders']:\n"
        "    first, _ = common['load'](folder, head)\n"
        "    with tempfile.TemporaryDirectory(dir=sys.argv[3]) as again:\n"
        "        first.save_pretrained(again)\n"
        "        second, wrong = common['load'](again, head)\n"
        "        common['load'](again, other)\n"
        "    assert not wrong, wrong\n"
        "    outputs = [common['outputs'](model, request['rows']) for model in (first, second)]\n"
        "    for a, b in zip(*outputs):\n"
        "        assert torch.equal(a, b), folder\n"
    )
    folders = [(name, "AutoModelForMaskedLM", "AutoModelForSequenceClassification") for name in encoders]
    folders += [(name, "AutoModelForCausalLM", "AutoModel") for name in CAUSAL]
    folders += [("mixer_bert-AutoModelForSequenceClassification", "AutoModelForSequenceClassification", "AutoModel")]
    request = {
        "folders": [(str(made.expected[name].folder), *heads) for name, *heads in folders],
        "blocked": sorted({*made.blocked, *ABSENT}),
        "rows": arbitrary_rows(96),
    }
    done = subprocess.run(
        [sys.executable, "-IB", str(script), fresh_process.__file__, json.dumps(request), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_triton_s_kernels_come_along_and_are_loaded_when_they_run(tmp_path):
    """In the interpreter, because there may be no GPU."""
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        pytest.skip("the interpreter of Triton 3.9 takes no mask made of a vector's and a number's (`v & n`)")
    model = small_model({"name": "hydra", "d_state": 16, "headdim": 16}, num_hidden_layers=1)
    write_folder(exported(model, "AutoModelForMaskedLM", None), tmp_path / "model")
    script = tmp_path / "interpreted.py"
    script.write_text(
        "import runpy, sys\n"
        "common = runpy.run_path(sys.argv[1])\n"
        "common['Blocker'](['anymixer', 'anymixer_kernels'])\n"
        "model, _ = common['load'](sys.argv[2], 'AutoModelForMaskedLM')\n"
        "def loaded():\n"
        "    return [name for name in sys.modules if name.endswith('triton_form')]\n"
        "[before] = common['outputs'](model, [[5, 6, 7, 8, 9]])\n"
        "assert not loaded()\n"
        # transformers 5 may import the code twice: for the configuration, and for the model.
        "for backend in [m for name, m in sys.modules.items() if name.endswith('.kernels_backend')]:\n"
        "    backend.set_backend('triton')\n"
        "[after] = common['outputs'](model, [[5, 6, 7, 8, 9]])\n"
        "assert loaded() and (after - before).abs().max() < 1e-4\n"
    )
    done = subprocess.run(
        [sys.executable, "-IB", str(script), fresh_process.__file__, str(tmp_path / "model")],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*SPECS, *CAUSAL, "stack", "positions"])
def test_the_folder_read_by_this_package_has_the_same_loss(made, name):
    expected = made.expected[name]
    again = type(expected.model).from_pretrained(expected.folder).eval()
    ids = torch.tensor([expected.rows[0][:48]])
    labels = torch.where(torch.arange(48) % 5 == 0, ids, -100)
    with torch.no_grad():
        assert again(ids, labels=labels).loss == expected.model(ids, labels=labels).loss


def test_a_mixer_of_ones_own_is_named_without_its_place(made):
    folder = made.expected["own"].folder
    config = json.loads((folder / "config.json").read_text())
    assert config["mixer"] == {"name": "my_exported_mean"}
    assert config["auto_map"]["AutoModelForMaskedLM"] == "modeling_mixer_bert.MixerBertForMaskedLM"
    assert (folder / "user_my_exported_mean.py").is_file()


def test_a_model_that_generates_says_how(made):
    assert (made.expected["mixer_lm-AutoModelForCausalLM"].folder / "generation_config.json").is_file()


def test_a_language_model_s_folder_works_in_pipelines(tmp_path):
    """Its tokenizer gives what the model takes: no token_type_ids, which a tokenizer of BERT's kind would."""
    import transformers

    from anymixer.data.tokenization import wordpiece_tokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "old", "cat"]
    tokenizer = wordpiece_tokenizer({word: number for number, word in enumerate(words)})
    model = small_model("ssd", "AutoModelForCausalLM", "mixer_lm")
    write_folder(exported(model, "AutoModelForCausalLM", tokenizer), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert set(tokenizer("the old cat", return_tensors="pt")) == {"input_ids", "attention_mask"}
    bare = model_classes("mixer_lm")["AutoModel"].from_pretrained(tmp_path / "model")
    features = transformers.pipeline("feature-extraction", model=bare, tokenizer=tokenizer)("the old cat")
    assert torch.allclose(torch.tensor(features), bare(**tokenizer("the old cat", return_tensors="pt"))[0])
    generator = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert generator("the old", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("the old")


def test_large_weights_are_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("anymixer.export.folder.MAX_SHARD_SIZE", "20KB")
    model = small_model("hydra")
    write_folder(exported(model, "AutoModelForMaskedLM", None), tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    again = type(model).from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    shutil.rmtree(tmp_path / "model")
