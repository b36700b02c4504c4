import numpy as np

from anymixer.data import mask_tokens, sequence_ids
from anymixer.labels import IGNORED_LABEL

MASK, VOCAB = 4, 5000


def masked(seed: int = 0, probability: float = 0.3):
    token_ids = np.random.default_rng(1).integers(5, VOCAB, size=(200, 512))
    never = np.zeros_like(token_ids, dtype=bool)
    never[:, ::7] = True
    inputs, labels = mask_tokens(
        token_ids,
        probability=probability,
        mask_token_id=MASK,
        vocab_size=VOCAB,
        never_masked=never,
        rng=np.random.default_rng(seed),
    )
    return token_ids, never, inputs, labels


def test_rates_are_those_of_bert():
    token_ids, never, inputs, labels = masked()
    chosen = labels != IGNORED_LABEL
    assert abs(chosen[~never].mean() - 0.3) < 0.005
    assert abs((inputs[chosen] == MASK).mean() - 0.8) < 0.01
    assert abs((inputs[chosen] == token_ids[chosen]).mean() - 0.1) < 0.01


def test_special_tokens_and_unchosen_tokens_stay():
    token_ids, never, inputs, labels = masked()
    chosen = labels != IGNORED_LABEL
    assert not chosen[never].any()
    assert (inputs[~chosen] == token_ids[~chosen]).all()
    assert (labels[chosen] == token_ids[chosen]).all()


def test_masks_follow_the_generator_alone():
    first, again, other = masked(3), masked(3), masked(4)
    assert (first[2] == again[2]).all() and (first[3] == again[3]).all()
    assert (first[3] != other[3]).any()


def test_the_input_is_not_changed():
    token_ids = np.full(64, 9)
    never = np.zeros(64, bool)
    rng = np.random.default_rng(0)
    mask_tokens(token_ids, probability=0.9, mask_token_id=4, vocab_size=10, never_masked=never, rng=rng)
    assert (token_ids == 9).all()


def test_a_sequence_holds_its_end_token():
    ids = np.array([2, 7, 3, 8, 8, 3, 9, 0])
    mask = np.array([1, 1, 1, 1, 1, 1, 1, 0])
    assert sequence_ids(ids, mask, eos_token_id=3).tolist() == [0, 0, 0, 1, 1, 1, 2, -1]


def test_a_sequence_holds_its_begin_token():
    ids = np.array([2, 7, 2, 8, 8, 2, 9, 0])
    mask = np.array([1, 1, 1, 1, 1, 1, 1, 0])
    assert sequence_ids(ids, mask, bos_token_id=2).tolist() == [0, 0, 1, 1, 1, 2, 2, -1]
    assert sequence_ids(ids[1:], mask[1:], bos_token_id=2).tolist() == [0, 1, 1, 1, 2, 2, -1]
