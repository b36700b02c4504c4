"""Every masking scheme against the definition of its recipe, on random rows."""

import numpy as np
import pytest

from anymixer.data import maskings
from anymixer.data.masking import Vocabulary
from anymixer.data.words import WordMarks
from anymixer.errors import UserError
from anymixer.labels import IGNORED_LABEL

MASK, CLS, SEP, FIRST, VOCAB = 4, 2, 3, 5, 5000
CONTINUES = np.arange(VOCAB) % 3 == 2  # a third of the ids continue a word
CONTINUES[:FIRST] = False
SCHEMES = [name for name in maskings.names() if name != "causal_lm"]


def build(spec, probability=0.3):
    cls, options = maskings.parse(spec, "masking")
    options.validate("masking", probability)
    special = np.arange(VOCAB) < FIRST
    marks = WordMarks(CONTINUES, np.zeros(VOCAB, bool))
    return cls(options, probability, Vocabulary(VOCAB, MASK, special, lambda: marks))


def packed_row(rng, length=2048):
    """A row of [CLS] ... [SEP] sequences of 3 to 200 tokens, and where each starts."""
    token_ids, starts = [], []
    while len(token_ids) < length:
        words = rng.integers(FIRST, VOCAB, rng.integers(1, 199)).tolist()
        starts += [True] + [False] * (len(words) + 1)
        token_ids += [CLS, *words, SEP]
    return np.array(token_ids[:length]), np.array(starts[:length])


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(1)
    return [packed_row(rng) for _ in range(100)]


def masked(spec, rows, probability=0.3, seed=0):
    """(token ids, starts, input ids, labels) of all rows, end to end."""
    masking = build(spec, probability)
    parts = [
        (ids, starts, *masking(ids, starts, np.random.default_rng((seed, n)))) for n, (ids, starts) in enumerate(rows)
    ]
    return [np.concatenate(part) for part in zip(*parts)]


def shares(token_ids, inputs, chosen):
    """Of the chosen: share hidden, and share replaced by something else."""
    hidden = inputs[chosen] == MASK
    return hidden.mean(), (~hidden & (inputs[chosen] != token_ids[chosen])).mean()


