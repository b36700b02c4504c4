"""Time each kernel of Hydra's core, and the ops around it, against the bytes they must move, and try tilings.

    python benchmarks/hydra_kernels.py --lengths 128 2048          # a GPU
    python benchmarks/hydra_kernels.py --lengths 128 --tune        # every setting, to choose the kernels' constants
    python benchmarks/hydra_kernels.py --ops cross_entropy add_norm

bfloat16 activations, float32 parameters; 65,536 tokens of a block of d_model 768 unless told. "x floor" is the time
over that of moving each input and output once at the rate of a copy measured in the run. The loss is that of 30 % of
the tokens, over a vocabulary of 30,528.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
import triton
from anymixer_kernels import force_backend
from anymixer_kernels.add_norm import add_norm
from anymixer_kernels.cross_entropy import cross_entropy
from anymixer_kernels.depthwise_conv import triton_form as conv_form
from anymixer_kernels.depthwise_conv.triton_form import launch_conv, launch_conv_backward
from anymixer_kernels.gated_norm import triton_form as norm_form
from anymixer_kernels.gated_norm.triton_form import launch_gated_norm, launch_gated_norm_backward
from anymixer_kernels.quasiseparable import triton_gradients, triton_mix, triton_states
from anymixer_kernels.quasiseparable.triton_form import CHUNK, Operands
from anymixer_kernels.quasiseparable.triton_gradients import Gradients, launch_gradients
from anymixer_kernels.quasiseparable.triton_log_weights import Steps, log_weights, log_weights_backward
from anymixer_kernels.quasiseparable.triton_mix import launch_mix
from anymixer_kernels.quasiseparable.triton_states import carry_states, gather_states
from anymixer_kernels.quasiseparable.triton_tiles import Side, Tiling
from timing import measure, print_header, report, told

NHEADS, HEADDIM, D_STATE, WIDTH = 24, 64, 64, 7
D_MODEL, CLASSES, MASKED = 768, 30528, 0.30
CONV_BACKWARD = ("CHANNELS", "GROUP", "TOKENS", "REGISTERS", "PARTS")
# What `--tune` tries of a stage: module constants.
KNOBS: dict[str, list[tuple[ModuleType, dict[str, object]]]] = {
    "mix": [
        (triton_mix, {"TILING": Tiling(*tiling)})
        for tiling in (
            (64, 4, 3),
            (64, 4, 2),
            (64, 4, 3, 168),
            (64, 4, 2, 168),
            (64, 8, 2),
            (64, 8, 3, 128),
            (128, 8, 3),
        )
    ],
    **{
        f"gradients of {side}": [
            (triton_gradients, {"TILING": Tiling(*tiling)})
            for tiling in ((64, 4, 3), (64, 4, 2), (64, 4, 1), (64, 8, 3, 128), (64, 8, 2), (128, 8, 3))
        ]
        for side in ("readers", "sources")
    },
    "states": [
        (triton_states, {"GATHER_HEADS": heads, "GATHER_TILING": Tiling(128, *tiling)})
        for heads in (4, 8, 24)
        for tiling in ((4, 3), (4, 2), (8, 3), (8, 2))
    ],
    "carry": [
        (triton_states, {"CARRY_ENTRIES": entries, "CARRY_WARPS": warps})
        for entries, warps in ((512, 1), (256, 1), (512, 4), (1024, 2), (1024, 4))
    ],
    "convolution": [
        (conv_form, {"FORWARD_CHANNELS": channels, "FORWARD_GROUP": group, "FORWARD_TOKENS": n})
        for channels, group, n in ((4, 8, 64), (4, 8, 32), (4, 8, 128), (4, 4, 64), (2, 8, 64), (8, 4, 64))
    ],
    "convolution backward": [
        (conv_form, {f"BACKWARD_{name}": value for name, value in zip(CONV_BACKWARD, values)})
        for values in (
            (2, 8, 128, 96, 2),
            (2, 8, 128, 96, 1),
            (2, 8, 128, 96, 4),
            (2, 8, 64, 96, 2),
            (2, 8, 128, 88, 1),
            (2, 4, 128, None, 1),
            (4, 4, 128, 144, 1),
            (4, 4, 128, None, 1),
            (4, 8, 128, None, 1),
        )
    ],
    "gated norm backward": [(norm_form, {"BACKWARD_ENTRIES": n}) for n in (2048, 4096, 8192)],
}


class Case:
    """Random inputs of one length, and the stages of the core as calls."""

    def __init__(self, tokens: int, length: int, device: torch.device) -> None:
        def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        batch, d_inner = tokens // length, NHEADS * HEADDIM
        conv = d_inner + 4 * D_STATE
        self.tokens = tokens
        self.projected, self.grad_projected = (normal(batch, length, d_inner + conv + 2 * NHEADS) for _ in range(2))
        self.mixed, self.grad_mixed = normal(batch, length, conv), normal(batch, length, conv)
        self.y, self.out = (normal(batch, length, d_inner) for _ in range(2))
        self.weight, self.bias = normal(conv, 1, WIDTH, dtype=torch.float32), normal(conv, dtype=torch.float32)
        self.norm = normal(d_inner, dtype=torch.float32)
        self.slices = [self.projected[..., :d_inner], self.projected[..., d_inner : d_inner + conv]]
        self.grad_slices = [self.grad_projected[..., :d_inner], self.grad_projected[..., d_inner : d_inner + conv]]
        self.grad_y = self.grad_slices[1][..., :d_inner]  # where the op has it
        first = d_inner + conv
        raw = self.projected[..., first : first + NHEADS], self.projected[..., first + NHEADS :]
        self.grad_raw = self.grad_projected[..., first : first + NHEADS], self.grad_projected[..., first + NHEADS :]
        A, dt_bias = -torch.rand(NHEADS, device=device), torch.full((NHEADS,), -4.0, device=device)
        self.steps = Steps(*raw, A, dt_bias, None)
        B, C = self._projections(self.mixed)
        self.operands = Operands(self._heads(self.mixed), B, C, self.steps, normal(batch, length, NHEADS))
        self.weights = log_weights(self.steps, min(CHUNK, length))
        self.states = None
        if self.weights.nchunks > 1:
            self.states = gather_states(self._sources(), self.weights, None, readers=False)
        self.logs = torch.randn_like(self.weights.row), torch.randn_like(self.weights.row)
        self.extra = normal(batch, length, NHEADS), normal(NHEADS, d_inner)
        self.of_total = None if self.states is None else torch.randn_like(self.weights.total)

    @staticmethod
    def _heads(mixed: torch.Tensor) -> torch.Tensor:
        return mixed[..., : NHEADS * HEADDIM].unflatten(-1, (NHEADS, HEADDIM))

    @staticmethod
    def _projections(mixed: torch.Tensor) -> tuple[tuple, tuple]:
        B_f, C_f, B_b, C_b = mixed[..., NHEADS * HEADDIM :].unflatten(-1, (4, 1, D_STATE)).unbind(-3)
        return (B_f, B_b), (C_f, C_b)

    def _sources(self) -> Side:
        return self.operands.sources(self.weights)

    def _readers(self) -> Side:
        return self.operands.readers(self.weights, self.grad_y.unflatten(-1, (NHEADS, HEADDIM)))

    def stages(self) -> Iterator[tuple[str, Callable[[], object], float]]:
        """Name, call, and the bytes per token that it must move."""
        inner, conv, small = 2 * NHEADS * HEADDIM, 2 * (NHEADS * HEADDIM + 4 * D_STATE), 4 * NHEADS
        gate, convolved = self.slices
        grad_gate, grad_convolved = self.grad_slices
        options = {"activate": True, "causal": False}
        weights, states = self.weights, self.states
        held = 0 if states is None else 2 * 2 * NHEADS * HEADDIM * D_STATE / weights.chunk
        taps = self.weight, self.bias, None
        yield "convolution", lambda: launch_conv(convolved, *taps, self.mixed, **options), 2 * conv
        yield "log weights", lambda: log_weights(self.steps, weights.chunk), small + 4 * small
        if states is not None:
            yield "states", lambda: gather_states(self._sources(), weights, None, readers=False), conv + held
            carried = states.clone()
            yield "carry", lambda: carry_states(carried, weights, None, self.y.shape[1]), 2 * held
            yield "carry back", lambda: carry_states(carried, weights, None, self.y.shape[1], states), 3 * held
        yield "mix", self.mix(), conv + inner + 5 * small + held
        yield "gradient of x", self.gradient_of_x(), conv + inner + 6 * small + held
        yield "gradients of readers", self.gradients(readers=True), conv + inner + 2 * 2 * D_STATE + 6 * small + held
        yield "gradients of sources", self.gradients(readers=False), conv + inner + 2 * 2 * D_STATE + 6 * small + held
        yield "gated norm", lambda: launch_gated_norm(self.y, gate, self.norm, 1e-5, self.out), 3 * inner
        yield (
            "gated norm backward",
            lambda: launch_gated_norm_backward(self.out, self.y, gate, self.norm, 1e-5, self.grad_y, grad_gate),
            5 * inner,
        )
        yield (
            "log weights backward",
            lambda: log_weights_backward(self.steps, weights, self.logs, self.of_total, self.grad_raw),
            6 * small,
        )
        yield (
            "convolution backward",
            lambda: launch_conv_backward(self.grad_mixed, convolved, *taps, grad_convolved, **options),
            3 * conv,
        )

    def mix(self) -> Callable[[], object]:
        """The product."""
        y = self.y.unflatten(-1, (NHEADS, HEADDIM))
        return lambda: launch_mix(
            self.operands.readers(self.weights, None), self._sources(), self.weights, None, y,
            readers=True, diagonal=self.operands.diagonal, states=self.states,
        )  # fmt: skip

    def gradient_of_x(self) -> Callable[[], object]:
        """The product with the sides changed, and what comes through the diagonal's projection added."""
        grad_x = self.grad_mixed[..., : NHEADS * HEADDIM].unflatten(-1, (NHEADS, HEADDIM))
        return lambda: launch_mix(
            self._sources(), self._readers(), self.weights, None, grad_x,
            readers=False, diagonal=self.operands.diagonal, extra=self.extra, states=self.states,
        )  # fmt: skip

    def gradients(self, *, readers: bool) -> Callable[[], object]:
        """The gradients through the matrix, of one side."""
        B, C = self._projections(self.grad_mixed)
        sides = [self._readers(), self._sources()]
        own, other = sides if readers else sides[::-1]
        diagonal = torch.empty(*self.y.shape[:2], NHEADS, device=self.y.device) if readers else None
        left, right = C if readers else B
        # At most two programs share a chunk, whatever is tried.
        total = None if readers or self.of_total is None else self.weights.total.new_empty(*self.weights.total.shape, 2)
        grads = Gradients(left, right, self.logs[0], total)
        return lambda: launch_gradients(
            own, other, self.weights, None, grads, readers=readers, grad_diagonal=diagonal, states=self.states
        )


