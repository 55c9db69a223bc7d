"""How many replicas: timed at the first start, read at the next; else cores are divided."""

from __future__ import annotations

from pathlib import Path

import pytest
from served import NAME, write_model

from shoal.config.serve import serve_settings
from shoal.launch import serving_layout
from shoal.launch.pool import WorkerPool


@pytest.mark.parametrize(
    "given, replicas, threads",
    [(["replicate=2"], 2, 2), (["threads=3"], 1, 3), (["replicate=3", "threads=5"], 3, 5)],
)
def test_what_is_set_stays(
    pool: WorkerPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    replicas: int,
    threads: int,
) -> None:
    monkeypatch.setattr(serving_layout, "usable_cores", lambda: 4)
    folder = write_model(tmp_path / NAME)
    found = serving_layout.settled(
        folder, serve_settings(given), pool=pool, phase=lambda text: pytest.fail(text)
    )
    assert (found.replicate, found.threads) == (replicas, threads)


@pytest.mark.slow
def test_all_cores_are_timed_once(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_layout, "usable_cores", lambda: 2)
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    folder = write_model(tmp_path / NAME)
    said: list[str] = []

    def settle() -> tuple[object, object]:
        found = serving_layout.settled(folder, serve_settings([]), pool=pool, phase=said.append)
        return found.replicate, found.threads

    first = settle()
    assert first in ((1, 2), (2, 1))
    assert said[:2] == ["timing 1 x 2 thread(s)", "timing 2 x 1 thread(s)"]
    speeds = said[2].removeprefix("timed with 8 streams: ").split("; ")
    rates = {each.split(" ")[0]: int(each.split(" ")[-2]) for each in speeds}
    assert set(rates) == {"1", "2"} and rates[str(first[0])] == max(rates.values()) > 0
    said.clear()
    assert settle() == first and len(said) == 1 and said[0].startswith("timed by an earlier start")
    for each in (tmp_path / "cache").rglob("*-serve-*.json"):
        each.write_text("damaged")
    said.clear()
    settle()
    assert len(said) == 3
