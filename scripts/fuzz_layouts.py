"""Random legal layouts of random small models against one worker, in float32; what fails shrinks.

    python scripts/fuzz_layouts.py [--seed 0] [--cases 200] [--lives 10]
    python scripts/fuzz_layouts.py --case '{"family": "llama", "pipeline": 2, ...}'

A case is a family, what varies of its recipe (packed rows, dropout, optimizer, accumulation), and a
layout of up to 8 workers with its schedule, level, kind and recompute, such that the rules let it
start. It takes three steps, as one worker does: the losses must be the same within 1e-5, the
gradient norms within 1e-3 (tests/families.py says why). A life is a whole run of a case: it stops
half way, goes on in another layout, and in one of two of them a worker is killed at a random step
and phase; its losses are held against those of one worker alike. A failure is made smaller for as
long as it stays one, and printed with the command that repeats it. Exit status 1 for any.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = str(ROOT / "tests")
sys.path[:0] = [TESTS, str(ROOT / "scripts")]
os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OMP_NUM_THREADS", "1")

import fuzz_models  # noqa: E402
from shoal.config.load import recipe_from  # noqa: E402
from shoal.config.recipe import Recipe  # noqa: E402
from shoal.engine.decision import Decision, given_layout  # noqa: E402
from shoal.engine.job import Inputs, Instruments, Job  # noqa: E402
from shoal.errors import ConfigError, ShoalError  # noqa: E402
from shoal.launch import local  # noqa: E402
from shoal.launch.pool import WorkerPool  # noqa: E402
from shoal.launch.prepare import prepare_inputs  # noqa: E402
from shoal.launch.refuse import refuse_illegal, trained_config  # noqa: E402
from shoal.legal.rules import CONTEXT_KINDS, RECOMPUTE, SCHEDULES, SHARD_LEVELS  # noqa: E402
from shoal.observe.events import read_lines  # noqa: E402
from tiny import write_corpus  # noqa: E402
from unit.models.tiny_models import MIXTURES, SETTINGS  # noqa: E402

FAMILIES = [each for each in (*SETTINGS, *MIXTURES) if each not in ("bert", "roberta", "vit", "t5")]
BLOCKS = 4
STEPS = 3
SAMPLES = 8
AT_ONCE = 16
SILENT_SECONDS = 100
"""After that a case hangs, on a machine that has other work too."""
PHASES = ("forward", "backward", "reduce", "apply", "save")


@dataclass(frozen=True)
class Case:
    """A random run. What a model or one worker has of it is `subject`; the rest is the layout."""

    family: str
    packing: bool = False
    dropout: str = "off"
    optimizer: str = "adamw"
    tokens: int = 16
    micro: int = SAMPLES
    replicate: int = 1
    pipeline: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    schedule: str = "1f1b"
    split: tuple[int, ...] = ()
    level: str = "parameters"
    kind: str = "ring"
    recompute: str = "none"

    @property
    def degrees(self) -> list[int]:
        """Of the axes; experts divide two of them."""
        axes = (self.replicate, self.pipeline, self.shard, self.context, self.tensor)
        return [*axes, self.expert]

    @property
    def workers(self) -> int:
        """Number of them."""
        return math.prod(self.degrees[:-1])

    @property
    def alone(self) -> Case:
        """The same for one worker, whose micro batches change nothing."""
        kept = {name: getattr(self, name) for name in _SUBJECT}
        return Case(**kept)

    def recipe(self, folder: Path) -> dict[str, Any]:
        """As a file would have it."""
        pipeline: dict[str, Any] = {"degree": self.pipeline, "schedule": self.schedule}
        if self.split:
            pipeline["split"] = list(self.split)
        optimizer: dict[str, Any] = {"kind": self.optimizer}
        if self.optimizer != "sgd":
            optimizer["epsilon"] = fuzz_models.EPSILON
        return {
            "seed": 5,
            "model": {
                "kind": "config",
                "architecture": self.family,
                **_settings(self.family),
                "dropout": self.dropout,
            },
            "data": {
                "source": str(folder / "tales.jsonl"),
                "sequence_tokens": self.tokens,
                "packing": self.packing,
                "tokenizer": {"kind": "train", "vocabulary_size": 300},
                "validation": {"fraction": 0.1},
            },
            "train": {
                "steps": STEPS,
                "global_batch_samples": SAMPLES,
                "micro_batch_samples": self.micro,
                "evaluate_every_steps": 0,
                "optimizer": optimizer,
                "max_gradient_norm": 1.0,
            },
            "parallel": {
                "replicate": self.replicate,
                "pipeline": pipeline,
                "shard": {"degree": self.shard, "level": self.level},
                "context": {"degree": self.context, "kind": self.kind},
                "tensor": self.tensor,
                "expert": self.expert,
                "recompute": self.recompute,
            },
            "precision": {"compute": "float32"},
            "launch": {"device": "cpu", "workers": "processes"},
            "observe": {"console": False},
        }

    def __str__(self) -> str:
        plain = Case(self.family)
        changed = {k: v for k, v in asdict(self).items() if v != getattr(plain, k)}
        return json.dumps({"family": self.family, **changed})


_SUBJECT = ("family", "packing", "dropout", "optimizer", "tokens")


def _settings(family: str) -> dict[str, Any]:
    """Of four blocks, with heads for every degree."""
    found = dict({**SETTINGS, **MIXTURES}[family])
    found["n_layer" if family == "gpt2" else "num_hidden_layers"] = BLOCKS
    if "layer_types" in found:
        found["layer_types"] = found["layer_types"] * (BLOCKS // 2)
    if "num_key_value_heads" in found:
        latent = "kv_lora_rank" in found
        found |= {"num_attention_heads": 8, "num_key_value_heads": 8 if latent else 4}
    return found


class Fuzzer:
    """Draws cases, runs them, and makes failures small."""

    def __init__(self, folder: Path, *, pool: WorkerPool) -> None:
        self.folder, self.pool = folder, pool
        write_corpus(folder / "tales.jsonl", documents=120)
        self._inputs: dict[tuple[int, bool], Inputs] = {}
        self._ones: dict[Case, dict[str, Any]] = {}
        self._wholes: dict[str, list[float]] = {}
        self._batches = 0
        self.refused = 0

    def draw(self, chance: random.Random) -> Case:
        """A case that the rules let start."""
        while True:
            case = drawn(chance)
            if self.legal(case):
                return case
            self.refused += 1

    def legal(self, case: Case) -> bool:
        """Whether it may start."""
        try:
            recipe = self._recipe(case)
            refuse_illegal(
                recipe,
                given_layout(recipe),
                config=trained_config(recipe, inputs=self._prepared(case, recipe)),
            )
        except ConfigError:
            return False
        return True

    def _recipe(self, case: Case) -> Recipe:
        return recipe_from(case.recipe(self.folder), source=str(case))

    def _prepared(self, case: Case, recipe: Recipe) -> Inputs:
        key = (case.tokens, case.packing)
        if key not in self._inputs:
            self._inputs[key] = prepare_inputs(recipe, say=lambda line: None)
        return self._inputs[key]

    def _job(self, case: Case) -> dict[str, Any]:
        recipe = self._recipe(case)
        layout = given_layout(recipe)
        decision = Decision(layout, "processes", 1, case.micro, "float32", "fuzzed")
        job = Job(recipe, self.folder, self._prepared(case, recipe), decision).to_json()
        return {"job": job, "task": "causal-lm", "micros": [case.micro] * STEPS, "held": False}

    def _curves(self, cases: list[Case]) -> list[dict[str, Any]]:
        """Of cases with as many workers each; those after one that ended its workers by others."""
        found: list[dict[str, Any]] = []
        while len(found) < len(cases):
            found += self._some_curves(cases[len(found) :])
        return found

    def _some_curves(self, cases: list[Case]) -> list[dict[str, Any]]:
        """Of the first cases, up to one that fails; at least of one."""
        self._batches += 1
        folder, size = self.folder / f"batch-{self._batches}", cases[0].workers
        folder.mkdir()
        payload = {"size": size, "folder": str(folder), "ends": True}
        payload["cases"] = [self._job(case) for case in cases]
        workers = [
            self.pool.start("fuzzing:run", {**payload, "rank": rank}) for rank in range(size)
        ]
        found: list[dict[str, Any]] = []
        heard = time.monotonic()
        while any(worker.status is None for worker in workers) and len(found) < len(cases):
            for worker, message in self.pool.events(timeout_seconds=1.0):
                if worker in workers and message is not None and message["kind"] == "curve":
                    heard = time.monotonic()
                    found[message["number"] :] = [message]
            failed = found and "error" in found[-1]
            if failed or any(worker.status for worker in workers):
                break
            if time.monotonic() - heard > SILENT_SECONDS:
                found.append({"error": f"no word for {SILENT_SECONDS} s: it hangs"})
                break
        self.pool.kill([worker for worker in workers if worker.status is None])
        return found or [{"error": "its workers ended"}]

    def wrong(self, cases: list[Case]) -> list[str | None]:
        """What is wrong with each; the cases have as many workers each."""
        new = [each for each in dict.fromkeys(c.alone for c in cases) if each not in self._ones]
        if new:
            self._ones |= dict(zip(new, self._curves(new), strict=True))
        found = self._curves(cases)
        return [fuzz_models.wrong(f, self._ones[c.alone]) for f, c in zip(found, cases)]

    def smallest(self, case: Case) -> Case:
        """A case that fails too, of which nothing more can be left out."""
        while True:
            for simpler in simplifications(case):
                if self.legal(simpler) and self.wrong([simpler])[0] is not None:
                    case = simpler
                    break
            else:
                return case

    def life(self, case: Case, later: Case, chance: random.Random) -> str | None:
        """A run that stops half way and goes on as `later`; what is wrong with it."""
        fault: dict[str, Any] | None = None
        if chance.random() < 0.5:
            rank, step = chance.randrange(case.workers), chance.randint(1, 2)
            fault = {"number": 0, "kind": "kill", "rank": rank, "step": step}
            fault["phase"] = chance.choice(PHASES)
        words = f"{case} then {later}" + (f" with {fault}" if fault else "")
        out = self.folder / f"life-{chance.getrandbits(48):012x}"
        recipe = case.recipe(self.folder)
        recipe["train"] |= {"steps": 4, "stop_after_steps": 2}
        recipe["checkpoint"] = {"every_steps": 1, "keep": 9}
        try:
            one = self._whole_run(recipe | {"parallel": {"replicate": 1}})
            path = self.folder / f"{out.name}.yaml"
            path.write_text(json.dumps(recipe), encoding="utf-8")
            given = Instruments(planned_faults=(fault,) if fault else ())
            local.train(path, [], out=out, console=False, pool=self.pool, instruments=given)
            changes = later.recipe(self.folder)["parallel"]
            words_of = [f"parallel.{key}={json.dumps(value)}" for key, value in changes.items()]
            more = [
                *words_of,
                f"train.micro_batch_samples={later.micro}",
                "train.stop_after_steps=null",
            ]
            local.resume(out, more, console=False, pool=self.pool)
        except ShoalError as error:
            return f"{words}: {type(error).__name__}: {str(error).splitlines()[0]}"
        found = [row["loss"] for row in read_lines(out / "metrics.jsonl") if "loss" in row]
        if len(found) != len(one):
            return f"{words}: {len(found)} steps for {len(one)}"
        apart = max(abs(a - b) / abs(b) for a, b in zip(found, one))
        return None if apart <= fuzz_models.LOSS else f"{words}: loss {apart:.1e}"

    def _whole_run(self, recipe: dict[str, Any]) -> list[float]:
        recipe = {**recipe, "train": {**recipe["train"], "stop_after_steps": None}}
        key = json.dumps(recipe, sort_keys=True)
        if key not in self._wholes:
            path = self.folder / f"one-{len(self._wholes)}.yaml"
            path.write_text(key, encoding="utf-8")
            out = self.folder / path.stem
            local.train(path, [], out=out, console=False, pool=self.pool)
            rows = read_lines(out / "metrics.jsonl")
            self._wholes[key] = [row["loss"] for row in rows if "loss" in row]
        return self._wholes[key]


def drawn(chance: random.Random) -> Case:
    """Any case, legal or not."""
    family = chance.choice(FAMILIES)
    degrees = dict.fromkeys(("replicate", "pipeline", "shard", "context", "tensor"), 1)
    for _ in range(chance.choice((1, 2, 2, 3, 3))):
        degrees[chance.choice(list(degrees))] *= 2
    spread = degrees["shard"] * degrees["context"]
    expert = chance.choice([d for d in (1, 2, 4, 8) if spread % d == 0])
    schedule = chance.choice(SCHEDULES) if degrees["pipeline"] > 1 else "1f1b"
    split: tuple[int, ...] = ()
    if degrees["pipeline"] == 2 and schedule in ("gpipe", "1f1b") and chance.random() < 0.3:
        split = chance.choice([(1, 3), (3, 1)])
    return Case(
        family,
        packing=chance.random() < 0.5,
        dropout=chance.choice(("off", "keyed")),
        optimizer=chance.choice(("adamw", "adamw", "sgd", "muon")),
        tokens=chance.choice((16, 24, 32)),
        micro=chance.choice((1, 2, 4, 8)),
        **degrees,
        expert=expert if family in MIXTURES else 1,
        schedule=schedule,
        split=split,
        level=chance.choice(SHARD_LEVELS) if degrees["shard"] > 1 else "parameters",
        kind=chance.choice(CONTEXT_KINDS) if degrees["context"] > 1 else "ring",
        recompute=chance.choice(RECOMPUTE),
    )


def simplifications(case: Case) -> Iterator[Case]:
    """The case with one thing less, the largest first."""
    plain = Case(case.family)
    for field in reversed(fields(case)):
        value, usual = getattr(case, field.name), getattr(plain, field.name)
        if field.name == "family" or value == usual:
            continue
        yield replace(case, **{field.name: usual})
        if isinstance(value, int) and not isinstance(value, bool) and value > 2:
            yield replace(case, **{field.name: value // 2})
    if case.family != "llama":
        yield replace(case, family="llama")


def main() -> int:
    """Draw, run and tell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--lives", type=int, default=10)
    parser.add_argument("--case", help="run this one only, as a failure printed it")
    given = parser.parse_args()
    began, failed = time.monotonic(), 0
    chance = random.Random(given.seed)
    with WorkerPool() as pool, tempfile.TemporaryDirectory() as scratch:
        fuzzer = Fuzzer(Path(scratch), pool=pool)
        if given.case:
            tree = json.loads(given.case)
            only = Case(**{**tree, "split": tuple(tree.get("split", ()))})
            found = fuzzer.wrong([only])[0]
            print(f"{only}: {found or 'equals one worker'}")
            return int(found is not None)
        cases = [fuzzer.draw(chance) for _ in range(given.cases)]
        done = 0
        for size in sorted({case.workers for case in cases}):
            same = [case for case in cases if case.workers == size]
            for start in range(0, len(same), AT_ONCE):
                some = same[start : start + AT_ONCE]
                for case, what in zip(some, fuzzer.wrong(some), strict=True):
                    if what is None:
                        continue
                    failed += 1
                    print(f"{case}: {what}", flush=True)
                    small = fuzzer.smallest(case)
                    print(f"  python scripts/fuzz_layouts.py --case '{small}'", flush=True)
                done += len(some)
                print(f"... {done} of {len(cases)}", file=sys.stderr, flush=True)
        for _ in range(given.lives):
            case = fuzzer.draw(chance)
            later = fuzzer.draw(chance)
            while not fuzzer.legal(moved := replace(later, **asdict(case.alone) | _layout(later))):
                later = fuzzer.draw(chance)
            what = fuzzer.life(case, moved, chance)
            if what is not None:
                failed += 1
                print(f"life: {what}", flush=True)
    print(
        f"seed {given.seed}: {len(cases)} cases and {given.lives} lives, {failed} failed, "
        f"{fuzzer.refused} draws refused by the rules; {time.monotonic() - began:.0f} s"
    )
    return int(bool(failed))


def _layout(case: Case) -> dict[str, Any]:
    """What of a case is no matter of the model."""
    return {name: value for name, value in vars(case).items() if name not in _SUBJECT}


if __name__ == "__main__":
    sys.exit(main())
