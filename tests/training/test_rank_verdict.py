"""What the ranks of a launch conclude from what they told each other, case by case."""

from dataclasses import replace

import pytest

from anymixer.training.rank_verdict import FAILED, LOST_RANK, Beat, Seen, Verdict, judge, unanswered

NOW = 1000.0
LIMITS = {"rank_timeout": 45.0, "dist_timeout": 300.0}


def launch(ranks=3, **doing):
    """Ranks that beat just now, one step after the other; `rank1={...}` changes what rank 1 tells."""
    seen = {}
    for rank in range(ranks):
        changes = {"step": 6, "moves": 50, "doing": "forward (a.py:1)"} | doing.get(f"rank{rank}", {})
        at = {name: NOW - changes.pop(f"{name}_ago", 0.5) for name in ("beat", "moved")}
        waits_since = NOW - changes.pop("waits_ago", NOW - at["moved"])
        names = {"host": "node7", "machine": "node7 pid:[1]", "pid": 100 + rank, "born": 0.0}
        seen[rank] = Seen(Beat(rank=rank, **names | changes), at["beat"], at["moved"], waits_since)
    return seen


def verdict(seen, me=0, exchanged_ago=0.1, states=None, **more):
    states = states or {}
    return judge(
        seen, me, NOW - exchanged_ago, NOW, **LIMITS, condition=lambda beat: states.get(beat.rank, "running"), **more
    )


def test_a_launch_that_runs_is_left_alone():
    assert verdict(launch()) is None
    assert verdict(launch(rank1={"moves": 3, "moved_ago": 250.0}, rank2={"moved_ago": 20.0})) is None


@pytest.mark.parametrize("seconds", [200.0, 3600.0])
def test_a_long_step_of_all_ranks_is_left_alone(seconds):
    compiling = {"doing": "compiling (convert_frame.py:9)", "moved_ago": seconds}
    assert verdict(launch(rank0=compiling, rank1=compiling, rank2=compiling)) is None


def test_a_rank_that_died_is_named_with_its_last_step():
    seen = launch(rank1={"doing": "backward (graph.py:824)"}, rank0={"doing": "waiting (c10d.py:3)", "step": 7})
    found = verdict(seen, states={1: "gone"})
    assert found.lost == (1,) and found.speaker == 0
    assert "rank 1 (process 101 on node7) has died; last seen in step 7: backward (graph.py:824)." in found.text
    assert "rank 0 (process 100 on node7) is in step 8: waiting (c10d.py:3)." in found.text


def test_the_lowest_of_the_others_speaks():
    assert verdict(launch(), me=2, states={0: "gone", 1: "gone"}).speaker == 2


def test_a_rank_that_came_to_its_end_is_not_missed():
    assert verdict(launch(rank1={"ending": True, "beat_ago": 500.0}), states={1: "gone"}) is None


def test_silence_counts_up_to_the_last_exchange_alone():
    silent = launch(rank2={"beat_ago": 60.0})
    assert verdict(silent, exchanged_ago=30.0) is None
    found = verdict(silent, states={2: "stopped"})
    assert found.lost == (2,) and "no sign of life for 45 s (the process is stopped)" in found.text


def test_those_who_are_behind_keep_the_others_waiting():
    waiting = {"moves": 51, "waits": True, "doing": "waiting for the other ranks", "moved_ago": 280.0}
    slow = {"doing": "waiting for a batch from the data loader", "moved_ago": 290.0}
    found = verdict(launch(rank0=waiting, rank1=slow, rank2=waiting))
    assert found.lost == (1,) and "has kept the others waiting for 270 s" in found.text
    assert found.exit_code == LOST_RANK
    assert "last seen in step 7: waiting for a batch from the data loader" in found.text
    assert verdict(launch(rank0=waiting, rank1=slow | {"moved_ago": 260.0}, rank2=waiting)) is None


def test_of_ranks_as_far_as_each_other_the_one_that_does_not_wait_is_behind():
    waiting = {"waits": True, "moved_ago": 280.0}
    found = verdict(launch(rank0=waiting, rank1={"moved_ago": 280.0}, rank2=waiting))
    assert found.lost == (1,)


def test_where_all_wait_the_odd_one_is_named_first():
    waiting = {"waits": True, "moved_ago": 280.0, "doing": "waiting for the other ranks, in all_reduce (c10d.py:3)"}
    other = waiting | {"doing": "waiting for the other ranks, in barrier (c10d.py:9)"}
    found = verdict(launch(rank0=waiting, rank1=other, rank2=waiting))
    assert (found.lost, found.speaker, found.exit_code) == ((), 0, LOST_RANK)
    assert found.text.startswith(
        "all ranks have waited for 270 s, for each other or for a GPU: rank 1 (process 101 on node7) is in step 7: "
        "waiting for the other ranks, in barrier (c10d.py:9); rank 0 (process 100 on node7) and 1 more rank are in step"
    )
    assert verdict(launch(rank0=waiting, rank1=other | {"waits_ago": 260.0}, rank2=waiting)) is None
    assert verdict(launch(rank0=waiting, rank1=other | {"ending": True}, rank2=waiting)) is None


