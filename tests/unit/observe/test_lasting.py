"""What lasts is said again while it goes on, ever less often."""

from __future__ import annotations

from shoal.observe.lasting import Lasting


def test_it_is_said_after_three_seconds_and_then_after_twice_as_long_each_time() -> None:
    now, said = 0.0, list[str]()
    told = Lasting(said.append, clock=lambda: now)
    told.begin("counting")
    for tick in range(1, 301):
        now = tick / 10
        told.at(tick / 300)
    assert said == [
        "counting",
        "counting: 3 s so far, 10% done",
        "counting: 6 s so far, 20% done",
        "counting: 12 s so far, 40% done",
        "counting: 24 s so far, 80% done",
    ]


def test_a_new_phase_begins_anew() -> None:
    now, said = 100.0, list[str]()
    told = Lasting(said.append, clock=lambda: now)
    told.begin("one")
    now = 104.0
    told.begin("two")
    now = 106.9
    told.at(0.5)
    assert said == ["one", "two"]
    now = 107.0
    told.at(0.5)
    assert said[-1] == "two: 3 s so far, 50% done"
