"""A language model's cache in transformers' generation: second turns, prompts of embeddings, and what is refused."""

import copy

import pytest
import torch

from anymixer.models.configuration_mixer_lm import MixerLMConfig
from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM

MIXERS = [
    {"name": "hgrn2", "expand_ratio": 4},
    {"name": "attention", "num_heads": 2, "positions": "rotary"},
    {"name": "dma", "num_heads": 2, "keep_window_size": 6},
]
GREEDY = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}


def make(mixer=MIXERS[0], **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
    return MixerLMForCausalLM(MixerLMConfig(**sizes | options, mixer=mixer)).eval()


def turns(model):
    """Two turns of two rows, the first padded on the left, a mask of both, and the cache after the first."""
    first, second = torch.randint(1, 50, (2, 5)), torch.randint(1, 50, (2, 3))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :2] = 0
    with torch.no_grad():
        return first, second, mask, model(first, attention_mask=mask[:, :5], use_cache=True).past_key_values


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer["name"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_a_second_turn_goes_on_where_the_first_ended(mixer, how):
    model = make(mixer)
    first, second, mask, cache = turns(model)
    both = torch.cat([first, second], 1)
    expected = model.generate(both, attention_mask=mask, **GREEDY, **how)
    if how:
        cache.reorder_cache(torch.arange(2).repeat_interleave(how["num_beams"]))
    found = model.generate(both, attention_mask=mask, past_key_values=cache, **GREEDY, **how)
    assert torch.equal(found, expected)


def test_a_second_turn_alone_is_enough_with_a_mask_of_both():
    model = make()
    first, second, mask, cache = turns(model)
    expected = model.generate(torch.cat([first, second], 1), attention_mask=mask, **GREEDY)
    found = model.generate(second, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(found, expected[:, 5:])


def test_a_cache_stays_as_it_was_when_it_is_continued():
    model = make(MIXERS[1])
    first, second, mask, cache = turns(model)
    before = copy.deepcopy(cache.states)
    model.generate(torch.cat([first, second], 1), attention_mask=mask, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 5
    for old, new in zip(before, cache.states):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_nothing_new_to_read_is_said():
    model = make()
    first, _, mask, cache = turns(model)
    with pytest.raises(ValueError, match="past_key_values: of 5 tokens 0 follow the 5 that it has seen"):
        model.generate(first, attention_mask=mask[:, :5], past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer["name"])
def test_embeddings_are_continued_as_their_tokens_are(mixer):
    model = make(mixer)
    ids = torch.randint(1, 50, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)[:, 5:]
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY), expected)


def test_padding_after_a_cache_is_refused():
    model = make()
    _, second, mask, cache = turns(model)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="attention_mask: a token that follows past_key_values is masked"):
        model(second, attention_mask=mask, past_key_values=cache)


def test_learned_positions_end_with_a_message():
    model = make(position_embeddings="learned", max_position_embeddings=8)
    ids = torch.randint(1, 50, (1, 5))
    assert model.generate(ids, **GREEDY).shape == (1, 9)  # the last token is not read
    with pytest.raises(ValueError, match="9 tokens, but max_position_embeddings is 8"):
        model.generate(ids, **GREEDY | {"max_new_tokens": 5})


def test_a_mask_that_transformers_leaves_out_is_not_missed():
    """As newer versions do where it hides nothing."""
    model = make()
    first, second, _, cache = turns(model)
    both, embeddings = torch.cat([first, second], 1), model.get_input_embeddings()(first)
    read = model.prepare_inputs_for_generation
    assert torch.equal(read(first)["input_ids"], first)
    assert read(first[:, :0], inputs_embeds=embeddings, is_first_iteration=True)["inputs_embeds"] is embeddings
    new = second.shape[1]
    for tokens, length in ((both, new), (second, None)):
        inputs = read(tokens, past_key_values=cache, next_sequence_length=length)
        assert torch.equal(inputs["input_ids"], second) and inputs["attention_mask"] is None


def test_a_prompt_without_padding_is_read_without_a_mask():
    model = make()
    masks = []
    model.model.register_forward_pre_hook(lambda module, arguments: masks.append(arguments[1]))
    ids = torch.randint(1, 50, (2, 5))
    model.generate(ids, **GREEDY)
    assert masks == [None] * 4
    masks.clear()
    padded = torch.ones_like(ids)
    padded[0, 0] = 0
    model.generate(ids, attention_mask=padded, **GREEDY)
    assert torch.equal(masks[0], padded) and masks[1:] == [None] * 3


def test_a_cache_says_what_it_is():
    cache = turns(make())[3]
    assert repr(cache) == f"MixerCache(2 layers, 5 positions, {cache.num_bytes()} bytes)" and len(cache) == 2
