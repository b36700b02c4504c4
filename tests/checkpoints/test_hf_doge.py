"""Hugging Face's Doge computes the same in our model."""

import pytest
import torch

from anymixer.checkpoints.hf_doge import convert_config, convert_weights
from anymixer.checkpoints.renaming import UnknownNames
from anymixer.errors import UserError
from anymixer.export.import_checkpoint import import_checkpoint

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def imported(folder, out):
    """What was said, and the imported model as main.py's `pretrained_checkpoint` would load it."""
    from anymixer.config import load_config
    from anymixer.models import build_model

    said = import_checkpoint(str(folder), out)
    return said, build_model(load_config(out / "config.yaml").model).eval()


@pytest.fixture
def make_doge(tmp_path):
    doge = pytest.importorskip("transformers.models.doge", reason="transformers 4.53 has no Doge")

    def make(**options):
        torch.manual_seed(0)
        # With sdpa, rows without padding see the future there (5.17): the bias takes the place of a mask.
        config = doge.DogeConfig(**SIZES | options, attn_implementation="eager")
        model = doge.DogeForCausalLM(config).eval()
        for p in model.parameters():
            p.data.add_(0.2 * torch.randn_like(p))
        model.tie_weights()
        model.save_pretrained(tmp_path / "doge")
        return model, tmp_path / "doge"

    return make


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_window_size": 5},
        {"tie_word_embeddings": True, "num_key_value_heads": None, "num_hidden_layers": 1},
        {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    ],
    ids=["dense", "sparse", "tied", "biases"],
)
def test_logits_are_the_original_s(make_doge, options):
    original, folder = make_doge(**options)
    said, ours = imported(folder, folder.parent / "out")
    assert said[0].startswith(f"{folder}: a Hugging Face Doge, ")
    assert said[1].startswith("logits agree with those of transformers' DogeForCausalLM: largest difference ")
    # Different tokens: of equal keys transformers keeps any, and ours the later.
    ids = torch.stack([torch.randperm(59)[:40] + 1 for _ in range(2)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        difference = (ours(ids, attention_mask=mask).logits - original(ids, attention_mask=mask).logits)[mask.bool()]
    assert difference.abs().max() < 1e-4
    if "keep_window_size" in options:
        return  # which generates tokens that were there before
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids[:1], **greedy), original.generate(ids[:1], **greedy))


def test_weights_of_something_else_are_refused(make_doge):
    original, _ = make_doge()
    state = original.state_dict()
    with pytest.raises(UnknownNames, match=r"half a projection.*only model.layers.0.self_attn.q_proj.weight, model"):
        convert_weights({k: v for k, v in state.items() if "layers.0.self_attn.k_proj" not in k})
    with pytest.raises(UnknownNames):
        convert_weights(state | {"model.layers.0.mlp.router_gate.weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_moe": True}, "is_moe: its experts are chosen by other tokens"),
        ({"sliding_window": 8}, "sliding_window: 8"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type: yarn"),
        ({"head_dim": 64}, "head_dim: 64 is not"),
        ({"model_type": "llama"}, "model_type llama"),
    ],
)
def test_what_ours_does_not_compute_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        convert_config(SIZES | options)


def test_configurations_of_both_versions_of_transformers_are_read():
    four = convert_config(SIZES | {"rope_theta": 5.0, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}})
    five = convert_config(SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}})
    assert four.mixer == five.mixer and four.mixer["rotary_theta"] == 5.0
    assert (four.tie_word_embeddings, four.mixer["keep_window_size"]) == (False, 2048)


def test_weights_that_do_not_fit_their_configuration_are_one_line(make_doge):
    import json

    _, folder = make_doge()
    config = json.loads((folder / "config.json").read_text())
    for key, value, message in (
        ("vocab_size", 61, r"does not fit its configuration: 2 of another shape \(lm_head.weight: \[60, 32\] for"),
        ("num_hidden_layers", 3, "does not fit its configuration: .* missing"),
        ("tie_word_embeddings", True, "decoder and word embeddings differ"),
        ("is_moe", True, "Doge\\): is_moe: its experts"),
        ("model_type", "llama", "model_type llama, not doge"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=message) as caught:
            import_checkpoint(str(folder), folder.parent / "out")
        assert str(caught.value).startswith(f"SOURCE: {folder}") and "\n" not in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == ["doge"]


def published_state(model):
    """Weights by Doge's names for one of ours: the inverse of the conversion, written out."""
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("model.backbone.layers.", "model.layers.").replace(".sequence.mixer.", ".self_attn.")
        name = name.replace("model.word.", "model.embed_tokens.").replace("model.backbone.final_norm.", "model.norm.")
        name = name.replace(".sequence.norm.", ".input_layernorm.").replace(
            ".channel.norm.", ".post_attention_layernorm."
        )
        name = name.replace(".sequence.weight", ".input_residual").replace(
            ".channel.weight", ".post_attention_residual"
        )
        name = name.replace(".self_attn.out_proj.", ".self_attn.o_proj.").replace(
            ".channel.mixer.down.", ".mlp.down_proj."
        )
        if ".qkv_proj." in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), value.split([32, 16, 16]))
            state |= {name.replace("qkv_proj", part): rows for part, rows in parts}
        elif ".channel.mixer.gate_up." in name:
            parts = zip(("gate_proj", "up_proj"), value.chunk(2))
            state |= {name.replace("channel.mixer.gate_up", f"mlp.{part}"): rows for part, rows in parts}
        else:
            state[name] = value
    return state


def test_without_the_original_s_code_it_is_said_and_the_weights_are_taken(tmp_path, monkeypatch):
    import json
    import sys

    from anymixer.models import MixerLMForCausalLM

    torch.manual_seed(0)
    model = MixerLMForCausalLM(convert_config(SIZES)).eval()
    torch.save(published_state(model), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "doge"}))
    monkeypatch.setitem(sys.modules, "transformers.models.doge", None)
    said, ours = imported(tmp_path, tmp_path / "out")
    assert said[1] == (
        "logits not compared: this transformers has no code for a Hugging Face Doge, and the file records none"
    )
    ids = torch.randint(60, (2, 9))
    assert torch.equal(ours(ids).logits, model(ids).logits)
