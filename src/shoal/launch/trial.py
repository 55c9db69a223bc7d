"""The planner's choice on a CPU, made sure of: the best plans are timed on the recipe itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import xxhash

from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision, format_of
from shoal.engine.prepare import Inputs
from shoal.environment import cache_directory
from shoal.launch.directory import write_whole
from shoal.launch.measuring import measuring_job
from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from shoal.observe.console import Console
from shoal.plan.calibrate import crews, estimator_for, fastest_format, predicted_for
from shoal.plan.cost.step import Prediction
from shoal.plan.from_recipe import choices_of
from shoal.plan.machine import find_here
from shoal.plan.measurements import Measurements, machine_key
from shoal.plan.workload import FORMATS, Crew, Workload

CLOSE = 1.15
"""Plans predicted within this factor of the best are timed: it is about the planner's error."""

TRIAL_SECONDS = 12.0
"""What timing them may take, by prediction; plans beyond it are left to the prediction."""

FIRST_SECONDS = 9.0
"""What measuring the machine and timing plans may take together at a first start, which waits."""

_MOST = 3
_TURNS = 3  # at least: one to warm up, two that count
_MOST_TURNS = 6


@dataclass(frozen=True, eq=False)
class Contender:
    """A plan that may be the best: who computes, and what is foretold of it."""

    crew: Crew
    plan: Prediction
    pass_seconds: float
    """Predicted seconds of one micro batch, forward and backward: the part that is timed."""

    @property
    def micro(self) -> int:
        """Samples per micro batch."""
        return self.plan.candidate.micro_batch_samples

    def step_seconds(self, timed: float | None, *, workload: Workload) -> float:
        """Seconds of a step, with the timed micro batch in place of the predicted one."""
        if timed is None:
            return self.plan.step_seconds
        times = self.plan.candidate.micro_batches(workload)
        return self.plan.step_seconds + times * (timed - self.pass_seconds)


