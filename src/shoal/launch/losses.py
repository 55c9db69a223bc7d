"""What a run has lost so far: what each worker died of, how often a step failed, what it cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from shoal.launch.deaths import Death, death_of
from shoal.launch.site import Site
from shoal.launch.supervised import SupervisedWorker, memory_kills


class Losses:
    """`retries`: so often a step may fail."""

    def __init__(self, sites: Sequence[Site], *, retries: int) -> None:
        self._sites, self._retries = sites, retries
        self._failures: Counter[int] = Counter()
        self._places: dict[int, tuple[int, str]] = {}
        """Step and place of each rank's last error: the same twice is no accident."""
        self._memory_kills = memory_kills(sites)
        self._counted = 0
        self._at: float | None = None
        self._hurt = self._stepped = 0
        """The generations that were lost, and that had a step, last."""

    def examine(self, one: SupervisedWorker) -> Death:
        """What a worker that has ended died of."""
        beat = one.site.last_beat(one.rank)
        kills, before = memory_kills(self._sites), self._memory_kills
        self._memory_kills = kills
        return death_of(
            rank=one.rank,
            status=one.worker.status or 0,
            step=beat.step if beat is not None else 0,
            where=beat.where if beat is not None else "starting",
            error=one.error,
            stuck=one.stuck,
            gone=one.site.gone,
            ran_out=kills > before,
        )

    def count(
        self, one: SupervisedWorker, death: Death, *, generation: int
    ) -> tuple[int, bool, bool]:
        """(Times that its step has failed, whether that is too often, whether twice at one place).

        What one loss brings about is one.
        """
        with_its_host = one.site.gone is not None and 0 < one.generation < generation
        if not with_its_host and (one.generation == 0 or self._counted != generation):
            self._counted = generation
            self._failures[death.step] += 1
        times = self._failures[death.step]
        most = min(self._retries, 1) if death.kind == "out-of-memory" else self._retries
        again = bool(death.place) and self._places.get(one.rank) == (death.step, death.place)
        self._places[one.rank] = death.step, death.place
        return times, again or times > most, again

    def begin(self, generation: int) -> None:
        """A generation has lost somebody, as is noticed now."""
        self._at, self._hurt = self._at or time.monotonic(), generation

    def recovered(self, message: dict[str, Any], *, generation: int) -> dict[str, Any] | None:
        """A step was committed: what to tell of the loss before it, once."""
        self._stepped = max(self._stepped, message["generation"])
        if self._at is None or not message["generation"] == generation > self._hurt:
            return None
        seconds, self._at = time.monotonic() - self._at, None
        text = f"step {message['step']} committed {seconds:.2f} s after the loss was noticed"
        return {"step": message["step"], "seconds": seconds, "text": text}

    def is_stillborn(self, generation: int) -> bool:
        """Whether it has lost nobody, as far as is known, and has not come to a step."""
        return generation > max(self._hurt, self._stepped)
