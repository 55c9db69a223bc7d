"""The pulse: what one process writes, another reads as it was."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from shoal.observe.pulse import Pulse, Watch

OTHER = """
import sys
from pathlib import Path
from shoal.observe.pulse import Pulse
pulse = Pulse(Path(sys.argv[1]), slot=1)
pulse.join(generation=3, rank=1)
pulse.mark("forward", step=17)
pulse.enter("all_reduce", num_bytes=1234)
"""


def test_another_process_reads_it(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "pulse", slots=2)
    assert watch.read(0) is None and watch.read(1) is None
    before = time.monotonic()
    subprocess.run([sys.executable, "-c", OTHER, str(watch.path)], check=True)
    beat = watch.read(1)
    assert beat is not None and watch.read(0) is None
    assert before < beat.beat_at < time.monotonic(), "one clock for all processes"
    assert (beat.step, beat.phase, beat.operation) == (17, "forward", "all_reduce")
    assert (beat.generation, beat.rank, beat.collective, beat.num_bytes) == (3, 1, 1, 1234)
    assert beat.where == "step 17, forward, in collective 1 (all_reduce, 1234 bytes)"


def test_it_knows_how_long_a_phase_takes(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "pulse", slots=1)
    pulse = Pulse(watch.path)
    pulse.mark("forward", step=1)
    first = watch.read(0)
    assert first is not None and first.expected_seconds == 0.0, "never timed"
    time.sleep(0.05)
    pulse.mark("backward")
    pulse.mark("forward", step=2)
    again = watch.read(0)
    assert again is not None and 0.05 <= again.expected_seconds < 1.0


def test_a_part_of_a_phase_says_nothing_of_the_next_part(tmp_path: Path) -> None:
    """Ranks meet at the beginning of a restore that reads for minutes: it was never timed yet."""
    watch = Watch(tmp_path / "pulse", slots=1)
    pulse = Pulse(watch.path)

    def expected() -> float:
        beat = watch.read(0)
        assert beat is not None
        return beat.expected_seconds

    pulse.mark("restore")
    pulse.enter("barrier", num_bytes=0)
    pulse.leave()
    assert expected() == 0.0
    time.sleep(0.05)
    pulse.mark("forward", step=1)
    pulse.mark("restore")
    assert expected() >= 0.05
    pulse.enter("barrier", num_bytes=0)
    pulse.leave()
    assert expected() >= 0.04, "slowly forgotten"


def test_leaving_a_collective_is_a_sign(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "pulse", slots=1)
    pulse = Pulse(watch.path)
    pulse.enter("barrier", num_bytes=0)
    pulse.leave()
    beat = watch.read(0)
    assert beat is not None and beat.operation == "" and beat.collective == 1


def test_what_goes_on_beside_counts_in_the_next_collective(tmp_path: Path) -> None:
    """A barrier of no bytes queues behind sums that nobody waits for yet."""
    watch = Watch(tmp_path / "pulse", slots=1)
    pulse = Pulse(watch.path)

    def num_bytes() -> int:
        pulse.enter("barrier", num_bytes=0)
        beat = watch.read(0)
        assert beat is not None
        pulse.leave()
        return beat.num_bytes

    pulse.begin(1000)
    pulse.begin(500)
    assert num_bytes() == 1500
    pulse.end(1000)
    assert num_bytes() == 500
    pulse.join(generation=2, rank=0)
    assert num_bytes() == 0, "its sums went with the generation before"
    pulse.end(500)
    assert num_bytes() == 0, "one of an earlier generation is no debt"


def test_a_slot_is_forgotten(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "pulse", slots=1)
    Pulse(watch.path).mark("forward", step=1)
    watch.clear(0)
    assert watch.read(0) is None


def test_without_a_file_nothing_is_written() -> None:
    seen = []
    pulse = Pulse()
    pulse.on_mark = lambda phase, step: seen.append((phase, step))
    pulse.mark("forward", step=2)
    pulse.enter("all_reduce", num_bytes=1)
    assert seen == [("forward", 2)]
