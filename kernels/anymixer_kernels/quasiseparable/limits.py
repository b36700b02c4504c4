"""What the Triton form takes, without importing Triton."""

import torch

from anymixer_kernels.quasiseparable.reference import QuasiseparableInputs

# Most tokens of a chunk, whose products are formed on chip.
CHUNK = 128


def no_triton_form_for(inputs: QuasiseparableInputs) -> str | None:
    """What of the inputs the Triton form cannot take, in words."""
    if not inputs.shift:
        return "reading without the shift"
    if inputs.initial_state is not None:
        return "initial states"
    return no_triton_form_of_size(inputs.x.shape[1], inputs.x.shape[-1], inputs.B[0].shape[-1], inputs.x.dtype)


def no_triton_form_of_size(length: int, headdim: int, d_state: int, dtype: torch.dtype) -> str | None:
    """The same for sizes: states of rows longer than a chunk are held on chip whole, and float32 products hold each
    operand there twice, as what tf32 keeps of it and the rest."""
    if headdim > 128 or d_state > 256:
        return "headdim above 128 or d_state above 256"
    if length > CHUNK and d_state > 128:
        return f"d_state above 128 in rows of more than {CHUNK} tokens"
    if dtype.itemsize > 2 and d_state > 128:
        return "d_state above 128 in float32"
    if dtype.itemsize > 2 and length > CHUNK and headdim > 64 and d_state > 64:
        return f"headdim and d_state above 64 in float32 in rows of more than {CHUNK} tokens"
    return None
