"""Dynamic Mask Attention by its published arguments, as a plain module."""

import torch
from torch import Tensor, nn

from anymixer.layers.packing import make_packing
from anymixer.mixers.base import State
from anymixer.mixers.dma import DynamicMaskAttention


class DMAttn(nn.Module):
    """The `dma` mixer, causal, with the call of the published module:

    attn = DMAttn(d_model=64, n_heads=1, max_position_embeddings=16, layer_idx=0)
    y, past_key_values = attn(x, attention_mask)
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        max_position_embeddings: int = 2048,
        layer_idx: int | None = None,
        keep_window_size: int | None = None,
    ) -> None:
        """keep_window_size: keys that a query sees at most; None for max_position_embeddings, which bounds nothing
        else. Raises UserError for what does not fit."""
        super().__init__()
        self.mixer = DynamicMaskAttention(
            d_model,
            layer_idx=layer_idx,
            num_heads=n_heads,
            keep_window_size=max_position_embeddings if keep_window_size is None else keep_window_size,
            causal=True,
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: State | None = None
    ) -> tuple[Tensor, State]:
        """[batch, length, d_model] -> the same shape, and what to give as past_key_values with the tokens after them.

        attention_mask: [batch, length], nonzero at real tokens; all are real that follow past_key_values.
        """
        if past_key_values is None:
            return self.mixer.prefill(hidden_states, make_packing(attention_mask, None))
        outputs, state = [], past_key_values
        for token in hidden_states.unbind(dim=1):
            output, state = self.mixer.step(token, state)
            outputs.append(output)
        return torch.stack(outputs, dim=1), state