class Trial:
    """Plans a recipe on this machine, and times what the planner cannot tell apart."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        inputs: Inputs,
        measured: Measurements,
        workload: Workload,
        budget_seconds: float = TRIAL_SECONDS,
    ) -> None:
        self._budget = budget_seconds
        self._recipe, self._inputs, self._measured = recipe, inputs, measured
        best, self._ratio = fastest_format(measured)
        precision = FORMATS.get(recipe.precision.compute, best)
        self._workload = replace(workload, precision=precision)
        self._compute = next(name for name, short in FORMATS.items() if short == precision)

    def decide(self, layout: Layout, *, pool: WorkerPool, console: Console) -> Decision:
        """The fastest plan: as predicted, or as timed where several come close."""
        contenders = self._contenders(layout)
        chosen = self._affordable(contenders)
        timed = {}
        if len(chosen) > 1:
            what = f"timing the best {len(chosen)} plans"
            timed = self._timed(chosen, what=what, pool=pool, console=console)
        steps = {
            each: each.step_seconds(timed.get(each), workload=self._workload)
            for each in (chosen if timed else contenders)
        }
        best = min(steps, key=lambda each: steps[each])
        return Decision(
            best.plan.candidate.layout,
            "threads" if best.crew.workers == "threads" else "processes",
            best.crew.threads,
            best.micro,
            format_of(self._compute),
            self._reason(best, steps=steps, is_timed=bool(timed)),
            self._record(best, steps=steps, timed=timed, contenders=contenders),
            {**predicted_for(best.plan), "step_seconds": steps[best]},
        )

    def speedup(
        self, decision: Decision, *, layout: Layout, pool: WorkerPool, console: Console
    ) -> float | None:
        """How much faster a step of `decision` is than the best lone worker's, timed in turns.

        `layout`: as the recipe leaves it open. None where a lone worker cannot be planned.
        """
        contenders = self._contenders(layout)
        lone = next((each for each in contenders if each.crew.count == 1), None)
        taken = next((each for each in contenders if _is_of(decision, each)), None)
        if lone is None or taken is None:
            return None
        what = "timing one worker beside it"
        timed = self._timed([taken, lone], what=what, pool=pool, console=console)
        workload = self._workload
        steps = [each.step_seconds(timed[each], workload=workload) for each in (lone, taken)]
        return steps[0] / steps[1]

    def _crews(self, layout: Layout) -> Iterator[Crew]:
        """Crews that the recipe allows."""
        launch, given = self._recipe.launch, self._recipe.parallel.replicate
        kind = None if launch.workers == "auto" else launch.workers
        if layout.replica_workers > 1 or self._recipe.model.dropout == "framework":
            kind = "processes"
        threads = None if launch.threads_per_worker == "auto" else launch.threads_per_worker
        count = layout.workers if given is not None else None
        for crew in crews(self._measured, count=count, workers=kind, threads=threads):
            copies, left = divmod(crew.count, layout.replica_workers)
            if copies and not left and self._recipe.train.global_batch_samples % copies == 0:
                yield crew

    def _contenders(self, layout: Layout) -> list[Contender]:
        """The best plan of each crew, in the order predicted."""
        space = choices_of(self._recipe, layout=layout, only_replicate=True)
        found = find_here(
            self._measured, workload=self._workload, space=space, among=self._crews(layout)
        )
        return [self._contender(plan) for plan in found.families.values()]

    def _contender(self, plan: Prediction) -> Contender:
        crew = plan.candidate.crew
        assert crew is not None, "plans of a machine have crews"
        estimator = estimator_for(self._measured, crew, workload=self._workload)
        return Contender(crew, plan, estimator.pass_seconds(plan.candidate))

    def _affordable(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Those close to the best, as many as may be timed; and the best lone worker.

        A run's speed-up over one worker is told from it.
        """
        best = contenders[0].plan.step_seconds
        close = [each for each in contenders if each.plan.step_seconds <= CLOSE * best][:_MOST]
        lone = [each for each in contenders if each.crew.count == 1][:1]
        chosen: list[Contender] = []
        spent = 0.0
        for each in dict.fromkeys([*close, *lone]):
            spent += _TURNS * each.pass_seconds
            if spent > self._budget:
                break  # a slower plan must not be chosen because it could be timed
            chosen.append(each)
        return chosen

    def _timed(
        self, chosen: Sequence[Contender], *, what: str, pool: WorkerPool, console: Console
    ) -> dict[Contender, float]:
        """Seconds of a micro batch of each, from the cache or from a short run."""
        candidates = [[asdict(each.crew), each.micro] for each in chosen]
        key = {
            "model": self._recipe.model.model_dump(mode="json"),
            "task": self._recipe.task.kind,
            "data": self._inputs.data_directory,
            "compute": self._compute,
            "candidates": candidates,
            "machine": machine_key(),
        }
        name = xxhash.xxh3_64_hexdigest(json.dumps(key, sort_keys=True).encode())
        path = cache_directory() / "measured" / f"{name}.json"
        if path.is_file():
            seconds: list[float] = json.loads(path.read_text(encoding="utf-8"))
        else:
            console.phase(what)
            seconds = self._run(chosen, pool=pool, console=console)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(seconds) + "\n")
        return dict(zip(chosen, seconds, strict=True))

    def _run(
        self, chosen: Sequence[Contender], *, pool: WorkerPool, console: Console
    ) -> list[float]:
        """One job per number of processes; lone workers and threads are timed in the first."""
        sizes = [_processes(each.crew) for each in chosen]
        jobs = sorted({size for size in sizes if size > 1}) or [1]
        seconds = [0.0] * len(chosen)
        turn = sum(each.pass_seconds for each in chosen)
        turns = max(_TURNS, min(_MOST_TURNS, int(self._budget / 2 / turn)))
        for job in jobs:
            first = job == jobs[0]
            places = [at for at, size in enumerate(sizes) if size == job or (first and size == 1)]
            payload = {
                "recipe": self._recipe.model_dump(mode="json"),
                "inputs": self._inputs.to_json(),
                "compute": self._compute,
                "turns": turns,
                "candidates": [[asdict(chosen[at].crew), chosen[at].micro] for at in places],
            }
            found = measuring_job(
                "shoal.engine.measure:run", payload, size=job, pool=pool, console=console
            )
            for at, value in zip(places, found["seconds"], strict=True):
                seconds[at] = value
        return seconds

    def _reason(self, best: Contender, *, steps: dict[Contender, float], is_timed: bool) -> str:
        """One line: what it takes, and against what."""
        how = "timed" if is_timed else "planned"
        text = f"{how} {steps[best]:.3g} s per step"
        others = [each for each in steps if each.crew != best.crew]
        if others:
            next_best = min(others, key=lambda each: steps[each])
            text += f", {next_best.crew} {steps[next_best] / steps[best] - 1:+.0%}"
        if self._recipe.precision.compute == "auto" and self._compute == "bfloat16":
            text += f"; bfloat16 products are {self._ratio:.1f} x float32's here"
        return text

    def _record(
        self,
        best: Contender,
        *,
        steps: dict[Contender, float],
        timed: dict[Contender, float],
        contenders: Sequence[Contender],
    ) -> dict[str, Any]:
        """What plan.json keeps of the choice; replicas that were not timed count as predicted."""
        record: dict[str, Any] = {
            "format_ratio": self._ratio,
            "plans": [
                {
                    "crew": str(each.crew),
                    "micro_batch_samples": each.micro,
                    "predicted_step_seconds": each.plan.step_seconds,
                    "micro_batch_seconds": timed.get(each),
                }
                for each in steps
            ],
        }
        lone = [step for each, step in steps.items() if each.crew.count == 1]
        if timed and lone and best.crew.count > 1:
            record["speedup"] = min(lone) / steps[best]
        elif best.crew.count == 1:
            others = [
                steps.get(each, each.plan.step_seconds)
                for each in contenders
                if each.crew.count > 1
            ]
            record["why_one"] = (
                f"one worker is {min(others) / steps[best]:.2f} x the best of replicas"
                if others
                else "this machine has one core"
                if self._measured.cores == 1
                else "one worker was asked for"
            )
        return record


def _is_of(decision: Decision, contender: Contender) -> bool:
    crew = contender.crew
    mine = (decision.layout.workers, decision.threads_per_worker, decision.micro_batch_samples)
    return mine == (crew.count, crew.threads, contender.micro) and (
        crew.count == 1 or crew.workers == decision.workers
    )


def _processes(crew: Crew) -> int:
    return crew.count if crew.workers == "processes" else 1
