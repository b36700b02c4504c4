"""The backbone's training passes as CUDA graphs: one launch forward and one backward, where batches keep their shape.

Launching a small encoder's kernels one by one takes the host longer than the GPU takes to run them. What is recorded
once is replayed at the cost of a single launch; the parameters are read, and changed by the optimizer, where they
stand.

torch.cuda.make_graphed_callables does not serve here: it records in a mode that a data loader's pinning thread breaks,
and hands out the parameters' gradients in memory that the next microbatch writes over.
"""

import contextlib
import copy
import functools
import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from anymixer.errors import UserError
from anymixer.layers.cdmoe import CrossDomainExperts
from anymixer.layers.packing import Packing
from anymixer.models.backbone import Backbone

# Passes of one shape that run as they are before it is recorded: kernels compile, and Composer's search for a
# microbatch that fits comes to its end.
EAGER_PASSES = 2
# Each keeps the memory of its inputs and outputs, and more shapes than these hardly come often enough to pay for it.
MAX_RECORDINGS = 16

_log = logging.getLogger(__name__)
# Of the mode that finds where a pass waits; what it does not detect yet, the recording itself refuses.
warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype feature")


def use_cuda_graphs(model: nn.Module, *, asked: bool = True) -> bool:
    """Let the backbone of `model` record its training passes; return whether it has one that may. asked: where a pass
    cannot be recorded, warn, and raise UserError for a model without a backbone."""
    found = [module for module in model.modules() if isinstance(module, Backbone)]
    if asked and not found:
        raise UserError(f"cuda_graphs: {type(model).__name__} has no backbone of ours to record; remove the key")
    for backbone in found:
        backbone.forward = GraphedForward(backbone, asked=asked)
    return any(not backbone.gradient_checkpointing for backbone in found)


@dataclass
class Shared:
    """What all recordings of a backbone use, one after the other. pool: of memory, whose blocks serve the stream that
    they were made on alone; None before the first recording. grads: of the parameters, by name: as large as the model,
    so that not every shape has its own."""

    pool: Any = None
    stream: Any = None
    grads: dict[str, Tensor] = field(default_factory=dict)


class CannotRecordError(Exception):
    """Says what of a pass a replay would leave out, or a recording could not take."""


