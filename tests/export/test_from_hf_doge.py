"""Hugging Face's Doge computes the same in our model."""

import pytest
import torch

from anymixer.errors import UserError
from anymixer.export.from_hf_doge import convert_config, convert_weights, load_hf_doge
from anymixer.export.renaming import UnknownNames

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


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
        model.save_pretrained(tmp_path)
        return model, tmp_path

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
    ours = load_hf_doge(str(folder))
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


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="SOURCE: "):
        load_hf_doge(str(tmp_path))
