"""The causal language model: padding, cache and generation."""

import pytest
import torch
import transformers

from anymixer.errors import UserError
from anymixer.layers.packing import make_packing
from anymixer.models.configuration_mixer_lm import MixerLMConfig
from anymixer.models.model_config import ModelConfig
from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM, MixerLMModel

# transformers 4.56 renamed torch_dtype.
DTYPE = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
ATTENTION = {"name": "attention", "num_heads": 2, "positions": "rotary"}


def make(**options):
    torch.manual_seed(0)
    config = MixerLMConfig(
        **{"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "mixer": ATTENTION, "pad_token_id": 0} | options
    )
    return MixerLMForCausalLM(config).eval()


def rows():
    """A long prompt, and a short one padded on the left."""
    ids = torch.randint(1, 50, (2, 7))
    ids[1, :3] = 0
    mask = (ids > 0).long()
    mask[0] = 1
    return ids, mask


@pytest.mark.parametrize("options", [{}, {"position_embeddings": "learned", "residual_weights": True}])
def test_padding_on_the_left_changes_nothing(options):
    model = make(**options)
    ids, mask = rows()
    padded = model(ids, attention_mask=mask).logits[1, 3:]
    torch.testing.assert_close(padded, model(ids[1:, 3:]).logits[0], rtol=1e-5, atol=1e-5)


def test_loss_is_that_of_the_next_token_and_spares_the_head():
    model = make()
    ids = torch.randint(1, 50, (2, 7))
    labels = ids.clone()
    labels[:, 0] = labels[0, 4] = -100
    output = model(ids, labels=labels)
    logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 50), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, expected)
    assert output.logits.shape == (11, 50)


@pytest.mark.parametrize("options", [{}, {"position_embeddings": "learned"}])
def test_cached_steps_give_the_logits_of_the_whole_row(options):
    model = make(**options)
    ids, mask = rows()
    more = torch.randint(1, 50, (2, 3))
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    stepped = model(more, past_key_values=cache).logits
    whole = model(torch.cat([ids, more], 1), attention_mask=torch.cat([mask, torch.ones(2, 3)], 1)).logits[:, 7:]
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generation_with_and_without_cache_agree(how):
    model = make(initializer_range=0.3)
    ids, mask = rows()
    options = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0, **how}
    results = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        results.append(model.generate(ids, use_cache=use_cache, **options))
    assert torch.equal(*results) and results[0].shape == (2, 13)


def test_batched_prompts_continue_as_they_would_alone():
    model = make(initializer_range=0.3)
    ids, mask = rows()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0)
    alone = model.generate(ids[1:, 3:], max_new_tokens=5, pad_token_id=0)
    assert torch.equal(together[1, 7:], alone[0, 4:])


def test_a_bidirectional_mixer_is_refused():
    for mixer, message in (
        ("hydra", "mixer.name: 'hydra' lets"),
        ({**ATTENTION, "causal": False}, "mixer.causal: false lets"),
    ):
        with pytest.raises(UserError, match=message):
            make(mixer=mixer)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    again = MixerLMForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 50, (1, 5))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.lm_head.weight is again.model.word.weight


def test_channel_mixers_cycle_over_the_layers_like_mixers(tmp_path):
    model = make(num_hidden_layers=3, channel_mixer=[None, {"name": "mlp", "intermediate_size": 8}])
    assert [layer.channel is None for layer in model.model.backbone.layers] == [True, False, True]
    model.save_pretrained(tmp_path)
    again, ids = MixerLMForCausalLM.from_pretrained(tmp_path).eval(), torch.randint(1, 50, (1, 5))
    assert torch.equal(again(ids).logits, model(ids).logits)
    for wrong, message in ((["mlp", "mpl"], r"\[1\].name: unknown channel mixer 'mpl'"), ([], ": an empty list")):
        with pytest.raises(UserError, match=f"^model.model_config.channel_mixer{message}"):
            ModelConfig(name="causal_lm", mixer=ATTENTION, model_config={"channel_mixer": wrong}).validate()


