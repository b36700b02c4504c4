"""Small instances of every registered mixer, for tests that enumerate the registry."""

import pytest
import torch

from anymixer.mixers import build_mixer, mixers

D_MODEL = 32
SMALL = {"qk_dim": 4, "headdim": 16}
FIXED = {"qk_dim": 4, "headdim": 16, "is_data_dependent": False, "max_seq_len": 200}
# One small instance per mixer, and further ones whose options take another path through it.
OPTIONS = {
    "hydra": [
        {"d_state": 8, "headdim": 16},
        {"d_state": 4, "headdim": 8, "ngroups": 2, "d_conv": 3, "learnable_init_states": True},
        {"d_state": 8, "headdim": 16, "shift": False},
        {"d_state": 8, "headdim": 16, "free_diagonal": False},
        {"d_state": 8, "headdim": 16, "shift": False, "free_diagonal": False, "learnable_init_states": True},
    ],
    "attention": [
        {"num_heads": 4},
        {"num_heads": 4, "positions": "rotary"},
        {"num_heads": 4, "positions": "alibi"},
        {"num_heads": 4, "causal": True},
        {"num_heads": 4, "causal": True, "positions": "rotary", "num_kv_heads": 2, "qk_norm": True},
        {"num_heads": 4, "causal": True, "positions": "alibi"},
    ],
    "dense": [{"headdim": 16, "max_seq_len": 200}],
    "dma": [
        {"num_heads": 4, "causal": True},
        {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "causal": True, "keep_window_size": 9},
        {"num_heads": 4, "keep_window_size": 9, "positions": "none", "key_bias": "linear", "bias": True},
    ],
    "toeplitz": [SMALL, FIXED, SMALL | {"parity": "reference", "max_seq_len": 200}, FIXED | {"parity": "reference"}],
    "vandermonde": [SMALL, FIXED, {"headdim": 16, "is_data_dependent": False, "is_dft": True}],
    "cauchy": [SMALL, FIXED],
    "low_rank": [SMALL, FIXED],
    "matrix_attention": [SMALL, FIXED],
    "quasiseparable": [SMALL, FIXED],
    "hgrn2": [
        {"expand_ratio": 8},
        {"expand_ratio": 8, "causal": True},
        {"expand_ratio": 16, "causal": True, "lower_bound": 0.5, "output_activation": "sigmoid"},
        {"expand_ratio": 4, "lower_bound": 0.9, "value_activation": "silu", "bias": True},
    ],
    "linear_attention": [
        {"num_heads": 2, "feature_dim": 4},
        {"num_heads": 2, "feature_dim": 16, "feature_map": "relu"},
        {"num_heads": 2, "feature_dim": 4, "feature_map": "taylor"},
    ],
    "normalized_attention": [{"num_heads": 2, "feature_dim": 4}],
    "bidirectional": [
        {"mixer": {"name": "ssd", "d_state": 8, "headdim": 16}},
        {"mixer": {"name": "s6", "d_state": 4}, "combine": "mult"},
        {"mixer": {"name": "hgrn2", "expand_ratio": 8}, "combine": "concat", "share": False},
    ],
    "hgrn": [{}, {"lower_bound": 0.5}],
    "qlstm": [{}, {"expand": 1, "d_conv": 0, "reversed_sigmoid": True}],
    "dss": [{"d_state": 4, "causal": True}, {"d_state": 8, "init": "lin", "n_ssm": 1, "l_max": 16}],
    "ema": [{"causal": True}, {"d_state": 3, "output": "linear"}],
    "gss": [{"d_state": 4, "causal": True}, {"d_state": 4}],
    "longconv": [{"causal": True, "l_max": 12}, {"l_max": 200}],
    "lssl": [{"d_state": 4, "causal": True}, {"d_state": 4, "init": "legt", "n_ssm": None}],
    "s4": [
        {"d_state": 4, "causal": True},
        {"d_state": 4, "causal": True, "init": "legt", "step": "dense", "n_ssm": 4},
        {"d_state": 8, "init": "fout", "kernel": "cauchy"},
        {"d_state": 4, "init": "legt", "kernel": "cauchy", "bottleneck": 2, "output": "linear"},
    ],
    "s4d": [
        {"d_state": 4, "causal": True},
        {"d_state": 8, "n_ssm": 2, "init": "inv", "disc": "bilinear"},
        {"d_state": 4, "causal": True, "init": "real", "output": "linear"},
        {"d_state": 4, "init": "legs", "output": "gate", "gate_expand": 2, "bottleneck": 2, "activation": "silu"},
    ],
    "s6": [{"d_state": 4}, {"d_state": 4, "expand": 1, "d_conv": 0, "gate": False, "dt_rank": 3}],
    "ssd": [
        {"d_state": 8, "headdim": 16},
        {"d_state": 4, "headdim": 8, "ngroups": 2, "d_conv": 0, "gate": False, "skip": False},
        {"d_state": 8, "headdim": 8, "ngroups": 4, "expand": 1, "d_conv": 0, "gate": False, "rotary": True},
    ],
}
CASES = [
    pytest.param({"name": name, **options}, id=f"{name}-{i}")
    for name in mixers.names()
    for i, options in enumerate(OPTIONS.get(name, [{}]))
]


CAUSAL_CASES = [case for case in CASES if mixers.parse(case.values[0], "mixer")[1].is_causal()]


def make(spec, dtype=torch.float32):
    torch.manual_seed(0)
    mixer = build_mixer(spec, D_MODEL).to(dtype).eval()
    for p in mixer.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return mixer