@pytest.mark.parametrize(
    ("scheme", "rate", "hidden", "replaced"),
    [
        ("bert", 0.3, 0.8, 0.1),
        ("whole_word", 0.3, 0.8, 0.1),
        ("span", 0.3, 0.8, 0.1),
        ("all_mask", 0.3, 1.0, 0.0),
        ("neobert", 0.2, 1.0, 0.0),
        ({"name": "bert", "probability": 0.5, "mask_share": 0.6, "random_share": 0.4}, 0.5, 0.6, 0.4),
    ],
)
def test_rates_are_those_of_the_recipe(rows, scheme, rate, hidden, replaced):
    token_ids, _, inputs, labels = masked(scheme, rows)
    chosen, ordinary = labels != IGNORED_LABEL, token_ids >= FIRST
    assert chosen[ordinary].mean() == pytest.approx(rate, abs=0.01)
    # A replacement is the token itself once in 5,000 times.
    assert shares(token_ids, inputs, chosen) == pytest.approx((hidden, replaced), abs=0.015)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_special_and_unchosen_tokens_stay_and_labels_are_the_originals(rows, scheme):
    token_ids, _, inputs, labels = masked(scheme, rows)
    chosen = labels != IGNORED_LABEL
    assert not chosen[token_ids < FIRST].any()
    assert (inputs[~chosen] == token_ids[~chosen]).all()
    assert (labels[chosen] == token_ids[chosen]).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_masks_follow_the_generator_alone_and_the_row_is_not_changed(rows, scheme):
    (ids, starts), masking = rows[0], build(scheme)
    before = ids.copy()
    first, again, other = (masking(ids, starts, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[1] != other[1]).any()
    assert (ids == before).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_place_has_the_same_chance(scheme):
    """Also the first and the last of a sequence, whatever the lengths around it."""
    ids = np.array([CLS, *range(10, 22), SEP, CLS, 30, 31, SEP, CLS, *range(40, 44), SEP])
    starts = ids == CLS
    masking, draws = build(scheme), 8000
    rng = np.random.default_rng(0)
    counts = sum((masking(ids, starts, rng)[1] != IGNORED_LABEL).astype(int) for _ in range(draws))
    rate = 0.2 if scheme == "neobert" else 0.3
    assert counts[ids >= FIRST] / draws == pytest.approx(rate, abs=5 * np.sqrt(rate * (1 - rate) / draws))


def words_of(token_ids):
    """Word numbers by a plain loop."""
    numbers, current = [], -1
    for place, token in enumerate(token_ids):
        previous = token_ids[place - 1] if place else CLS
        if not (CONTINUES[token] and previous >= FIRST):
            current += 1
        numbers.append(current)
    return np.array(numbers)


@pytest.mark.parametrize("scheme", ["whole_word", "span"])
def test_a_word_is_chosen_whole_or_not_at_all(rows, scheme):
    masking = build(scheme)
    for number, (ids, starts) in enumerate(rows[:20]):
        chosen = masking(ids, starts, np.random.default_rng(number))[1] != IGNORED_LABEL
        for word in np.split(chosen, np.flatnonzero(np.diff(words_of(ids))) + 1):
            assert word.all() or not word.any()


def spans(chosen, words, stretch):
    """Length in words of every run of chosen words that ends inside its stretch."""
    first = np.flatnonzero(np.diff(words, prepend=-1))
    chosen, stretch = chosen[first], stretch[first]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
    for begin, end in zip(edges[::2], edges[1::2]):
        if end < len(stretch) and stretch[end] == stretch[begin]:
            yield end - begin


def test_span_lengths_are_geometric(rows):
    lengths = []
    masking = build({"name": "span", "mean_length": 3.8}, probability=0.15)
    for number, (ids, starts) in enumerate(rows):
        chosen = masking(ids, starts, np.random.default_rng(number))[1] != IGNORED_LABEL
        stretch = np.cumsum((ids < FIRST) | np.concatenate([[True], ids[:-1] < FIRST]))
        lengths += spans(chosen, words_of(ids), stretch)
    # Geometric: however long a span is already, it goes on with the same probability. Spans cut by an end are
    # not counted, which takes a little from the long ones.
    lengths = np.array(lengths)
    for length in range(1, 9):
        reached = lengths[lengths >= length]
        goes_on = 1 - 1 / 3.8
        error = 5 * np.sqrt(goes_on * (1 - goes_on) / len(reached))
        assert (reached > length).mean() == pytest.approx(goes_on, abs=error + 0.01)
    assert np.mean(lengths) == pytest.approx(3.8, rel=0.1)


def test_a_span_shares_one_fate_and_ends_with_its_sequence(rows):
    masking = build({"name": "span", "mean_length": 20.0, "random_share": 0.0, "mask_share": 0.5}, probability=0.5)
    joined = boundaries = 0
    for number, (ids, starts) in enumerate(rows):
        inputs, labels = masking(ids, starts, np.random.default_rng(number))
        chosen, hidden = labels != IGNORED_LABEL, inputs == MASK
        both = chosen[1:] & chosen[:-1]
        assert (hidden[1:] == hidden[:-1])[both].all()
        # The states on the two sides of a boundary ([SEP], [CLS]) are independent.
        ends = np.flatnonzero(ids[:-3] == SEP)
        ends = ends[ends > 0]
        boundaries += len(ends)
        joined += int((chosen[ends - 1] & chosen[ends + 2]).sum())
    assert joined / boundaries == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / boundaries))


def test_sequences_without_special_tokens_are_kept_apart():
    """As causal models' tokenizers have it: the boundary is in the lengths alone."""
    ids, starts = np.full(4000, 6), np.arange(4000) % 10 == 0
    masking = build({"name": "span", "mean_length": 9.0}, probability=0.5)
    chosen = masking(ids, starts, np.random.default_rng(0))[1] != IGNORED_LABEL
    assert (chosen[9:-1:10] == chosen[10::10]).mean() == pytest.approx(0.5, abs=0.1)
    assert (chosen[4:-1:10] == chosen[5::10]).mean() > 0.8


def test_causal_labels_are_the_ids_but_for_the_first_of_each_sequence(rows):
    for ids, starts in rows[:10]:
        inputs, labels = build("causal_lm")(ids, starts, np.random.default_rng(0))
        assert (inputs == ids).all()
        assert (labels[starts] == IGNORED_LABEL).all() and (labels[~starts] == ids[~starts]).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("brt", r"masking\.name: unknown masking 'brt'; did you mean 'bert'"),
        ({"name": "bert", "probabilty": 0.1}, r"masking\.probabilty: unknown key"),
        ({"name": "bert", "probability": 1.5}, r"masking\.probability: 1\.5 is not between"),
        ({"name": "bert", "mask_share": 0.95}, r"masking\.mask_share"),
        ({"name": "span", "mean_length": 1.0}, r"masking\.mean_length: 1\.0 words"),
        ({"name": "causal_lm", "probability": 0.1}, r"masking\.probability: unknown key"),
    ],
)
def test_impossible_options_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        build(spec)
