"""The hang doctor's judgement: who is stuck, who only waits, who is starved."""

from __future__ import annotations

from dataclasses import replace

from shoal.launch.deaths import death_of
from shoal.launch.hang import LOOKS, Doctor, Sighting, report
from shoal.launch.pace import Pace
from shoal.observe.pulse import Beat

COMPUTING = Beat(0.0, 0.2, 12, 40, 0, 1, 0, "forward", "")
WAITING = replace(COMPUTING, collective=41, num_bytes=800, phase="reduce", operation="all_reduce")


def seen(rank: int, beat: Beat | None, silent: float, state: str, cpu: float | None) -> Sighting:
    return Sighting(rank, 1000 + rank, beat, silent, state, cpu)


def judged(*pairs: tuple[Sighting, Sighting], threads: int = 1) -> list[tuple[int, str]]:
    """What the doctor says once it has seen the second as often as it wants to."""
    doctor = Doctor(silence_seconds=1.0, threads=threads)
    doctor.look([first for first, _ in pairs])
    for _ in range(LOOKS - 1):
        doctor.look([second for _, second in pairs])
    return [(stuck.rank, stuck.reason) for stuck in doctor.look([second for _, second in pairs])]


def moving(rank: int, beat: Beat, *, silent: float, cpu: float, state: str = "runs"):
    """A worker first seen at its beat, then after `silent` seconds in which it used `cpu`."""
    return seen(rank, beat, 0.0, state, 5.0), seen(rank, beat, silent, state, 5.0 + cpu)


def test_a_short_silence_is_nothing() -> None:
    assert judged(moving(0, COMPUTING, silent=0.9, cpu=0.9)) == []


def test_patience_is_three_times_what_it_lately_took() -> None:
    slow = replace(COMPUTING, expected_seconds=4.0)
    assert judged(moving(0, slow, silent=11.0, cpu=11.0)) == []
    assert judged(moving(0, slow, silent=13.0, cpu=13.0)) != []


def test_one_that_computes_without_a_step() -> None:
    found = judged(
        moving(0, COMPUTING, silent=1.5, cpu=1.5), moving(1, WAITING, silent=1.5, cpu=0.0)
    )
    assert found == [(0, "runs without a step (a live-lock)")]


def test_one_that_sleeps() -> None:
    found = judged(moving(0, COMPUTING, silent=1.5, cpu=0.0, state="sleeps"))
    assert found == [(0, "gives no sign (sleeps)")]


def test_one_that_was_seen_asleep_by_chance() -> None:
    """A thread that computes waits for a lock now and then: one such look ends no worker."""
    doctor = Doctor(silence_seconds=1.0)
    doctor.look([seen(0, COMPUTING, 0.0, "runs", 5.0)])
    for _ in range(3 * LOOKS):
        for _ in range(LOOKS - 1):
            assert doctor.look([seen(0, COMPUTING, 9.0, "sleeps", 5.4)]) == []
        assert doctor.look([seen(0, COMPUTING, 9.0, "runs", 5.4)]) == []
    for _ in range(LOOKS - 1):
        assert doctor.look([seen(0, COMPUTING, 9.0, "sleeps", 5.4)]) == []
    assert doctor.look([seen(0, COMPUTING, 9.0, "sleeps", 5.4)]) != []


def test_what_threads_compute_together_is_no_live_lock() -> None:
    """On half of its two cores a worker of two threads uses as much as one that spins on one."""
    slow = moving(0, COMPUTING, silent=1.5, cpu=1.5)
    assert judged(slow) == [(0, "runs without a step (a live-lock)")]
    assert judged(slow, threads=2) == []


def test_a_starved_worker_is_not_stuck() -> None:
    """On a busy machine it runs, but gets little time: it must not be ended for that."""
    assert judged(moving(0, COMPUTING, silent=20.0, cpu=0.4)) == []
    assert judged(moving(0, COMPUTING, silent=100.0, cpu=0.4)) == [(0, "gets no time")]


def test_a_stopped_one_is_known_wherever_it_stands() -> None:
    for beat in (COMPUTING, WAITING):
        found = judged(moving(1, beat, silent=0.5, cpu=0.0, state="is stopped"))
        assert found == [(1, "is stopped (SIGSTOP)")]


def test_waiting_is_no_fault() -> None:
    assert (
        judged(
            moving(0, WAITING, silent=500.0, cpu=0.0, state="sleeps"),
            ()[:0]
            or moving(1, replace(COMPUTING, expected_seconds=400.0), silent=500.0, cpu=500.0),
        )
        == []
    )


def test_calls_that_do_not_match() -> None:
    other = replace(WAITING, operation="broadcast", num_bytes=16)
    found = judged(
        *(moving(rank, WAITING, silent=30.0, cpu=0.0, state="sleeps") for rank in (0, 1)),
        moving(2, other, silent=30.0, cpu=0.0, state="sleeps"),
    )
    ((rank, reason),) = found
    assert rank == 2 and "is broadcast of 16 bytes" in reason
    assert "theirs collective 41 is all_reduce of 800 bytes" in reason


