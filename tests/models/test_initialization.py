"""The values of parameters that no checkpoint has."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from anymixer.models import MixerBertConfig, MixerBertForMaskedLM
from anymixer.models.configuration_mixer_lm import MixerLMConfig
from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM

EXPERTS = {"name": "cdmoe", "intermediate_size": 16, "num_experts": 1024, "retrieval_dim": 32}
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "channel_mixer": EXPERTS}


@pytest.mark.parametrize("lacking", [("keys", "expert_down", "expert_up"), ("expert_up",)])
@pytest.mark.parametrize(
    ("cls", "config"), [(MixerBertForMaskedLM, MixerBertConfig), (MixerLMForCausalLM, MixerLMConfig)]
)
def test_experts_that_a_checkpoint_lacks_are_drawn(cls, config, lacking, tmp_path):
    cls(config(mixer={"name": "attention", "num_heads": 2}, **SMALL)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if name.rpartition(".")[2] not in lacking}
    save_file(kept, file, metadata={"format": "pt"})
    layer = cls.from_pretrained(tmp_path).base_model.backbone.layers[0]
    for name in lacking:
        drawn = layer.channel.mixer.get_parameter(name)
        expected = 16**-0.5 if name == "keys" else 0.02
        assert drawn.std().item() == pytest.approx(expected, rel=0.1) and drawn.mean().abs() < 0.1 * expected


def test_experts_of_two_layers_are_not_alike():
    model = MixerBertForMaskedLM(MixerBertConfig(mixer="hydra", **SMALL | {"num_hidden_layers": 2}))
    first, second = (layer.channel.mixer for layer in model.bert.backbone.layers)
    assert not torch.equal(first.keys, second.keys) and not torch.equal(first.expert_up, second.expert_up)
