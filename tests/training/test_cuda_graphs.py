"""Recorded training passes: on the CPU by recordings that run again what a GPU would replay, on a GPU for real."""

import copy

import pytest
import torch
from mixer_instances import CASES, D_MODEL

from anymixer.errors import UserError
from anymixer.layers.packing import make_packing
from anymixer.models import ModelConfig, build_model
from anymixer.models.backbone import Backbone
from anymixer.training import cuda_graphs
from anymixer.training.cuda_graphs import EAGER_PASSES, CannotRecordError, GraphedForward, Recording, use_cuda_graphs

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Again:
    """In a graph's place: `replay` calls a function."""

    def __init__(self, function):
        self.replay = function


class RunAgain(Recording):
    """Runs passes again, over the same memory as a replay would: results of one are written over by the next."""

    def _record(self, forward, inputs, shared):
        self._output = forward().detach()
        self._grad_output = torch.zeros_like(self._output)

        def forward_again():
            with torch.enable_grad():
                self.live = forward()
            self._output.copy_(self.live.detach())

        def backward_again():
            self._keep(*self._gradients(self.live, inputs, self._grad_output))

        self._forward_graph, self._backward_graph = Again(forward_again), Again(backward_again)


def tiny_model(mixer: dict, device: str = "cpu", **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0} | changes
    return build_model(ModelConfig(mixer=mixer, model_config=options)).to(device).train()


MIXERS = [{"name": "attention", "num_heads": 2}, {"name": "hydra", "d_state": 16, "headdim": 16}]


def batch_of(seed: int, rows: int = 2, length: int = 12, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 64, (rows, length), generator=generator)
    cut = int(torch.randint(2, length - 2, (1,), generator=generator))
    sequence_id = torch.where(torch.arange(length) < cut, 0, 1).expand(rows, length).clone()
    sequence_id[:, -1] = -1
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, -100)
    batch = {"input_ids": ids, "labels": labels, "sequence_id": sequence_id}
    return {name: value.to(device) for name, value in batch.items()}


def train(model: torch.nn.Module, steps: int, microbatches: int = 2) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for part in range(microbatches):
            loss = model(**batch_of(step * microbatches + part)).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


def graphed(model: torch.nn.Module, record=None) -> GraphedForward:
    use_cuda_graphs(model)
    forward = next(m for m in model.modules() if isinstance(m, Backbone)).forward
    forward.record = record or forward.record
    return forward


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer["name"])
def test_replayed_training_gives_the_same_losses(mixer):
    """Two microbatches a step: the gradients of the first must outlive the replay of the second."""
    model = tiny_model(mixer)
    twin = copy.deepcopy(model)
    forward = graphed(twin, RunAgain)
    assert train(twin, 4) == pytest.approx(train(model, 4), abs=1e-6)
    (recording,) = forward.recordings.values()
    assert recording is not None and recording.live is not None
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=name)


def train_in_turns(model: torch.nn.Module, steps: int) -> list[float]:
    """Two shapes by turns, which share the recordings' memory; bfloat16 autocast, and dropout from the same seed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        batch = batch_of(step, length=(12, 20)[step % 2], device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@on_gpu
@pytest.mark.parametrize("spec", CASES)
def test_recorded_training_on_a_gpu_gives_the_same_losses(spec):
    """The same kernels in the same order, dropout included."""
    model = tiny_model(spec, "cuda", hidden_size=D_MODEL, hidden_dropout_prob=0.1, layer_dropout_prob=0.1)
    twin = copy.deepcopy(model)
    forward = graphed(twin)
    expected, actual = (train_in_turns(one, 10) for one in (model, twin))
    assert actual == pytest.approx(expected, rel=1e-4)
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=name)
    if spec["name"] in ("attention", "hydra", "ssd", "hgrn2"):
        assert len(forward.recordings) == 2 and None not in forward.recordings.values()


@on_gpu
def test_a_capture_that_fails_leaves_training_as_it_was(caplog):
    """A mixer that waits for its stream, which nothing finds before the capture does."""
    model = tiny_model(MIXERS[0], "cuda")
    twin = copy.deepcopy(model)
    forward = graphed(twin)
    forward.asked = False
    mixer = forward.backbone.layers[0].sequence.mixer
    plain = type(mixer).forward

    def waits(*inputs):
        torch.cuda.current_stream().synchronize()
        return plain(mixer, *inputs)

    mixer.forward = waits
    expected, actual = (train_in_turns(one, 8) for one in (model, twin))
    assert actual == pytest.approx(expected, rel=1e-4)
    assert set(forward.recordings.values()) == {None}
    assert "auto: a pass cannot be recorded" in caplog.text


def passes(model, forward, **changes):
    """Run one training pass; return how many recordings there are."""
    batch = batch_of(0) | changes
    model(**batch).loss.backward()
    return len(forward.recordings)


def recorded(model) -> GraphedForward:
    """The model's forward pass once its shape is recorded."""
    forward = graphed(model, RunAgain)
    while not forward.recordings:
        passes(model, forward)
    return forward


def test_a_pass_is_recorded_once_its_shape_has_come_often_enough():
    model = tiny_model(MIXERS[0])
    forward = graphed(model, RunAgain)
    assert [passes(model, forward) for _ in range(EAGER_PASSES + 2)] == [0] * EAGER_PASSES + [1, 1]
    longer = batch_of(0, length=16)
    assert [passes(model, forward, **longer) for _ in range(EAGER_PASSES + 1)] == [1] * EAGER_PASSES + [2]


