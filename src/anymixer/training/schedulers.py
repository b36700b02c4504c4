"""Learning-rate schedules: Composer's, and two that it lacks: warm-up, stable, decay (WSD), and inverse square root."""

import math
import warnings
from typing import TYPE_CHECKING, Any

from composer.core import State
from composer.optim import ComposerScheduler, LinearScheduler

# The only conversion of "0.1dur" or "1ep" that agrees with Composer's own schedules to the batch.
from composer.optim.scheduler import _convert_time

from anymixer.errors import UserError
from anymixer.training.named_table import NamedTable, check_kwargs
from anymixer.training.times import for_composer, parse_time
from anymixer.training.trainer_config import INVERSE_SQRT, WSD, WSD_DECAY

if TYPE_CHECKING:
    from anymixer.training.trainer_config import SchedulerConfig

SCHEDULERS = NamedTable(
    section="scheduler",
    factories={
        "constant_with_warmup": "composer.optim:ConstantWithWarmupScheduler",
        "cosine_with_warmup": "composer.optim:CosineAnnealingWithWarmupScheduler",
        "linear_decay_with_warmup": "composer.optim:LinearWithWarmupScheduler",
        INVERSE_SQRT: "anymixer.training.schedulers:InverseSquareRootScheduler",
        WSD: "anymixer.training.schedulers:WarmupStableDecayScheduler",
    },
    one_name=True,
)


class WarmupStableDecayScheduler(ComposerScheduler):
    """Linear warm-up from 0 to 1, a long stretch at 1, then a decay to `alpha_f` (Hu et al. 2024, MiniCPM).

    The stretch may be lengthened after the fact: resume a checkpoint from before the decay with a
    larger max_duration. With x in [0, 1] the share of the decay that is over, the multiplier is
    1 - (1 - alpha_f) x for "linear" and 1 - (1 - alpha_f) sqrt(x) for "sqrt" (the 1-sqrt decay of
    Hägele et al. 2024, which loses less at the same length).

    Args:
        t_warmup: length of the warm-up.
        t_decay: length of the decay, which ends at `t_max`.
        alpha_f: multiplier at the end.
        decay: "linear" or "sqrt" (checked by SchedulerConfig).
        t_max: where the schedule ends; after it the multiplier stays at `alpha_f`.
    """

    def __init__(
        self,
        t_warmup: str,
        t_decay: str = WSD_DECAY,
        alpha_f: float = 0.0,
        decay: str = "sqrt",
        t_max: str = "1dur",
    ) -> None:
        self.t_decay = t_decay
        self.t_max = t_max
        self.alpha_f = alpha_f
        self.decay = decay
        self.t_warmup = t_warmup
        self.warmup = LinearScheduler(alpha_i=0.0, alpha_f=1.0, t_max=t_warmup)

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """Return the multiplier of the learning rate at `state.timestamp`."""
        t_warmup = _convert_time(self.t_warmup, state)
        t_max = _convert_time(self.t_max, state, ssr=ssr)
        t_decay = _convert_time(self.t_decay, state, ssr=ssr)
        if t_warmup + t_decay > t_max:
            raise UserError(
                f"scheduler.t_decay: t_warmup ({t_warmup}) and t_decay ({t_decay}) "
                f"together are longer than the schedule ({t_max})"
            )
        if state.timestamp < t_warmup:
            return self.warmup(state)
        start, now = (t_max - t_decay).value, state.timestamp.get(t_max.unit).value
        if now < start:
            return 1.0
        over = min(1.0, (now - start) / t_decay.value) if t_decay.value else 1.0
        fallen = math.sqrt(over) if self.decay == "sqrt" else over
        return 1.0 - (1.0 - self.alpha_f) * fallen


class InverseSquareRootScheduler(ComposerScheduler):
    """Linear warm-up from 0 to 1, then sqrt(t_warmup / t) (arXiv 1706.03762, 5.3), which knows no end.

    Args:
        t_warmup: length of the warm-up, more than 0 (checked by SchedulerConfig; a share of a short training may still
            come to 0 steps, of which the first then counts as the warm-up).
    """

    def __init__(self, t_warmup: str) -> None:
        self.t_warmup = t_warmup

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """Return the multiplier of the learning rate at `state.timestamp`."""
        t_warmup = _convert_time(self.t_warmup, state)
        warmup, now = max(1, t_warmup.value), state.timestamp.get(t_warmup.unit).value
        return now / warmup if now < warmup else math.sqrt(warmup / now)


def scheduler_kwargs(config: "SchedulerConfig") -> dict[str, Any]:
    """Return the keys of `config` that are set, as keyword arguments of the schedule it names.

    Raises UserError for an unknown name, or for a key that is set but that this schedule does not have.
    """
    kwargs = {name: value for name, value in vars(config).items() if name != "name" and value is not None}
    check_kwargs(SCHEDULERS.factory(config.name), kwargs, "scheduler")
    return kwargs


def build_scheduler(config: "SchedulerConfig") -> ComposerScheduler:
    """Build the schedule of a run; Composer steps it after every batch."""
    # Composer's own words of it, several lines and twice, name no key: see `warmup_note`.
    warnings.filterwarnings("ignore", message="The warmup duration is 0", category=UserWarning)
    return SCHEDULERS.build_one(config.name, scheduler_kwargs(config))


def warmup_note(config: "SchedulerConfig", state: State) -> str | None:
    """Return a line to say where the training is too short for the warm-up that was asked for, else None."""
    asked, _ = parse_time(config.t_warmup, "scheduler.t_warmup")
    found = _convert_time(for_composer(config.t_warmup), state)
    if asked == 0 or found.value > 0:
        return None
    return f"scheduler.t_warmup: {config.t_warmup} of {state.max_duration} comes to {found}: there is no warm-up"