class GraphedForward:
    """Stands in for `Backbone.forward`: replays training passes of a shape that comes again, runs everything else.

    Recordings share their memory, so a pass whose backward pass is still to come keeps the next one from replaying.
    """

    def __init__(
        self, backbone: Backbone, record: "Callable[..., Recording] | None" = None, *, asked: bool = True
    ) -> None:
        """record: makes the recording, `Recording` itself outside of tests. asked: as of `use_cuda_graphs`."""
        self.backbone, self.record, self.asked = backbone, record or Recording, asked
        self.passes: Counter[Hashable] = Counter()
        self.recordings: dict[Hashable, Recording | None] = {}
        self.shared = Shared()
        self.hooked: str | None = None
        self.full = False

    def __call__(self, hidden_states: Tensor, packing: Packing | None, keep_all: bool = False) -> list[Tensor]:
        """As `Backbone.forward`."""
        if not keep_all and self._trains(hidden_states):
            recording = self._recording(hidden_states, packing)
            if recording is not None:
                return [recording(hidden_states, packing)]
        return Backbone.forward(self.backbone, hidden_states, packing, keep_all)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphedForward":
        """For the copy of the backbone, with nothing recorded: a graph knows the addresses of what it was made of."""
        return GraphedForward(copy.deepcopy(self.backbone, memo), self.record, asked=self.asked)

    def _trains(self, hidden_states: Tensor) -> bool:
        backbone = self.backbone
        return (
            backbone.training
            and not backbone.gradient_checkpointing
            and torch.is_grad_enabled()
            and hidden_states.requires_grad
            and not self._is_hooked()
        )

    @functools.cached_property
    def _modules(self) -> tuple[tuple[str, nn.Module], ...]:
        """Of the backbone; kept, because listing them takes as long as launching a pass does."""
        return tuple(self.backbone.named_modules())

    def _is_hooked(self) -> bool:
        """Whether a module has hooks on its passes, which a replay would not call; the first one found is said."""
        found = next((name for name, module in self._modules if _has_hooks(module)), None)
        if found is not None and self.hooked is None:
            self.hooked = found or "the backbone"
            self._say("%s has hooks; passes that they see are launched as before", self.hooked)
        return found is not None

    def _recording(self, hidden_states: Tensor, packing: Packing | None) -> "Recording | None":
        if any(recording is not None and recording.pending for recording in self.recordings.values()):
            return None
        key = _key(hidden_states, packing)
        if key not in self.recordings:
            self.passes[key] += 1
            if self.passes[key] <= EAGER_PASSES or self._is_full():
                return None
            self.recordings[key] = self._recorded(hidden_states, packing)
        return self.recordings[key]

    def _is_full(self) -> bool:
        """Whether no further shape is recorded, which is said the first time."""
        if len(self.recordings) == MAX_RECORDINGS and not self.full:
            self.full = True
            self._say("%d shapes are recorded; others are launched as before", MAX_RECORDINGS)
        return self.full

    def _recorded(self, hidden_states: Tensor, packing: Packing | None) -> "Recording | None":
        try:
            if name := _adds_to_the_loss(self.backbone):
                raise CannotRecordError(f"{name} adds to the loss (load_balancing)")
            return self.record(self.backbone, hidden_states, packing, self.shared)
        except CannotRecordError as error:
            self._say("%s; launching as before", error)
            return None
        except torch.OutOfMemoryError:
            self._say("no memory to record a pass of %s; launching as before", tuple(hidden_states.shape))
            return None
        except RuntimeError as error:
            # A pass does what no graph can hold, a mixer from outside say. Who did not ask for graphs trains on.
            if self.asked:
                raise
            _log.warning("cuda_graphs: auto: a pass cannot be recorded; launching as before: %s", _first_line(error))
            return None

    def _say(self, message: str, what: object) -> None:
        _log.log(logging.WARNING if self.asked else logging.INFO, f"cuda_graphs: {message}", what)