def test_shapes_beyond_a_number_are_launched_as_before(monkeypatch, caplog):
    monkeypatch.setattr(cuda_graphs, "MAX_RECORDINGS", 2)
    model = tiny_model(MIXERS[0])
    plain, forward = copy.deepcopy(model), graphed(model, RunAgain)
    for length in (12, 14, 16, 18):
        for _ in range(EAGER_PASSES + 2):
            passes(model, forward, **batch_of(0, length=length))
    assert [key[0][1] for key in forward.recordings] == [12, 14]
    assert caplog.text.count("2 shapes are recorded; others are launched as before") == 1
    batch = batch_of(1, length=18)
    torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)


def test_what_does_not_train_is_not_recorded():
    model = tiny_model(MIXERS[0])
    forward = graphed(model, RunAgain)
    for _ in range(5):
        with torch.no_grad():
            model(**batch_of(0))
        model.eval()
        model(**batch_of(0))
        model.train()
        assert len(model(**batch_of(0), output_hidden_states=True).hidden_states) == 3
    assert not forward.passes and not forward.recordings


def test_a_pass_between_a_replay_and_its_backward_pass_does_not_replay():
    model = tiny_model(MIXERS[0])
    plain = copy.deepcopy(model)
    recorded(model)
    model.zero_grad()
    first = model(**batch_of(1)).loss
    second = model(**batch_of(2)).loss
    (first + second).backward()
    (plain(**batch_of(1)).loss + plain(**batch_of(2)).loss).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


def test_a_forward_pass_that_fails_later_does_not_keep_the_next_from_replaying():
    model = tiny_model(MIXERS[0])
    forward = recorded(model)
    (recording,) = forward.recordings.values()
    kept = model(**batch_of(1)).loss
    assert recording.pending
    del kept
    assert not recording.pending


def test_a_second_backward_pass_is_refused():
    model = tiny_model(MIXERS[0])
    recorded(model)
    loss = model(**batch_of(1)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_hooks_are_called_in_every_pass(caplog):
    model = tiny_model(MIXERS[0])
    forward = recorded(model)
    calls = []
    hook = forward.backbone.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(4):
        passes(model, forward)
    hook.remove()
    assert len(calls) == 4 and caplog.text.count("layers.0 has hooks") == 1
    passes(model, forward)
    assert len(calls) == 4 and len(forward.recordings) == 1


def test_lack_of_memory_and_what_cannot_be_recorded_are_said_and_change_nothing(caplog):
    def fails(error):
        def record(*_):
            raise error

        model = tiny_model(MIXERS[0])
        forward = graphed(model, record)
        for _ in range(4):
            passes(model, forward)
        assert list(forward.recordings.values()) == [None]

    fails(torch.OutOfMemoryError("full"))
    assert "no memory to record a pass of (2, 12, 32)" in caplog.text
    fails(CannotRecordError("it waits"))
    assert "cuda_graphs: it waits; launching as before" in caplog.text


@pytest.mark.parametrize("asked", [False, True])
def test_a_recording_that_fails_stops_who_asked_for_it_alone(asked, caplog):
    def record(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    model = tiny_model(MIXERS[0])
    forward = graphed(model, record)
    forward.asked = asked
    for _ in range(2):
        passes(model, forward)
    if asked:
        with pytest.raises(RuntimeError, match="stream is capturing"):
            passes(model, forward)
        return
    passes(model, forward)
    assert list(forward.recordings.values()) == [None]
    assert (
        "cuda_graphs: auto: a pass cannot be recorded; launching as before: operation not permitted when" in caplog.text
    )
    assert "and so on" not in caplog.text


def test_a_loss_beside_the_output_is_not_lost(caplog):
    """The balance of CDMoE's experts."""
    mixture = {"name": "cdmoe", "num_experts": 16, "retrieval_dim": 8, "num_heads": 1, "experts_per_head": 2}
    mixture |= {"intermediate_size": 32, "load_balancing": 0.1}
    model = tiny_model(MIXERS[0], channel_mixer=mixture)
    forward = graphed(model, RunAgain)
    for _ in range(4):
        passes(model, forward)
    assert "adds to the loss (load_balancing)" in caplog.text and list(forward.recordings.values()) == [None]


def test_a_model_of_others_is_refused():
    with pytest.raises(UserError, match="cuda_graphs: Linear has no backbone"):
        use_cuda_graphs(torch.nn.Linear(2, 2))
    assert not use_cuda_graphs(torch.nn.Linear(2, 2), asked=False)


def test_the_packing_of_each_pass_is_read():
    """Sequence ids are an input of the replay like any other."""
    model = tiny_model(MIXERS[1])
    plain = copy.deepcopy(model)
    forward = recorded(model)
    hidden = torch.randn(2, 12, 32, requires_grad=True)
    packing = make_packing(None, batch_of(7)["sequence_id"])
    (output,) = forward(hidden, packing)
    (expected,) = next(m for m in plain.modules() if isinstance(m, Backbone))(hidden, packing)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def test_a_copy_of_the_model_records_for_itself():
    """As algorithms do that average weights."""
    model = tiny_model(MIXERS[0])
    recorded(model)
    twin = copy.deepcopy(model)
    theirs = next(m for m in twin.modules() if isinstance(m, Backbone))
    assert theirs.forward.backbone is theirs and not theirs.forward.recordings
    assert train(twin, 4) == pytest.approx(train(model, 4), abs=1e-6)