def test_what_counts_is_how_long_the_others_have_waited():
    """One compiles 200 s and waits 75 s, the other compiles 275 s."""
    waiting = {"waits": True, "moved_ago": 275.0, "waits_ago": 75.0}
    compiling = {"doing": "compiling (convert_frame.py:9)", "moved_ago": 275.0}
    assert verdict(launch(rank0=waiting, rank1=compiling, rank2=waiting)) is None
    assert verdict(launch(rank0=waiting, rank1=compiling, rank2=waiting | {"waits_ago": 275.0})) is None
    waiting["waits_ago"] = 275.0
    assert verdict(launch(rank0=waiting, rank1=compiling, rank2=waiting), me=1).lost == (1,)


def test_who_waits_further_back_is_not_to_blame():
    ahead = {"moves": 51, "waits": True, "moved_ago": 280.0}
    assert verdict(launch(rank0=ahead | {"moves": 50}, rank1=ahead, rank2=ahead)).lost == ()


def test_waiting_counts_from_its_first_beat():
    beat = launch()[1].beat
    seen = Seen(beat, 0.0, 0.0, 0.0).updated(replace(beat, waits=True, count=1), 5.0)
    assert seen.waits_since == 5.0 and seen.updated(replace(beat, waits=True, count=2), 6.0).waits_since == 5.0


def test_seconds_in_which_nothing_was_seen_do_not_count():
    seen = Seen(launch()[1].beat, 940.0, 900.0, 995.0).without(10.0, NOW)
    assert (seen.beat_at, seen.moved_at, seen.waits_since) == (950.0, 910.0, NOW)


def test_a_failure_is_told_after_a_while_or_at_once_to_who_has_felt_it():
    failed = {"failure": "OutOfMemoryError: CUDA", "ending": True, "beat_ago": 1.0}
    assert verdict(launch(rank1=failed)) is None
    for found in (verdict(launch(rank1=failed | {"beat_ago": 6.0})), verdict(launch(rank1=failed), impatient=True)):
        assert found.lost == (1,) and "has failed (OutOfMemoryError: CUDA)" in found.text
        assert found.exit_code == FAILED and "Start the same command again" not in found.text


def test_who_was_asked_to_end_can_be_started_again_and_hides_no_failure():
    asked = {"failure": "was asked to end", "blameless": True, "ending": True, "beat_ago": 6.0}
    found = verdict(launch(rank1=asked))
    assert (found.lost, found.exit_code) == ((1,), LOST_RANK) and "Start the same command again" in found.text
    found = verdict(launch(rank1=asked, rank2={"failure": "ValueError: x", "ending": True, "beat_ago": 6.0}))
    assert (found.lost, found.exit_code) == ((2,), FAILED)


def test_where_all_are_asked_to_end_nobody_has_failed():
    asked = {"failure": "was asked to end", "blameless": True, "ending": True, "beat_ago": 6.0}
    assert verdict(launch(rank0=asked, rank1=asked, rank2=asked), impatient=True, asked_to_end=True) is None
    assert verdict(launch(rank1=asked)).lost == (1,)


def test_who_is_asked_to_end_after_a_failure_is_told_of_it():
    asked = {"failure": "was asked to end", "blameless": True, "ending": True}
    failed = {"failure": "ValueError: x", "ending": True}
    found = verdict(launch(rank0=asked, rank1=failed, rank2=asked), impatient=True, asked_to_end=True)
    assert (found.lost, found.exit_code) == ((1,), FAILED) and "has failed (ValueError: x)" in found.text


def test_what_another_rank_has_concluded_is_taken_over():
    told = Verdict("rank 1 has failed", (1,), 0, FAILED)
    assert verdict(launch(rank2={"verdict": told})) == told


def test_many_lost_ranks_are_counted():
    found = verdict(launch(9), states=dict.fromkeys(range(1, 9), "gone"))
    assert found.text.count("has died") == 4 and "and 4 ranks more" in found.text


def test_rank_0_keeps_what_is_told():
    found = unanswered(launch(), 2, lambda beat: "stopped")
    assert found.lost == (0,) and found.speaker == 1 and "rank 0 (process 100 on node7) answers no more" in found.text
    assert "has died" in unanswered(launch(), 2, lambda beat: "gone").text


def test_a_rank_of_every_machine_says_that_the_store_has_ended():
    seen = launch(4, rank2={"machine": "another"}, rank3={"machine": "another"})
    assert [unanswered(seen, me, lambda beat: None).speaker for me in (1, 2, 3)] == [1, 2, 2]


def test_rank_0_is_not_named_for_a_store_of_torchrun():
    found = unanswered(launch(), 2, lambda beat: None, "torchrun's store at node1:29500")
    assert found.text.startswith(
        "torchrun's store at node1:29500 answers no more. rank 1 (process 101 on node7) is in "
    )
    assert (found.lost, found.speaker, found.exit_code) == ((), 1, LOST_RANK)
    assert unanswered(launch(), 2, lambda beat: "gone", "torchrun's store").lost == (0,)


def test_a_beat_survives_its_way_through_the_store():
    beat = replace(launch()[1].beat, failure='"quoted"\nlines')
    assert Beat.from_json(beat.to_json()) == beat
    beat = replace(beat, verdict=Verdict("x", (1, 2), 3, FAILED))
    assert Beat.from_json(beat.to_json()) == beat
