"""Every family x padded and packed rows x layouts x micro batches against one worker, in float32.

    python scripts/fuzz_models.py [FAMILY ...] [--limit N]

Families are those that docs/guide/models.md calls right for language modelling or tagging. Each
layout of two workers takes three steps of AdamW in micro batches of 1, 2 and 8 samples, and must
have the losses of one worker, which takes them in micro batches of 8, within 1e-5. (One worker is
held against transformers in float64 before any run: parallel/oracle.py.) Exit status 1 for any
that has not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = str(ROOT / "tests")
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OMP_NUM_THREADS", "1")

from shoal.config.load import resolve  # noqa: E402
from shoal.engine.decision import Decision  # noqa: E402
from shoal.engine.job import Inputs, Job  # noqa: E402
from shoal.launch.pool import WorkerPool  # noqa: E402
from shoal.launch.prepare import prepare_inputs  # noqa: E402
from shoal.layout import Layout  # noqa: E402
from shoal.legal import family_of  # noqa: E402
from tiny import write_corpus  # noqa: E402

PAGE = ROOT / "docs" / "guide" / "models.md"
LOSS = 1e-5
MICROS = (1, 2, 8)
LAYOUTS = {
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
        cuts = family_of(self.name).tensor is not None
        return [each for each in LAYOUTS if each != "tensor 2" or cuts]


def families(names: list[str]) -> list[Family]:
    """The page's rows of families that are right, padded, and packed where they pack."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or not cells[2].startswith("right") or cells[1].startswith("image"):
            continue
        if names and cells[0] not in names:
            continue
        found += [Family(cells[0], cells[1], packs) for packs in {False, cells[3] == "yes"}]
    return found


class Cases:
    """Jobs of families on data that is prepared once for each task and kind of row."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._inputs = folder, {}
        write_corpus(folder / "tales.jsonl", documents=120)
        rows = ["Ada B-person\nlives O\nin O\nParis B-place\n. O\n", "It O\nrains O\n. O\n"]
        text = "\n".join(rows[number % 2] for number in range(160)).replace(" ", "\t")
        (folder / "tags.conll").write_text(text, encoding="utf-8")

    def job(self, family: Family, layout: str | None) -> dict[str, Any]:
        """As a worker takes it; `layout` None: one worker."""
        recipe = resolve(self._recipe(family), [])
        key = (family.task, family.packing)
        if key not in self._inputs:
            self._inputs[key] = prepare_inputs(recipe, say=lambda line: None)
        inputs: Inputs = self._inputs[key]
        decision = Decision(
            Layout(**(LAYOUTS[layout] if layout else {})), "processes", 1, 8, "float32", "fuzzed"
        )
        return Job(recipe, self._folder, inputs, decision).to_json()

    def _recipe(self, family: Family) -> dict[str, Any]:
        tags = family.task == "token-classification"
        return {
            "seed": 5,
            "task": {"kind": family.task},
            "model": {"kind": "config", "architecture": family.name, **sizes_of(family.name)},
            "data": {
                "source": str(self._folder / ("tags.conll" if tags else "tales.jsonl")),
                "sequence_tokens": 24,
                "packing": family.packing,
                "tokenizer": {"kind": "train", "vocabulary_size": 300},
            },
            "train": {"steps": len(MICROS), "global_batch_samples": 16},
        }


def sizes_of(family: str) -> dict[str, Any]:
    """Sizes that make its default configuration small: what the oracle examines."""
    from shoal.models.huggingface import known_settings, read_config
    from shoal.models.small import small_configs

    config = read_config(architecture=family, settings={"vocab_size": 300})
    tree, plain = next(iter(small_configs(config))).to_dict(), config.to_dict()
    known = known_settings(family) - {"vocab_size", "id2label", "label2id", "num_labels"}
    return {key: value for key, value in tree.items() if key in known and value != plain.get(key)}


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
        ones = [{"job": made.job(each, None), "micros": [8] * len(MICROS)} for each in chosen]
        pairs = [(each, layout) for each in chosen for layout in each.layouts]
        twos = [{"job": made.job(each, layout), "micros": MICROS} for each, layout in pairs]
        one = dict(zip(chosen, curves(ones, size=1, pool=pool, folder=folder / "one")))
        two = curves(twos, size=2, pool=pool, folder=folder / "two")
    return [
        (f"{each}, {layout}", wrong(found, one[each])) for (each, layout), found in zip(pairs, two)
    ]


def wrong(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """How a curve differs from one worker's; None: it does not."""
    for row in (wanted, found):
        if "error" in row:
            return str(row["error"])
    pairs = [(a, b) for name in ("losses", "norms") for a, b in zip(found[name], wanted[name])]
    apart = max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs[: len(MICROS)])
    norms = max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs[len(MICROS) :])
    return None if apart <= LOSS and norms <= 1e-3 else f"loss {apart:.1e}, norm {norms:.1e}"


def main() -> int:
    """Compare and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--limit", type=int, help="so many families only")
    given = parser.parse_args()
    began = time.monotonic()
    rows = compared(families(given.families)[: given.limit])
    bad = [(case, reason) for case, reason in rows if reason is not None]
    for case, reason in bad:
        print(f"{case}: {reason}")
    print(
        f"{len(rows) - len(bad)} of {len(rows)} combinations (micro batches of "
        f"{', '.join(map(str, MICROS))} in each) equal one worker; {time.monotonic() - began:.0f} s"
    )
    print(json.dumps({"right": len(rows) - len(bad), "wrong": dict(bad)}), file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
