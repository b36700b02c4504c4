"""Which rank of a launch is lost, and how to say so: a function of what the ranks last told of themselves.

torch ends a rank that has waited `dist_timeout` for a collective, but says only which collective; Composer's launcher
and torchrun notice a process that has died, but not one that is stopped or waits for ever, nor one of another machine.
So every rank tells the others again and again what it does (`rank_watch`), and this is what they conclude.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, which can be started again.
LOST_RANK = 75
# Something is: it would fail again.
FAILED = 1
# A rank that has failed is waited for this long: the others may be about to find the same mistake themselves.
_FAILURE_GRACE = 5.0
# torch ends a rank that waits at dist_timeout; this is said shortly before.
STANDSTILL_SHARE = 0.9
_NAMED = 4
_HAS_FAILED = "has failed"
_AGAIN = "Start the same command again; with autoresume=true it continues from the last checkpoint"


@dataclass(frozen=True)
class Verdict:
    """text: which rank, what became of it, who waited for it. lost: their numbers. speaker: the rank that says so.
    exit_code: with which all end, LOST_RANK or FAILED."""

    text: str
    lost: tuple[int, ...]
    speaker: int
    exit_code: int = LOST_RANK


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank tells: who it is, how far, what it does.

    machine: where its process id means something; "" if it means nothing to others.
    born: when the process began, so that its id is not taken for another's. count: goes up with every beat.
    moves: goes up with every event of the training loop. waits: as in Whereabouts. ending: it was asked to end, or has
    come to its end. failure: why it ends before its time. blameless: that was no mistake that would come again.
    verdict: what it has concluded, if anything.
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
    blameless: bool = False
    verdict: Verdict | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Beat":
        """What `to_json` wrote."""
        fields = json.loads(text)
        if fields["verdict"] is not None:
            fields["verdict"] = Verdict(**fields["verdict"] | {"lost": tuple(fields["verdict"]["lost"])})
        return cls(**fields)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def position(self) -> str:
        """What it was last seen doing."""
        return f"step {self.step + 1}: {self.doing}"


@dataclass(frozen=True)
class Seen:
    """A rank's last beat; when it, its moves, and that it waits were first seen, by this process's clock in seconds."""

    beat: Beat
    beat_at: float
    moved_at: float
    waits_since: float

    def updated(self, beat: Beat, now: float) -> "Seen":
        """What is seen once another beat is read."""
        return Seen(
            beat,
            now if beat.count != self.beat.count else self.beat_at,
            now if beat.moves != self.beat.moves else self.moved_at,
            now if beat.waits and not self.beat.waits else self.waits_since,
        )

    def without(self, seconds: float, now: float) -> "Seen":
        """The same where the last seconds do not count, because this process saw nothing in them."""
        return Seen(self.beat, *(min(at + seconds, now) for at in (self.beat_at, self.moved_at, self.waits_since)))


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
        asked_to_end: this rank was asked to end; so were others then, which is no failure of theirs, unless they had
            one of their own.
    """
    others = [other for rank, other in seen.items() if rank != me]
    told = [other.beat.verdict for other in others if other.beat.verdict is not None]
    if told:
        return told[0]
    standstill = STANDSTILL_SHARE * dist_timeout
    for found, how in (
        ([o.beat for o in others if not o.beat.ending and condition(o.beat) == "gone"], "has died"),
        (_failed(others, now, 0.0 if impatient else _FAILURE_GRACE, asked_to_end), _HAS_FAILED),
        (_silent(others, exchanged_at, rank_timeout), f"has given no sign of life for {rank_timeout:g} s"),
        (_behind(seen, exchanged_at, standstill), f"has kept the others waiting for {standstill:g} s"),
    ):
        if found:
            return _verdict(seen, found, how, condition)
    return _deadlock(seen, exchanged_at, standstill)


def unanswered(
    seen: Mapping[int, Seen], me: int, condition: Callable[[Beat], str | None], keeper: str | None = None
) -> Verdict:
    """What to conclude when the store answers no more: `keeper`'s, or by default that of rank 0.

    A rank of every machine says so, because no machine can know which of the others are still there.
    """
    speaker = min(rank for rank, one in seen.items() if rank and one.beat.machine == seen[me].beat.machine)
    gone = condition(seen[0].beat) == "gone"
    if keeper is not None and not gone:
        return Verdict(f"{keeper} answers no more. {_and_then(seen[speaker].beat, LOST_RANK)}", (), speaker)
    found = _verdict(seen, [seen[0].beat], "has died" if gone else "answers no more", condition)
    return replace(found, speaker=speaker)