@pytest.mark.parametrize("mixer", ["s4d", "s4"])
def test_a_state_space_model_loads_in_bfloat16_with_what_it_has_in_float32(tmp_path, mixer):
    model = make(mixer={"name": mixer, "d_state": 16}, initializer_range=0.3)
    model.save_pretrained(tmp_path)
    half = MixerLMForCausalLM.from_pretrained(tmp_path, **{DTYPE: torch.bfloat16}).eval()
    ids = torch.randint(1, 50, (1, 300))
    with torch.no_grad():
        expected, found = model(ids).logits, half(ids).logits
        assert torch.equal(found, model.to(torch.bfloat16)(ids).logits)
    assert found.dtype == half.lm_head.weight.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    "mixer",
    [
        {"name": "ssd", "d_state": 8, "headdim": 8},
        {"name": "hgrn2", "expand_ratio": 8},
        [{"name": "linear_attention", "num_heads": 2, "feature_dim": 4}, ATTENTION],
    ],
    ids=["ssd", "hgrn2", "hybrid"],
)
def test_recurrent_models_generate_as_they_compute(mixer):
    model = make(mixer=mixer, initializer_range=0.3)
    ids, mask = rows()
    cached, whole = (
        model.generate(ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, whole)


def test_tokens_stream_out_as_they_are_generated():
    class Heard:
        def __init__(self):
            self.put_ids, self.ended = [], False

        def put(self, value):
            self.put_ids.append(value.reshape(-1).tolist())

        def end(self):
            self.ended = True

    heard, model = Heard(), make(mixer={"name": "hgrn2", "expand_ratio": 8})
    ids = torch.randint(1, 50, (1, 4))
    whole = model.generate(ids, max_new_tokens=3, pad_token_id=0, streamer=heard)
    assert heard.put_ids == [ids[0].tolist(), *([token] for token in whole[0, 4:].tolist())] and heard.ended


def test_lower_bounds_grow_with_depth_and_are_learned_once():
    model = make(mixer={"name": "hgrn2", "expand_ratio": 8}, num_hidden_layers=4)
    bounds = model.model.backbone.shared["hgrn2"]
    torch.testing.assert_close(torch.stack([bounds(i) for i in range(4)])[:, 0], torch.arange(4) / 4)
    assert sum(name.endswith("hgrn2.weight") for name, _ in model.named_parameters()) == 1
    ids = torch.randint(1, 50, (1, 9))
    model(ids, labels=ids).loss.backward()
    assert bounds.weight.grad.abs().sum() > 0


def test_the_bare_model_of_a_saved_language_model_gives_its_states(tmp_path):
    model = make(position_embeddings="learned")
    model.save_pretrained(tmp_path)
    bare = MixerLMModel.from_pretrained(tmp_path).eval()
    ids, mask = rows()
    states = bare(ids, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(model.lm_head(states.last_hidden_state), model(ids, attention_mask=mask).logits)
    assert torch.equal(states.hidden_states[-1], states.last_hidden_state) and len(states.hidden_states) == 3
    assert torch.equal(bare(ids, attention_mask=mask, return_dict=False)[0], states.last_hidden_state)


def test_attentions_are_the_matrices_that_the_layers_apply():
    model = make()
    ids, mask = rows()
    output = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2 and output.attentions[0].shape == (2, 2, 7, 7)
    layer, before = model.model.backbone.layers[0].sequence, output.hidden_states[0]
    inner, packing = layer.norm(before), make_packing(mask, None)
    after = before + layer.mixer.output(output.attentions[0] @ layer.mixer.values(inner, packing), inner, packing)
    torch.testing.assert_close(after[mask.bool()], output.hidden_states[1][mask.bool()], rtol=1e-4, atol=1e-5)
    assert not output.attentions[0].triu(1).any()


def test_what_only_whole_rows_give_is_not_asked_of_a_cache():
    model = make()
    with pytest.raises(ValueError, match="output_attentions, output_hidden_states: not with a cache"):
        model(rows()[0], use_cache=True, output_attentions=True)
