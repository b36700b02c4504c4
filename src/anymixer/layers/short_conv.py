"""The short causal convolution that recurrent mixers put before their recurrence (H3, arXiv 2212.14052)."""

import torch
from anymixer_kernels.depthwise_conv import depthwise_conv, depthwise_conv_step
from torch import Tensor, nn

from anymixer.layers.packing import Packing


class ShortConv(nn.Conv1d):
    """silu(causal depthwise convolution) over the tokens of each sequence, with `torch.nn.Conv1d`'s parameters."""

    def __init__(self, channels: int, width: int, *, bias: bool = True, activate: bool = True) -> None:
        super().__init__(channels, channels, width, groups=channels, padding=width - 1, bias=bias)
        self.activate = activate

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:  # type: ignore[override]
        """[batch, length, channels] -> the same shape."""
        return depthwise_conv(
            x,
            self.weight,
            self.bias,
            sequence_id=None if packing is None else packing.sequence_id,
            packed=packing is not None and packing.packed,
            activate=self.activate,
            causal=True,
        )

    def init_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        """The inputs before the first token: zeros [batch, width - 1, channels]."""
        return torch.zeros(batch, self.kernel_size[0] - 1, self.in_channels, device=device, dtype=dtype)

    def last_inputs(self, x: Tensor, packing: Packing | None) -> Tensor:
        """The inputs before the next token, [batch, width - 1, channels], after rows [batch, length, channels]."""
        if packing is not None:
            x = torch.where(packing.real[..., None], x, 0.0)
        last = x[:, max(0, x.shape[1] - self.kernel_size[0] + 1) :]
        before = self.init_state(x.shape[0], x.device, x.dtype)[:, last.shape[1] :]
        return torch.cat([before, last], dim=1)  # a copy: a view would keep the whole row

    def step(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """One token: [batch, channels], and the inputs before it and before the next."""
        return depthwise_conv_step(x, self.weight, self.bias, before, activate=self.activate)

    def state_size(self, dtype: torch.dtype) -> int:
        """Bytes of one row's last inputs."""
        return (self.kernel_size[0] - 1) * self.in_channels * dtype.itemsize