class Recording:
    """One forward and one backward pass over tensors that stay where they are."""

    def __init__(self, backbone: Backbone, hidden_states: Tensor, packing: Packing | None, shared: Shared) -> None:
        """Record the passes of inputs like these."""
        named = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        self.parameters = tuple(named.values())
        # Aliases: the parameters' own places in the autograd graph belong to the stream they were first used on.
        aliases = {f"backbone.{name}": p.detach().requires_grad_() for name, p in named.items()}
        self.hidden_states = hidden_states.detach().clone().requires_grad_()
        self.sequence_id = None if packing is None else packing.sequence_id.clone()
        still = None if packing is None or self.sequence_id is None else Packing(self.sequence_id, packing.packed)
        plain, inputs = _Plain(backbone), (self.hidden_states, *aliases.values())
        kind = hidden_states.device.type
        autocast = torch.autocast(
            # Weights that one pass has cast must not be taken for those of the next.
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )  # fmt: skip

        def forward() -> Tensor:
            with autocast:
                return torch.func.functional_call(plain, aliases, (self.hidden_states, still))

        # After the recorded pass has computed them, they are copied here; None where a parameter takes no part.
        self._grads: list[Tensor | None] = [shared.grads.setdefault(n, torch.empty_like(p)) for n, p in named.items()]
        self._token: weakref.ref[_Token] | None = None
        self._record(forward, inputs, shared)

    def _record(self, forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], shared: Shared) -> None:
        with torch.random.fork_rng([self.hidden_states.device]):
            self._record_on_gpu(forward, inputs, shared)

    def _record_on_gpu(self, forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], shared: Shared) -> None:
        shared.stream = shared.stream or torch.cuda.Stream()
        shared.pool = shared.pool or torch.cuda.graph_pool_handle()
        # What earlier passes have freed is kept for more like them, out of reach of another stream and of the graphs.
        torch.cuda.empty_cache()
        shared.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(shared.stream), _refusing_to_wait():  # so that nothing is set up while recording
            output = forward()
            self._gradients(output, inputs, torch.zeros_like(output))
            del output
        torch.cuda.current_stream().wait_stream(shared.stream)
        torch.cuda.empty_cache()
        self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        options: dict[str, Any] = {
            "pool": shared.pool,
            "stream": shared.stream,
            "capture_error_mode": "thread_local",
        }
        with torch.cuda.graph(self._forward_graph, **options):
            output = forward()
        self._grad_output = torch.empty_like(output)
        with torch.cuda.graph(self._backward_graph, **options):
            self._keep(*self._gradients(output, inputs, self._grad_output))
        self._output = output.detach()

    def _gradients(self, output: Tensor, inputs: tuple[Tensor, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
        """Without the autocast of the forward pass that is under way, as a Trainer calls backward()."""
        with torch.autocast(output.device.type, enabled=False):
            return torch.autograd.grad(output, inputs, grad_output, allow_unused=True)

    def _keep(self, of_hidden: Tensor, *of_parameters: Tensor | None) -> None:
        """Where the gradients of a pass are found after it."""
        self._grad_hidden = of_hidden
        self._grads = [None if grad is None else kept for kept, grad in zip(self._grads, of_parameters)]
        torch._foreach_copy_(
            [kept for kept in self._grads if kept is not None], [grad for grad in of_parameters if grad is not None]
        )

    @property
    def pending(self) -> bool:
        """Whether the backward pass of the last forward pass may still come."""
        token = None if self._token is None else self._token()
        return token is not None and not token.done

    def __call__(self, hidden_states: Tensor, packing: Packing | None) -> Tensor:
        """The last layer's output for inputs like those recorded."""
        if self.sequence_id is not None and packing is not None:
            self.sequence_id.copy_(packing.sequence_id)
        token = _Token()
        self._token = weakref.ref(token)
        return _Replay.apply(self, token, hidden_states, *self.parameters)  # type: ignore[return-value]

    def replay_forward(self, hidden_states: Tensor) -> Tensor:
        """The output, in memory that the next replay writes over."""
        self.hidden_states.copy_(hidden_states)
        self._forward_graph.replay()
        return self._output.detach()

    def replay_backward(self, grad_output: Tensor) -> list[Tensor | None]:
        """The gradients of hidden_states and the parameters; those of the parameters the caller may keep."""
        self._grad_output.copy_(grad_output)
        self._backward_graph.replay()
        copies = iter(torch._foreach_mul([grad for grad in self._grads if grad is not None], 1.0))
        return [self._grad_hidden, *(None if grad is None else next(copies) for grad in self._grads)]


class _Token:
    """Lives as long as the autograd graph of one replayed forward pass."""

    done = False


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, token: _Token, hidden_states: Tensor, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.token = recording, token
        return recording.replay_forward(hidden_states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.token.done:
            raise RuntimeError("a replayed backward pass runs once: what it reads has been written over")
        ctx.token.done = True
        return None, None, *ctx.recording.replay_backward(grad_output)


class _Plain(nn.Module):
    """The backbone with its own forward, and its last output alone."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, hidden_states: Tensor, packing: Packing | None) -> Tensor:
        return Backbone.forward(self.backbone, hidden_states, packing)[-1]


def _key(hidden_states: Tensor, packing: Packing | None) -> Hashable:
    """What two passes must share for one recording to serve both."""
    kind = hidden_states.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    packed = None if packing is None else (packing.packed, packing.sequence_id.dtype)
    return hidden_states.shape, hidden_states.dtype, packed, autocast


@contextlib.contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Raise CannotRecordError where a pass waits for the GPU (a value read, a tensor copied from the host): recording
    it would fail, and leave the memory pool half open."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise CannotRecordError("a pass waits for the GPU, which a recording cannot") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _adds_to_the_loss(backbone: Backbone) -> str | None:
    """A module whose pass has a result besides its output, by name."""
    for name, module in backbone.named_modules():
        if isinstance(module, CrossDomainExperts) and module.config.load_balancing:
            return name
    return None