def _failed(others: Sequence[Seen], now: float, grace: float, excuse: bool) -> list[Beat]:
    failed = [o for o in others if o.beat.failure is not None and not (excuse and o.beat.blameless)]
    found = [o.beat for o in failed if now - o.beat_at >= grace]
    return [beat for beat in found if not beat.blameless] or found


def _silent(others: Sequence[Seen], exchanged_at: float, limit: float) -> list[Beat]:
    return [o.beat for o in others if not o.beat.ending and exchanged_at - o.beat_at > limit]


def _behind(seen: Mapping[int, Seen], exchanged_at: float, limit: float) -> list[Beat]:
    """The ranks that the others wait for, where the whole launch has stood still for longer than the limit.

    Those that have come least far and do not wait themselves, if all others have waited, or stood further on, for
    longer than the limit. None where all do the same: compiling, say, which may take its time.
    """
    if any(exchanged_at - one.moved_at <= limit or one.beat.ending for one in seen.values()):
        return []
    least = min(one.beat.moves for one in seen.values())
    last = [one for one in seen.values() if one.beat.moves == least]
    if any(one.beat.waits and exchanged_at - one.waits_since <= limit for one in last):
        return []
    found = [one.beat for one in last if not one.beat.waits]
    return found if len(found) < len(seen) else []


def _deadlock(seen: Mapping[int, Seen], exchanged_at: float, limit: float) -> Verdict | None:
    """What to say where all ranks have waited for longer than the limit: for each other, in different collectives, or
    one of them for its own GPU."""
    beats = [one.beat for _, one in sorted(seen.items())]
    if any(exchanged_at - max(one.moved_at, one.waits_since) <= limit for one in seen.values()) or not all(
        beat.waits and not beat.ending for beat in beats
    ):
        return None
    together: dict[str, list[Beat]] = {}
    for beat in beats:
        together.setdefault(beat.position(), []).append(beat)
    # The fewest first: where one rank of many does something else, that is the one to look at.
    places = sorted(together.items(), key=lambda item: len(item[1]))[:_NAMED]
    sentences = [f"{group[0]}{_and_more(len(group) - 1)} in {position}" for position, group in places]
    text = f"all ranks have waited for {limit:g} s, for each other or for a GPU: {'; '.join(sentences)}. {_AGAIN}"
    return Verdict(text, (), beats[0].rank)


def _and_more(ranks: int) -> str:
    return f" and {ranks} more {'ranks are' if ranks > 1 else 'rank are'}" if ranks else " is"


def _verdict(
    seen: Mapping[int, Seen], lost: Sequence[Beat], how: str, condition: Callable[[Beat], str | None]
) -> Verdict:
    ranks = tuple(beat.rank for beat in lost)
    waiting = [one.beat for rank, one in sorted(seen.items()) if rank not in ranks] or list(lost)
    sentences = [_sentence(beat, how, condition) for beat in lost[:_NAMED]]
    if len(lost) > _NAMED:
        sentences.append(f"and {len(lost) - _NAMED} ranks more")
    would_fail_again = how == _HAS_FAILED and not all(beat.blameless for beat in lost)
    code = FAILED if would_fail_again else LOST_RANK
    return Verdict(f"{'; '.join(sentences)}. {_and_then(waiting[0], code)}", ranks, waiting[0].rank, code)


def _and_then(waiting: Beat, exit_code: int) -> str:
    where = f"{waiting} is in {waiting.position()}"
    return f"{where}. {_AGAIN}" if exit_code == LOST_RANK else where


def _sentence(beat: Beat, how: str, condition: Callable[[Beat], str | None]) -> str:
    stopped = " (the process is stopped)" if condition(beat) == "stopped" else ""
    failure = f" ({beat.failure})" if beat.failure else ""
    return f"{beat} {how}{stopped}{failure}; last seen in {beat.position()}"
