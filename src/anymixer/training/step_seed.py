"""Random numbers that depend on the step alone, so that a resumed run draws what the unbroken one drew."""

import hashlib

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility


class StepSeed(Callback):
    """Seed Python, NumPy and torch before every training step from (seed, step, rank).

    Composer 0.32.1 restores the random state only at the start of an epoch, or when it skips batches
    itself; a dataset that resumes itself in mid-epoch (StreamingDataset) gets neither, and dropout would
    differ after a resume. The event also comes again when automatic microbatching retries a step.
    """

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Seed all generators for the step that begins."""
        step = int(state.timestamp.batch)
        reproducibility.seed_all(step_seed(state.rank_zero_seed, step, dist.get_global_rank()))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return a seed in [0, 2**32 - 1) that is unlike those of neighbouring seeds, steps and ranks."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % reproducibility.MAX_SEED