def test_all_wait_and_nothing_moves() -> None:
    found = judged(*(moving(r, WAITING, silent=30.0, cpu=0.0, state="sleeps") for r in (0, 1)))
    assert [rank for rank, _ in found] == [0, 1]


LARGE = replace(WAITING, num_bytes=100_000_000)
"""At 10 Mbit/s it takes 80 s."""


def all_silent(doctor: Doctor, seconds: float, *beats: Beat) -> list[int]:
    seen_now = [seen(rank, beat, seconds, "sleeps", 5.0) for rank, beat in enumerate(beats)]
    return [stuck.rank for stuck in doctor.look(seen_now)]


def test_a_sum_over_a_slow_link_goes_on() -> None:
    """It ended innocent workers after 20 s; patience is now three times what the bytes take."""
    doctor = Doctor(silence_seconds=1.0, bytes_per_second=1.25e6)
    for seconds in (19.0, 21.0, 80.0, 250.0):
        assert all_silent(doctor, seconds, LARGE, LARGE) == []
    assert all_silent(doctor, 261.0, LARGE, LARGE) == [0, 1]
    assert all_silent(Doctor(silence_seconds=1.0), 21.0, LARGE, LARGE) == [0, 1]


def test_who_has_sent_waits_in_the_next_collective() -> None:
    """A broadcast counts bytes at its source alone, which is through before the others have it."""
    doctor = Doctor(silence_seconds=1.0, bytes_per_second=1.25e6)
    source = replace(LARGE, operation="broadcast")
    leaf, after = replace(source, num_bytes=0), replace(WAITING, collective=42, num_bytes=0)
    assert all_silent(doctor, 60.0, source, leaf, leaf) == []
    assert all_silent(doctor, 60.0, after, leaf, leaf) == []
    assert all_silent(doctor, 261.0, after, leaf, leaf) == [0]


def test_who_is_stuck_outside_a_slow_sum_is_found_at_once() -> None:
    """Patience with the link is none with a worker: one that is stopped, one that does not come."""
    doctor = Doctor(silence_seconds=1.0, bytes_per_second=1.25e6)
    stopped = [seen(0, LARGE, 5.0, "sleeps", 1.0), seen(1, LARGE, 5.0, "is stopped", 1.0)]
    assert [stuck.rank for stuck in doctor.look(stopped)] == [1]
    for _ in range(LOOKS):
        late = [seen(0, LARGE, 9.0, "sleeps", 1.0), seen(1, COMPUTING, 9.0, "sleeps", 1.0)]
        found = [stuck.rank for stuck in doctor.look(late)]
    assert found == [1]


def test_the_table_says_who_waits_for_whom() -> None:
    lines = report([seen(0, WAITING, 2.0, "sleeps", 1.0), seen(1, COMPUTING, 2.5, "runs", 1.0)])
    assert lines[0].startswith(
        "worker 0: step 12, reduce, in collective 41 (all_reduce, 800 bytes)"
    )
    assert lines[-1] == "workers 0 wait for worker 1"


def test_what_a_death_is_called() -> None:
    known = {"rank": 1, "step": 7, "where": "step 7, forward", "error": None, "stuck": None}
    assert death_of(**known, status=-9, ran_out=False).text == "worker 1 was killed (SIGKILL)"
    assert death_of(**known, status=-9, ran_out=True).kind == "out-of-memory"
    assert death_of(**known, status=-11, ran_out=True).kind == "killed"
    assert death_of(**known, status=0, ran_out=False).kind == "exited"
    failed = {**known, "error": {"text": "ValueError: x", "trace": "..."}}
    assert death_of(**failed, status=1, ran_out=False).text == "worker 1: ValueError: x"
    stuck = {**known, "stuck": "is stopped (SIGSTOP)"}
    assert death_of(**stuck, status=-9, ran_out=True).kind == "stuck"


def paced(*seconds: float, steps: int = 12) -> list[int]:
    """Ranks named slow when rank r computes seconds[r] a step."""
    pace, named = Pace(), []
    for step in range(steps):
        for rank, own in enumerate(seconds):
            message = {"generation": 1, "rank": rank, "step": step, "compute_seconds": own}
            if (slow := pace.note(message)) is not None:
                named.append(slow["rank"])
    return named


def test_a_slow_worker_is_named_once() -> None:
    assert paced(0.5, 0.9) == [1]
    assert paced(0.9, 0.5, 0.5, 0.5) == [0]


def test_small_differences_are_noise() -> None:
    assert paced(0.5, 0.6) == []
    assert paced(0.01, 0.03) == []
    assert paced(0.7) == []
