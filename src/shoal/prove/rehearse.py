"""Rehearsals: run a recipe with planned faults, real ones, and say what was survived, and how.

The same recipe runs twice: clean, and with the faults. What is compared is what a user would lose:
committed steps, samples, digits of the loss curve, bits of the merged weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoal.config.load import load_recipe
from shoal.data.verify import verify_run
from shoal.engine.instruments.faults import KINDS, PHASES
from shoal.engine.job import Instruments
from shoal.errors import ConfigError, Problem, ShoalError, Stopped, nearest
from shoal.launch import local
from shoal.launch.object_store import refuse_one_store
from shoal.launch.pool import WorkerPool, pool_or_own
from shoal.observe.events import read_lines

_SIGNS = {
    "kill": ("lost",),
    "exit": ("lost",),
    "raise": ("lost",),
    "out-of-memory": ("lost",),
    "stop": ("stuck",),
    "spin": ("stuck",),
    "slow": ("slow-worker",),
    "nan": ("skipped",),
    "spike": ("gradient-outlier",),
    "flip-parameter": ("repaired",),
    "flip-optimizer": ("repaired",),
    "disk-full": ("save-failed", "failed"),
    "sigterm": ("stopped",),
}
"""The event by which each kind is known to have been noticed."""
_CHANGES_THE_RUN = ("nan", "spike")
"""Kinds that change what is learned even when they are noticed: a step is skipped, or clipped."""


@dataclass(frozen=True)
class Fault:
    """One planned fault: KIND:RANK@STEP[:ARGUMENT]."""

    kind: str
    rank: int
    step: int
    argument: str | None = None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read `kill:1@20`, `kill:0@13:apply`, `slow:1@5:0.3`. Raises ConfigError."""
        match = re.fullmatch(r"([a-z-]+):(\d+)@(\d+)(?::(.+))?", text)
        if match is None:
            hint = "expected KIND:RANK@STEP[:ARGUMENT], such as kill:1@20 or kill:0@13:apply"
            raise ConfigError([Problem("--fault", f"cannot read {text!r}", hint)])
        kind, rank, step, argument = match.groups()
        if kind not in KINDS:
            raise ConfigError([Problem("--fault", f"unknown fault {kind!r}", nearest(kind, KINDS))])
        fault = cls(kind, int(rank), int(step), argument)
        if fault.step < 1:
            raise ConfigError([Problem("--fault", f"{text}: steps count from 1")])
        if fault.takes_phase and argument is not None and argument not in (*PHASES, "reducing"):
            hint = nearest(argument, (*PHASES, "reducing"))
            raise ConfigError([Problem("--fault", f"unknown phase {argument!r}", hint)])
        return fault

    @property
    def takes_phase(self) -> bool:
        """Whether the argument says in which phase of the step it strikes."""
        return self.kind in ("kill", "stop", "spin", "exit", "raise")

    def to_json(self) -> dict[str, Any]:
        """As workers take it."""
        plan: dict[str, Any] = {"kind": self.kind, "rank": self.rank, "step": self.step}
        if self.argument is not None:
            plan["phase" if self.takes_phase else "argument"] = self.argument
        return plan

    def __str__(self) -> str:
        return f"{self.kind}:{self.rank}@{self.step}" + (
            f":{self.argument}" if self.argument else ""
        )


@dataclass
class FaultOutcome:
    """What became of one fault. Times are None where it was not noticed, or nothing had to heal."""

    fault: str
    fired: bool = False
    noticed_as: str | None = None
    detection_seconds: float | None = None
    recovery_seconds: float | None = None
    """From the notice to the next committed step."""
    culprit_named: bool = False


