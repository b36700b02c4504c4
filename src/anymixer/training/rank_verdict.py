"""Which rank of a launch is lost, and how to say so: a function of what the ranks last told of themselves.

torch ends a rank that has waited `dist_timeout` for a collective, but says only which collective; Composer's launcher
and torchrun notice a process that has died, but not one that is stopped or waits for ever, nor one of another machine.
So every rank tells the others once a second what it does (`rank_watch`), and this is what they conclude.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

# A rank that has failed is waited for this long: the others may be about to find the same mistake themselves.
_FAILURE_GRACE = 5.0
# torch ends a rank that waits at dist_timeout; this is said shortly before.
_STANDSTILL_SHARE = 0.9
_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank tells: who it is, how far, what it does.

    machine: host name, and the name space of process ids where there is one; "" if ids mean nothing to others.
    born: when the process began, so that its id is not taken for another's. count: goes up with every beat.
    moves: goes up with every event of the training loop. waits: as in Whereabouts. ending: it was asked to end, or has
    come to its end. failure: why it ends before its time. verdict, speaker: what it has concluded, if anything, and
    who is to say so.
    """

    rank: int
    host: str
    machine: str
    pid: int
    born: float
    count: int = 0
    moves: int = 0
    step: int = 0
    doing: str = "starting"
    waits: bool = False
    ending: bool = False
    failure: str | None = None
    verdict: str | None = None
    speaker: int = 0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Beat":
        """What `to_json` wrote."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def position(self) -> str:
        """What it was last seen doing."""
        return f"step {self.step + 1}: {self.doing}"


@dataclass(frozen=True)
class Seen:
    """A rank's last beat, and when it and its moves were first seen, by this process's clock in seconds."""

    beat: Beat
    beat_at: float
    moved_at: float

    def updated(self, beat: Beat, now: float) -> "Seen":
        """What is seen once another beat is read."""
        return Seen(
            beat,
            now if beat.count != self.beat.count else self.beat_at,
            now if beat.moves != self.beat.moves else self.moved_at,
        )


@dataclass(frozen=True)
class Verdict:
    """text: which rank, what became of it, who waited for it. lost: their numbers. speaker: the rank that says so."""

    text: str
    lost: tuple[int, ...]
    speaker: int


def judge(
    seen: Mapping[int, Seen],
    me: int,
    exchanged_at: float,
    now: float,
    *,
    rank_timeout: float,
    dist_timeout: float,
    condition: Callable[[Beat], str | None],
    impatient: bool = False,
    asked_to_end: bool = False,
) -> Verdict | None:
    """Return what is wrong with the launch, or None.

    Args:
        seen: the ranks, this one among them.
        me: this rank.
        exchanged_at: when the beats were last read; a rank is silent only up to then.
        now: seconds, by the clock of `seen`.
        rank_timeout, dist_timeout: as in TrainerConfig.
        condition: "gone", "stopped" or "running" for a process of this machine, None for one that cannot be known.
        impatient: this rank has lost the connection to another already, and wants to know to which.
        asked_to_end: this rank was asked to end; so were others then, which is no failure of theirs.
    """
    told = [other.beat for other in seen.values() if other.beat.verdict and other.beat.rank != me]
    if told:
        return Verdict(str(told[0].verdict), (), told[0].speaker)
    others = [other for rank, other in seen.items() if rank != me]
    for found, how in (
        ([o.beat for o in others if not o.beat.ending and condition(o.beat) == "gone"], "has died"),
        (_failed(others, now, 0.0 if impatient else _FAILURE_GRACE, asked_to_end), "has failed"),
        (_silent(others, exchanged_at, rank_timeout), f"has given no sign of life for {rank_timeout:g} s"),
        (_behind(seen, now, _STANDSTILL_SHARE * dist_timeout), f"has kept the others waiting for {dist_timeout:g} s"),
    ):
        if found:
            return _verdict(seen, found, how, condition)
    return None


def unanswered(seen: Mapping[int, Seen], condition: Callable[[Beat], str | None]) -> Verdict:
    """What to conclude when rank 0, which keeps what the ranks tell, answers no more."""
    how = "has died" if condition(seen[0].beat) == "gone" else "answers no more"
    return _verdict(seen, [seen[0].beat], how, condition)


def _failed(others: Sequence[Seen], now: float, grace: float, excuse: bool) -> list[Beat]:
    failed = [o for o in others if o.beat.failure is not None and not (excuse and o.beat.ending)]
    return [o.beat for o in failed if now - o.beat_at >= grace]


def _silent(others: Sequence[Seen], exchanged_at: float, limit: float) -> list[Beat]:
    return [o.beat for o in others if not o.beat.ending and exchanged_at - o.beat_at > limit]


def _behind(seen: Mapping[int, Seen], now: float, limit: float) -> list[Beat]:
    """The ranks that the others wait for, where the whole launch has stood still for longer than the limit.

    Those that have come least far; of these, the ones that do not wait themselves. None where all are as far and
    do the same: compiling, say, which may take its time, or a deadlock, which torch's own time-out ends.
    """
    if any(now - one.moved_at <= limit or one.beat.ending for one in seen.values()):
        return []
    beats = [one.beat for one in seen.values()]
    last = [beat for beat in beats if beat.moves == min(b.moves for b in beats)]
    found = [beat for beat in last if not beat.waits] or last
    return found if len(found) < len(beats) else []


def _verdict(
    seen: Mapping[int, Seen], lost: Sequence[Beat], how: str, condition: Callable[[Beat], str | None]
) -> Verdict:
    ranks = tuple(beat.rank for beat in lost)
    waiting = [one.beat for rank, one in sorted(seen.items()) if rank not in ranks] or list(lost)
    sentences = [_sentence(beat, how, condition) for beat in lost[:_NAMED]]
    if len(lost) > _NAMED:
        sentences.append(f"and {len(lost) - _NAMED} ranks more")
    text = (
        f"{'; '.join(sentences)}. {waiting[0]} is in {waiting[0].position()}. "
        "Start the same command again; with autoresume=true it continues from the last checkpoint"
    )
    return Verdict(text, ranks, waiting[0].rank)


def _sentence(beat: Beat, how: str, condition: Callable[[Beat], str | None]) -> str:
    stopped = " (the process is stopped)" if condition(beat) == "stopped" else ""
    failure = f" ({beat.failure})" if beat.failure else ""
    return f"{beat} {how}{stopped}{failure}; last seen in {beat.position()}"
