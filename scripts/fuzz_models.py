"""Every family x padded and packed rows x layouts x micro batches against one worker, in float32.

    python scripts/fuzz_models.py [FAMILY ...] [--limit N]

Families and tasks are those that docs/guide/models.md calls right. One worker takes three steps of
AdamW in micro batches of 8 samples; its first loss must be that of transformers in float64 within
1e-6. Each layout, one worker among them, takes them in micro batches of 1, 2 and 8 samples, and
must have the same losses within 1e-5. Exit status 1 for any that has not.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TESTS = str(ROOT / "tests")
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OMP_NUM_THREADS", "1")

from seq2seq import Seq2Seq  # noqa: E402
from shoal.config.load import resolve  # noqa: E402
from shoal.engine.decision import Decision  # noqa: E402
from shoal.engine.job import Inputs, Job  # noqa: E402
from shoal.errors import ModelError  # noqa: E402
from shoal.launch.pool import WorkerPool  # noqa: E402
from shoal.launch.prepare import prepare_inputs  # noqa: E402
from shoal.layout import Layout  # noqa: E402
from shoal.legal import family_of  # noqa: E402
from tiny import write_corpus  # noqa: E402

PAGE = ROOT / "docs" / "guide" / "models.md"
LOSS = 1e-5
NORM = 1e-3  # as tests/families.py: what is missing or doubled gives 0.4
REFERENCE = 1e-6
MICROS = (1, 2, 8)
EPSILON = 1e-2
"""So large that a step goes by the size of a gradient. Adam's first step is its sign, which is
rounding's where it is zero in truth: 7e-6 of the loss and 9e-3 of the norm after two (gemma4)."""

VOCABULARY = 300
AT_ONCE = 24
LAYOUTS = {
    "1 worker": {"replicate": 1},
    "replicate 2": {"replicate": 2},
    "shard 2": {"replicate": 1, "shard": 2},
    "tensor 2": {"replicate": 1, "tensor": 2},
}
NO_LOSSES: dict[str, Any] = {"error": "its worker ended"}


@dataclass(frozen=True)
class Family:
    """A family for a task, and whether its rows are packed."""

    name: str
    task: str
    packing: bool

    def __str__(self) -> str:
        return f"{self.name}, {self.task}, {'packed' if self.packing else 'padded'}"

    @property
    def layouts(self) -> list[str]:
        """Those that are legal."""
        family = family_of(self.name)
        able = {"tensor"} if family.tensor is not None else set()
        return [
            name
            for name, degrees in LAYOUTS.items()
            if set(degrees) <= {"replicate"} | (family.axes - {"tensor"}) | able
        ]


def families(names: list[str]) -> list[Family]:
    """The page's rows of families that are right, padded, and packed where they pack."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or not cells[2].startswith("right"):
            continue
        if names and cells[0] not in names:
            continue
        found += [Family(cells[0], cells[1], packs) for packs in sorted({False, cells[3] == "yes"})]
    return found


class Cases:
    """Jobs of families on data that is prepared once for each task and kind of row."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._inputs = folder, {}
        write_corpus(folder / "tales.jsonl", documents=120)
        rows = ["Ada B-person\nlives O\nin O\nParis B-place\n. O\n", "It O\nrains O\n. O\n"]
        text = "\n".join(rows[number % 2] for number in range(160)).replace(" ", "\t")
        (folder / "tags.conll").write_text(text, encoding="utf-8")
        random = np.random.default_rng(0)
        for number in range(60):
            path = folder / "images" / "abc"[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)

    def case(
        self, family: Family, layout: str, *, micros: Sequence[int], held: bool = False
    ) -> dict[str, Any]:
        """As a worker takes it; `held` beside transformers."""
        recipe = resolve(self._recipe(family), [])
        key = (family.task, family.packing)
        if key not in self._inputs:
            self._inputs[key] = prepare_inputs(recipe, say=lambda line: None)
        inputs: Inputs = self._inputs[key]
        decision = Decision(Layout(**LAYOUTS[layout]), "processes", 1, 8, "float32", "fuzzed")
        job = Job(recipe, self._folder, inputs, decision).to_json()
        return {"job": job, "task": family.task, "micros": micros, "held": held}

    def _recipe(self, family: Family) -> dict[str, Any]:
        sources = {"token-classification": "tags.conll", "image-classification": "images"}
        data = {
            "source": str(self._folder / sources.get(family.task, "tales.jsonl")),
            "sequence_tokens": 24,
            "packing": family.packing,
        }
        if family.task != "image-classification":
            data["tokenizer"] = {"kind": "train", "vocabulary_size": VOCABULARY}
        kind = "causal-lm" if family.task == Seq2Seq.kind else family.task
        return {
            "seed": 5,
            "task": {"kind": kind},
            "model": {
                "kind": "config",
                "architecture": family.name,
                **small_settings(family.name, family.task),
            },
            "data": data,
            "train": {
                "steps": len(MICROS),
                "global_batch_samples": 16,
                "optimizer": {"kind": "adamw", "epsilon": EPSILON},
            },
        }