@dataclass
class Rehearsal:
    """A run with faults beside the clean one."""

    run: Path
    clean: Path
    faults: list[FaultOutcome] = field(default_factory=list)
    ended: str = "done"
    """`done`, or the first line of the error that ended it."""
    message: str = ""
    """All of that error."""
    committed_steps_lost: int = 0
    steps_redone: int = 0
    sample_problems: list[str] = field(default_factory=list)
    largest_loss_difference: float | None = None
    """Relative, over all steps."""
    same_digits: bool = False
    same_weights: bool = False

    @property
    def survived(self) -> bool:
        """Every fault fired and was noticed, and nothing that was committed is gone."""
        noticed = all(seen.fired and seen.noticed_as is not None for seen in self.faults)
        return noticed and not self.committed_steps_lost and not self.sample_problems

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "run": str(self.run), "clean": str(self.clean)}

    def __str__(self) -> str:
        lines = [f"{'fault':<28} {'noticed as':<17} {'after':>8} {'recovered':>10}  culprit"]
        for seen in self.faults:
            noticed = seen.noticed_as or ("not noticed" if seen.fired else "did not happen")
            after, back = (_seconds(t) for t in (seen.detection_seconds, seen.recovery_seconds))
            named = "named" if seen.culprit_named else "-"
            lines.append(f"{seen.fault:<28} {noticed:<17} {after:>8} {back:>10}  {named}")
        samples = (
            "none lost, none read twice"
            if not self.sample_problems
            else "; ".join(self.sample_problems[:3])
        )
        difference = self.largest_loss_difference
        beside = (
            "identical to the last digit"
            if self.same_digits
            else f"largest relative difference {difference:.2g}"
            if difference is not None
            else "cannot be compared"
        )
        return "\n".join(
            [
                *lines,
                f"committed steps lost: {self.committed_steps_lost}; "
                f"done again: {self.steps_redone}",
                f"samples: {samples}",
                f"losses beside the clean run: {beside}",
                f"merged weights: {'the same bits' if self.same_weights else 'other bits'}",
            ]
        )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def rehearse(
    recipe: str | Path,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    *,
    faults: Sequence[Fault],
    out: Path,
    pool: WorkerPool | None = None,
    clean: Path | None = None,
    console: bool = False,
) -> Rehearsal:
    """Run `recipe` clean (unless `clean` names such a run) and with `faults`, below `out`.

    Raises ConfigError for faults that the recipe has no rank or step for, and the errors of a run
    that cannot start. A run that its faults end is a result, not an error.
    """
    texts = local.override_texts(overrides)
    refuse_one_store(load_recipe(str(recipe), texts))
    with pool_or_own(pool) as workers:
        if clean is None:
            clean = out / "clean"
            local.train(recipe, texts, out=clean, console=console, pool=workers)
        steps = len(losses_of(clean))
        beyond = [str(fault) for fault in faults if fault.step > steps]
        if beyond:
            what = f"{', '.join(beyond)}: the run has {steps} steps"
            raise ConfigError([Problem("--fault", what, "name an earlier step")])
        run = out / "rehearsed"
        found = Rehearsal(run, clean)
        story = _run(
            recipe, texts, faults=faults, run=run, pool=workers, console=console, into=found
        )
    found.faults = [_outcome(fault, number, story) for number, fault in enumerate(faults)]
    _compare(found)
    (out / "rehearsal.json").write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
    return found


def _run(
    recipe: str | Path,
    texts: list[str],
    *,
    faults: Sequence[Fault],
    run: Path,
    pool: WorkerPool,
    console: bool,
    into: Rehearsal,
) -> list[dict[str, Any]]:
    """The run with its faults; one that was asked to stop is resumed, as its user would."""
    story: list[dict[str, Any]] = []
    plans = tuple({**fault.to_json(), "number": n} for n, fault in enumerate(faults))
    instruments = Instruments(planned_faults=plans)
    try:
        local.train(
            recipe,
            texts,
            out=run,
            console=console,
            pool=pool,
            instruments=instruments,
            story=story,
        )
    except Stopped as stopped:
        story.append({"event": "stopped", "monotonic": time.monotonic(), "text": str(stopped)})
        local.resume(run, console=console, pool=pool)
    except ShoalError as error:
        into.message = str(error)
        into.ended = into.message.partition("\n")[0]
        story.append({"event": "failed", "monotonic": time.monotonic(), "text": into.ended})
    return story


def _outcome(fault: Fault, number: int, story: list[dict[str, Any]]) -> FaultOutcome:
    """What the story says about one fault."""
    seen = FaultOutcome(str(fault))
    fired = next((e for e in story if e["event"] == "fault" and e["number"] == number), None)
    if fired is None:
        return seen
    seen.fired = True
    later = [event for event in story if event["monotonic"] >= fired["at"]]
    sign = next((e for e in later if e["event"] in _SIGNS[fault.kind]), None)
    if sign is None:
        return seen
    seen.noticed_as = str(sign.get("why") or sign["event"])
    seen.detection_seconds = sign.get("noticed_at", sign["monotonic"]) - fired["at"]
    back = next((e for e in later if e["event"] == "recovered"), None)
    seen.recovery_seconds = None if back is None else back["seconds"]
    blamed = {sign.get("rank"), *sign.get("ranks", [])} - {None} or _blamed(sign.get("text", ""))
    seen.culprit_named = blamed == {fault.rank}
    return seen


def _blamed(text: str) -> set[int]:
    """Ranks that a message names; several mean that it cannot tell."""
    lists = re.findall(r"rank (\d+(?:, \d+)*)", text.partition(";")[0])
    return {int(word) for found in lists for word in found.split(", ")}


def losses_of(run: Path) -> dict[int, float]:
    """Step -> loss of the committed steps."""
    rows = read_lines(run / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def weights_of(run: Path) -> str | None:
    """sha256 of the merged weights; None when the run wrote none."""
    path = run / "model" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _compare(found: Rehearsal) -> None:
    ours, clean = losses_of(found.run), losses_of(found.clean)
    events = read_lines(found.run / "events.jsonl")
    redone = [e.get("rows", 0) for e in events if e["event"] == "redone"]
    uncommitted = sum(1 for e in events if e["event"] == "lost")
    found.steps_redone = sum(redone) + uncommitted
    found.committed_steps_lost = len(set(clean) - set(ours)) if found.ended == "done" else 0
    pairs = [(ours[step], clean[step]) for step in clean if ours.get(step) is not None]
    found.largest_loss_difference = max((abs(a - b) / abs(b) for a, b in pairs), default=None)
    found.same_digits = ours == clean
    mine = weights_of(found.run)
    found.same_weights = mine is not None and mine == weights_of(found.clean)
    if (found.run / "samples.jsonl").is_file():
        found.sample_problems = verify_run(found.run).problems
