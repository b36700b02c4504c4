"""What mamba-ssm's scan computes, as a loop over tokens that runs anywhere: its kernels run on GPUs alone."""

import pytest
import torch
from anymixer_kernels import mamba_ssm_scan

CALLS = []


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """With mamba-ssm's arguments: x [b, l, h, p], dt [b, l, h], A [h], B and C [b, l, g, n], initial_states
    [b, h, p, n], seq_idx int32 [b, l]; only the sequence of number 0 begins from initial_states."""
    batch, length, nheads, headdim = x.shape
    ngroups, d_state = B.shape[2:]
    assert B.shape == C.shape == (batch, length, ngroups, d_state) and dt.shape == x.shape[:3] and A.shape == (nheads,)
    assert D is None and z is None and dt_bias is None and cu_seqlens is None and not dt_softplus
    assert not return_varlen_states and dt_limit == (0.0, float("inf"))
    assert chunk_size >= 16 and chunk_size & (chunk_size - 1) == 0
    assert x.dtype == B.dtype == C.dtype
    if seq_idx is not None:
        assert seq_idx.shape == (batch, length) and seq_idx.dtype == torch.int32 and int(seq_idx.min()) >= 0
        assert seq_idx.is_contiguous()
    CALLS.append(chunk_size)
    B, C = (t.repeat_interleave(nheads // ngroups, dim=2) for t in (B, C))
    state = x.new_zeros(batch, nheads, headdim, d_state, dtype=dt.dtype) if initial_states is None else initial_states
    rows = []
    for t in range(length):
        if seq_idx is not None:
            before = seq_idx[:, t - 1] if t else torch.zeros_like(seq_idx[:, 0])
            state = torch.where((seq_idx[:, t] == before)[:, None, None, None], state, 0.0)
        state = torch.exp(dt[:, t] * A)[..., None, None] * state
        state = state + dt[:, t, :, None, None] * x[:, t, ..., None] * B[:, t, :, None, :]
        rows.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(rows, dim=1).to(x.dtype)
    return (y, state) if return_final_states else y


@pytest.fixture
def mamba_ssm(monkeypatch):
    """mamba-ssm as if it were installed and ran here; the chunk sizes that it is called with."""
    CALLS.clear()
    monkeypatch.setattr(mamba_ssm_scan, "scan_function", lambda: mamba_chunk_scan_combined)
    monkeypatch.setattr("anymixer_kernels.backend.mamba_ssm_problem", lambda device: None)
    return CALLS
