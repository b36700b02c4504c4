"""Mixers with a number of state a channel or a few: prompts are read in pieces."""

import pytest
import torch
from mixer_instances import CAUSAL_CASES, D_MODEL, make

from anymixer.layers.packing import make_packing
from anymixer.mixers import linear_recurrent
from anymixer.mixers.linear_recurrent import ElementwiseMixer

CASES = [case for case in CAUSAL_CASES if isinstance(make(*case.values), ElementwiseMixer)]


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_prompt_in_pieces_is_the_whole_prompt(spec, padded, monkeypatch):
    mixer, hidden = make(spec), torch.randn(2, 23, D_MODEL)
    packing = make_packing(torch.arange(23) >= torch.tensor([[0], [9]]), None) if padded else None
    expected, state = mixer.prefill(hidden, packing)
    lengths, scan = [], linear_recurrent.elementwise_scan
    monkeypatch.setattr(linear_recurrent, "SCANNED", 5 * state["recurrence"].numel())
    monkeypatch.setattr(
        linear_recurrent, "elementwise_scan", lambda a, b, **k: lengths.append(a.shape[1]) or scan(a, b, **k)
    )
    output, found = mixer.prefill(hidden, packing)
    assert lengths == [5, 5, 5, 5, 3] and found.keys() == state.keys()
    torch.testing.assert_close(output[0], expected[0])
    torch.testing.assert_close(output[1, 9:], expected[1, 9:])
    for name in state:
        torch.testing.assert_close(found[name], state[name])
