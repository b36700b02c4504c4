"""ONNX files of every encoder mixer, computed by onnxruntime."""

import pytest
import torch
from mixer_instances import CASES

from anymixer.errors import UserError
from anymixer.export.onnx_model import write_onnx
from anymixer.export.sample_rows import arbitrary_rows
from anymixer.mixers import mixers
from anymixer.models import ModelConfig, build_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FIRST = {case.values[0]["name"]: case.values[0] for case in reversed(CASES)}
ENCODERS = [name for name, spec in FIRST.items() if not mixers.parse(spec, "mixer")[1].is_causal()]
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1}


def small_model(spec):
    torch.manual_seed(0)
    model = build_model(ModelConfig(mixer=spec, model_config=SIZES)).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_onnxruntime_gives_the_models_logits(name, tmp_path):
    """At three batch sizes and lengths, one of them a single token, and with padding."""
    file = tmp_path / "model.onnx"
    assert write_onnx(small_model(FIRST[name]), file, arbitrary_rows(96)) <= 1e-4
    written = onnx.load(file, load_external_data=False)
    assert next(entry.version for entry in written.opset_import if entry.domain == "") >= 18
    for tensor in written.graph.input:
        assert all(dim.dim_param for dim in tensor.type.tensor_type.shape.dim)


def test_a_mixer_that_cannot_says_why(tmp_path):
    from anymixer.mixers import SequenceMixer

    class Loop(SequenceMixer):
        def forward(self, hidden_states, packing=None):
            return torch.stack([token.cumsum(-1) for token in hidden_states.unbind(1)], dim=1)

    model = small_model({"name": "attention", "num_heads": 4})
    model.bert.backbone.layers[0].sequence.mixer = Loop()
    with pytest.raises(UserError, match="it takes as many steps as there are tokens") as caught:
        write_onnx(model, tmp_path / "model.onnx", arbitrary_rows(96))
    assert "\n" not in str(caught.value)


def test_without_its_packages_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match="--onnx: needs onnxscript: pip install 'anymixer\\[onnx\\]'"):
        write_onnx(small_model({"name": "attention", "num_heads": 4}), tmp_path / "model.onnx", [[1, 2]])
