"""What the last evaluation found, over all streams and for each."""

from typing import Any

from composer.core import State

METRICS = {"LanguageCrossEntropy": "loss", "MaskedAccuracy": "accuracy"}


def latest_evaluation(state: State) -> dict[str, Any]:
    """Loss (nats per predicted token) and accuracy of the last evaluation; empty when there was none.

    With several streams: their mean, each stream counting once, and `streams` with the figures of each. Call it on
    every rank. `state.eval_metric_values`, which says whether there was an evaluation, holds the last stream alone.
    """
    if not state.eval_metric_values:
        return {}
    streams = {
        label: {ours: float(metrics[theirs].compute()) for theirs, ours in METRICS.items() if theirs in metrics}
        for label, metrics in state.eval_metrics.items()
    }
    names = next(iter(streams.values()))
    mean: dict[str, Any] = {name: sum(stream[name] for stream in streams.values()) / len(streams) for name in names}
    return mean if len(streams) == 1 else mean | {"streams": streams}
