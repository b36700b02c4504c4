import math
from types import SimpleNamespace

import pytest
from composer.core import Time, Timestamp, TimeUnit

from anymixer.errors import UserError
from anymixer.training import SchedulerConfig
from anymixer.training.schedulers import build_scheduler

STEPS = 1000


def multipliers(config: SchedulerConfig, batch: int = 1, max_duration: str = "1000ba") -> list[float]:
    """The schedule at every step of a training of 1000 steps, `batch` sequences each."""
    scheduler = build_scheduler(config)
    state = SimpleNamespace(max_duration=Time.from_timestring(max_duration), dataloader_len=Time(250, TimeUnit.BATCH))
    values = []
    for step in range(STEPS + 1):
        state.timestamp = Timestamp(batch=step, sample=step * batch, epoch=step // 250)
        values.append(scheduler(state))
    return values


def linear(step: int, warmup: int, alpha_f: float) -> float:
    return step / warmup if step < warmup else 1 + (alpha_f - 1) * (step - warmup) / (STEPS - warmup)


def cosine(step: int, warmup: int, alpha_f: float) -> float:
    if step < warmup:
        return step / warmup
    return alpha_f + (1 - alpha_f) * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2


def constant(step: int, warmup: int, alpha_f: float) -> float:
    return min(1.0, step / warmup)


@pytest.mark.parametrize(
    ("name", "formula", "alpha_f"),
    [
        ("linear_decay_with_warmup", linear, 0.02),
        ("cosine_with_warmup", cosine, 0.02),
        ("constant_with_warmup", constant, None),
    ],
)
def test_composers_schedules_match_their_formulas(name, formula, alpha_f):
    values = multipliers(SchedulerConfig(name=name, t_warmup="0.06dur", alpha_f=alpha_f))
    assert values == pytest.approx([formula(step, 60, alpha_f) for step in range(STEPS + 1)])


def test_inverse_square_root_matches_its_formula():
    values = multipliers(SchedulerConfig(name="inverse_sqrt_with_warmup", t_warmup="0.06dur"), batch=8)
    assert values == pytest.approx([step / 60 if step < 60 else (60 / step) ** 0.5 for step in range(STEPS + 1)])
    with pytest.raises(UserError, match=r"scheduler.t_warmup: inverse_sqrt_with_warmup falls from where"):
        SchedulerConfig(name="inverse_sqrt_with_warmup", t_warmup="0ba").validate("100ba")


def wsd(step: int, warmup: int, decay: int, alpha_f: float, kind: str) -> float:
    if step < warmup:
        return step / warmup
    over = max(0.0, (step - (STEPS - decay)) / decay)
    return 1 - (1 - alpha_f) * (math.sqrt(over) if kind == "sqrt" else over)


@pytest.mark.parametrize("kind", ["linear", "sqrt"])
@pytest.mark.parametrize(
    ("max_duration", "t_warmup", "t_decay"),
    [("1000ba", "0.06dur", "0.2dur"), ("32000sp", "1920sp", "0.2dur"), ("4ep", "60ba", "200ba")],
)
def test_warmup_stable_decay_matches_its_formula(kind, max_duration, t_warmup, t_decay):
    config = SchedulerConfig(name="warmup_stable_decay", t_warmup=t_warmup, t_decay=t_decay, alpha_f=0.1, decay=kind)
    values = multipliers(config, batch=32, max_duration=max_duration)
    assert values == pytest.approx([wsd(step, 60, 200, 0.1, kind) for step in range(STEPS + 1)])


def test_a_longer_training_keeps_the_stable_stretch():
    config = SchedulerConfig(name="warmup_stable_decay", t_warmup="60ba", t_decay="100ba")
    assert multipliers(config)[:900] == multipliers(config, max_duration="1500ba")[:900]


def test_warmup_and_decay_longer_than_the_training_are_refused():
    with pytest.raises(UserError, match=r"^scheduler.t_decay"):
        multipliers(SchedulerConfig(name="warmup_stable_decay", t_warmup="0.6dur", t_decay="0.5dur"))
