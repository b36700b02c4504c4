"""Blocks whose core runs by mamba-ssm's scan (a stand-in for it) against the same blocks by PyTorch's forms."""

import pytest
import torch
from anymixer_kernels import force_backend
from mamba_ssm_stand_in import mamba_ssm  # noqa: F401
from triton_cases import packed_ids

from anymixer.layers.packing import Packing
from anymixer.mixers import build_mixer

SPECS = {
    "hydra": {"name": "hydra", "d_state": 4, "headdim": 8, "ngroups": 2},
    "hydra without shift": {"name": "hydra", "d_state": 4, "headdim": 8, "shift": False, "dt_limit": [0.01, 0.05]},
    "hydra with states": {"name": "hydra", "d_state": 4, "headdim": 8, "learnable_init_states": True},
    "ssd": {"name": "ssd", "d_state": 4, "headdim": 8, "ngroups": 2},
    "rotary ssd": {"name": "ssd", "d_state": 4, "headdim": 8, "rotary": True, "gate": False},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_block_equals_itself_by_pytorch(spec, packed, mamba_ssm):  # noqa: F811
    torch.manual_seed(0)
    block = build_mixer(spec, 16)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(2, 23, 16)
    ids = packed_ids(23)
    packing = Packing(ids, packed=True) if packed else None
    real = (ids >= 0)[..., None] if packed else torch.ones(2, 23, 1, dtype=torch.bool)
    results = []
    for backend in ("torch", "mamba_ssm"):
        block.zero_grad()
        with force_backend(backend):
            y = torch.where(real, block(hidden, packing), 0.0)
        y.square().mean().backward()
        results.append([y, *(p.grad for p in block.parameters())])
    assert mamba_ssm
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-6)


def test_a_prompt_is_read_by_it_and_continued_token_by_token(mamba_ssm):  # noqa: F811
    torch.manual_seed(0)
    block = build_mixer(SPECS["ssd"], 16).double().float().eval()
    hidden = torch.randn(2, 9, 16)
    with torch.no_grad(), force_backend("mamba_ssm"):
        whole = block(hidden)
        first, state = block.prefill(hidden[:, :8])
        last, _ = block.step(hidden[:, 8], state)
    torch.testing.assert_close(torch.cat([first, last[:, None]], dim=1), whole, rtol=1e-4, atol=1e-5)