# What is timed: a name, a call, and the bytes that it must move.
Stage = tuple[str, Callable[[], object], float]


def hydra_stages(options: argparse.Namespace, device: torch.device) -> Iterator[Stage]:
    """The kernels of Hydra's core by length, tuned first where that is asked for."""
    for length in options.lengths:
        case = Case(options.tokens, length, device)
        if options.tune:
            tune(case, device)
        for name, call, size in case.stages():
            yield f"{name}, length {length}", call, size * options.tokens


def both_passes(name: str, op: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Iterator[Stage]:
    """An op's forward and backward pass; an input that takes part, its gradient and the output are moved once each."""
    with force_backend("triton"):
        out = op()
        grad = torch.randn_like(out)
        inputs = sum(leaf.nbytes for leaf in leaves)
        yield name, op, inputs + out.nbytes
        backward = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # noqa: E731
        yield f"{name} backward", backward, 2 * inputs + out.nbytes


def cross_entropy_stages(options: argparse.Namespace, device: torch.device) -> Iterator[Stage]:
    """The loss of masked tokens."""
    rows = int(MASKED * options.tokens)
    logits = torch.randn(rows, CLASSES, device=device, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(CLASSES, (rows,), device=device)
    yield from both_passes("cross entropy", lambda: cross_entropy(logits, targets), [logits])


def add_norm_stages(options: argparse.Namespace, device: torch.device) -> Iterator[Stage]:
    """Of a float32 residual stream, and of a bfloat16 one as under low_precision_layernorm."""
    weight, bias = (torch.ones(D_MODEL, device=device, requires_grad=True) for _ in range(2))
    for dtype in (torch.float32, torch.bfloat16):
        residual = torch.randn(options.tokens, D_MODEL, device=device, dtype=dtype).requires_grad_()
        branch = torch.randn(options.tokens, D_MODEL, device=device, dtype=torch.bfloat16).requires_grad_()
        op = partial(add_norm, residual, branch, weight, bias, 1e-12)
        yield from both_passes(f"add_norm {str(dtype)[6:]}", op, [residual, branch, weight, bias])


OPS = {"hydra": hydra_stages, "cross_entropy": cross_entropy_stages, "add_norm": add_norm_stages}


def tune(case: Case, device: torch.device) -> None:
    """Print the time of each stage with each of its settings; the fastest becomes the process's."""
    stages = {name for name, _, _ in case.stages()}
    for stage, settings in ((stage, settings) for stage, settings in KNOBS.items() if stage in stages):
        times = []
        for module, values in settings:
            vars(module).update(values)
            call = next(call for name, call, _ in case.stages() if name == stage)
            try:
                times.append((measure(call, device, warmup=2, repeat=7).milliseconds, module, values))
            except triton.runtime.errors.OutOfResources as error:
                print(f"{stage} {values}: {error}")
        for time, _, values in sorted(times, key=lambda entry: entry[0]):
            print(f"{stage:20} {time:.3f} ms: {', '.join(f'{key} {value}' for key, value in values.items())}")
        _, module, values = min(times, key=lambda entry: entry[0])
        vars(module).update(values)


def row(stage: Stage, device: torch.device, copy_gbs: float) -> list[str]:
    """The table's row of a stage."""
    name, call, size = stage
    time, floor = measure(call, device).milliseconds, size / copy_gbs / 1e6
    return [name, f"{time:.3f}", f"{floor:.3f}", f"{time / floor:.1f}"]


def main(arguments: list[str]) -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=["hydra"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 2048])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = print_header(device, f"{options.tokens:,} tokens, {NHEADS} heads of {HEADDIM}, d_state {D_STATE}")
    stages = (stage for op in options.ops for stage in OPS[op](options, device))
    rows = list(told(row(stage, device, found["copy_gbs"]) for stage in stages))
    report(("stage", "ms", "floor ms", "x floor"), rows)


if __name__ == "__main__":
    main(sys.argv[1:])