@functools.cache
def small_settings(family: str, kind: str) -> dict[str, Any]:
    """What makes its configuration the one that the oracle examines, and its dropout keyed."""
    import models
    from shoal.models.huggingface import known_settings
    from shoal.parallel.oracle import check_keyed_dropout, pair_of

    for whole in (False, True):
        try:
            settings, _ = models.settings_of(family, kind, vocabulary=VOCABULARY, whole=whole)
            pair = pair_of(settings, task=models.task_of(kind))
        except Exception:
            if whole:
                raise
            continue
        tree, plain = pair.config.to_dict(), transformers.CONFIG_MAPPING[family]().to_dict()
        known = known_settings(family) - {"vocab_size", *models.task_of(kind).model_settings()}
        changed = {key: tree[key] for key in known & set(tree) if tree[key] != plain.get(key)}
        try:
            check_keyed_dropout(settings, pair)
        except ModelError:
            changed["dropout"] = "off"
        return changed
    raise AssertionError("the last raises")


def curves(
    cases: list[dict[str, Any]], *, size: int, pool: WorkerPool, folder: Path
) -> list[dict[str, Any]]:
    """What `size` workers report of each case."""
    folder.mkdir()
    found: list[dict[str, Any]] = [NO_LOSSES] * len(cases)
    workers = [
        pool.start(
            "fuzzing:run", {"rank": rank, "size": size, "folder": str(folder), "cases": cases}
        )
        for rank in range(size)
    ]
    while any(worker.status is None for worker in workers):
        for worker, message in pool.events(timeout_seconds=1.0):
            if worker in workers and message is not None and message["kind"] == "curve":
                found[message["number"]] = message
    return found


def compared(chosen: list[Family]) -> list[tuple[str, str | None]]:
    """(case, what is wrong or None) of every family and layout."""
    with WorkerPool() as pool, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = Cases(folder)
        largest = [8] * len(MICROS)
        ones = [made.case(each, "1 worker", micros=largest, held=True) for each in chosen]
        more = [made.case(each, "1 worker", micros=MICROS) for each in chosen]
        pairs = [(each, layout) for each in chosen for layout in each.layouts[1:]]
        twos = [made.case(each, layout, micros=MICROS) for each, layout in pairs]
        one = curves(ones + more, size=1, pool=pool, folder=folder / "one")
        two = curves(twos, size=2, pool=pool, folder=folder / "two")
    wanted = dict(zip(chosen, one))
    pairs = [(each, "1 worker") for each in chosen] + pairs
    return [(f"{each}, transformers", astray(wanted[each])) for each in chosen] + [
        (f"{each}, {layout}", wrong(found, wanted[each]))
        for (each, layout), found in zip(pairs, one[len(chosen) :] + two)
    ]


def astray(found: dict[str, Any]) -> str | None:
    """How one worker's first loss differs from transformers' in float64; None: it does not."""
    if "error" in found:
        return str(found["error"])
    apart = _apart(found["first_loss"], found["reference"])
    return None if apart <= REFERENCE else f"transformers: {apart:.1e}"


def wrong(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """How a curve differs from one worker's; None: it does not."""
    for row in (wanted, found):
        if "error" in row:
            return str(row["error"])
    apart, norms = (max(map(_apart, found[name], wanted[name])) for name in ("losses", "norms"))
    return None if apart <= LOSS and norms <= NORM else f"loss {apart:.1e}, norm {norms:.1e}"


def _apart(found: float | None, wanted: float | None) -> float:
    """Relative; infinite where either is no number, which JSON has none for."""
    if found is None or wanted is None:
        return float("inf")
    return abs(found - wanted) / max(abs(wanted), 1e-6)


def main() -> int:
    """Compare and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--limit", type=int, help="so many families only")
    given = parser.parse_args()
    began = time.monotonic()
    chosen, rows = families(given.families)[: given.limit], []
    for start in range(0, len(chosen), AT_ONCE):
        found = compared(chosen[start : start + AT_ONCE])
        for case, reason in found:
            if reason is not None:
                print(f"{case}: {reason}", flush=True)
        rows += found
        print(
            f"... {min(start + AT_ONCE, len(chosen))} of {len(chosen)}", file=sys.stderr, flush=True
        )
    bad = [(case, reason) for case, reason in rows if reason is not None]
    print(
        f"{len(rows) - len(bad)} of {len(rows)} combinations (micro batches of "
        f"{', '.join(map(str, MICROS))} in each) are right; {time.monotonic() - began:.0f} s"
    )
    print(json.dumps({"right": len(rows) - len(bad), "wrong": dict(bad)}), file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
