"""Runs the matrix of strategies against one worker, and writes the page docs/evidence/parity.md.

python scripts/parity_matrix.py --results DIR FAMILY ...   run these families (default: all)
python scripts/parity_matrix.py --results DIR --page       write the page from DIR/FAMILY.json

A family that has no file there keeps what the page has of it, so the matrix can be run in parts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = str(ROOT / "tests")
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])

import torch  # noqa: E402
import transformers  # noqa: E402

from families import (  # noqa: E402
    BLOCKS,
    FAMILIES,
    GRADIENT,
    LIMIT,
    LOSS,
    TOKENS,
    matrix,
    recipe_of,
    staged,
)
from shoal.launch import supervise  # noqa: E402
from shoal.launch.pool import WorkerPool  # noqa: E402
from shoal.prove.matrix import Matrix  # noqa: E402
from unit.models.tiny_models import MIXTURES  # noqa: E402

PAGE = ROOT / "docs" / "evidence" / "parity.md"
ALL = (*FAMILIES, *MIXTURES, "t5")

HEAD = f"""\
# Parity of the strategies

Written by `scripts/parity_matrix.py`, torch {torch.__version__}, transformers
{transformers.__version__}.
For each family a tiny model of the same class is trained for 5 steps of AdamW in float32 on CPU
workers (gloo), by the same program and loop as any run: keyed dropout, packed documents (padded
rows of words for bert and roberta, images for vit), 8 samples of {TOKENS} tokens a step in micro
batches of one, an evaluation on the way, clipping at a norm of {LIMIT} (which always clips). Models
have two blocks, those of pipelines {BLOCKS}. Each
row is one layout against one worker, from the same seed and data:

- *loss*, *norm*: the largest relative difference over the steps (tolerance of the loss: {LOSS:g});
- *gradient*: the largest |difference| / max(|gradient|, 1e-6 |all gradients|) over all parameters
  at the first step, and where (tolerance {GRADIENT:g}; a missing reduction gives 0.4 and more);
  *last*: the same at the last step, where the weights differ too.

The largest figures stand at biases of keys, whose true gradient is zero: what is left there is
rounding, set against a millionth of the whole. `shoal parity` does the same for your own model.

"""


def run(families: list[str], results: Path) -> None:
    """Train every layout of these families and keep the figures."""
    results.mkdir(parents=True, exist_ok=True)
    target = supervise.TARGET
    with WorkerPool() as pool, tempfile.TemporaryDirectory() as scratch:
        for family in families:
            supervise.TARGET = "seq2seq:run" if family == "t5" else target
            folder, rows = Path(scratch) / family, []
            proofs = Matrix(recipe_of(family, folder), out=folder / "runs", pool=pool)
            deep = recipe_of(family, folder / "deep", blocks=BLOCKS)
            staged_proofs = Matrix(deep, out=folder / "deep" / "runs", pool=pool)
            pairs = [(proofs, case) for case in matrix(family)]
            for prover, case in [*pairs, *((staged_proofs, each) for each in staged(family))]:
                found = prover.compare(case.overrides)
                about = {"layout": str(case.layout), "notes": case.notes}
                rows.append({**about, "found": asdict(found)})
                print(f"{family}: {case.layout}: gradient {found.gradient:.1e}", flush=True)
            (results / f"{family}.json").write_text(json.dumps(rows, indent=1))


def page(results: Path) -> str:
    """The page from all figures. Raises SystemExit for a family outside its tolerance."""
    before = PAGE.read_text(encoding="utf-8").splitlines()
    lines, total = [], 0
    summary = ["| family | layouts | loss | norm | gradient | where | measured |"]
    summary.append("| --- | --- | --- | --- | --- | --- | --- |")
    for family in ALL:
        if not (results / f"{family}.json").is_file():
            line, rows = _kept(family, before)
            summary.append(line)
            lines, total = lines + rows, total + max(0, len(rows) - 5)
            continue
        told = json.loads((results / f"{family}.json").read_text())
        found, total = [row["found"] for row in told], total + len(told)
        worst = max(found, key=lambda each: each["gradient"])
        if any(f["loss"] >= LOSS or f["gradient"] >= GRADIENT for f in found):
            raise SystemExit(f"scripts/parity_matrix.py: {family} is outside its tolerance")
        summary.append(
            f"| {family} | {len(told)} | {max(f['loss'] for f in found):.1e} "
            f"| {max(f['norm'] for f in found):.1e} | {worst['gradient']:.1e} | {worst['where']} "
            f"| {date.today()} |"
        )
        lines += ["", f"## {family}", "", "| layout | | loss | norm | gradient | where | last |"]
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        lines += [_row(row) for row in told]
    summary.append(f"| all | {total} | | | | | |")
    return HEAD + "\n".join([*summary, *lines]) + "\n"


def _kept(family: str, page: list[str]) -> tuple[str, list[str]]:
    """What the page has of a family: its line of the summary, and its section."""
    line = next((each for each in page if each.startswith(f"| {family} | ")), None)
    if line is None or f"## {family}" not in page:
        return f"| {family} | not run | | | | | |", []
    first = page.index(f"## {family}")
    rest = page[first + 1 :]
    size = next((at for at, each in enumerate(rest) if each.startswith("## ")), len(rest) + 1)
    rows = page[first : first + size]
    return line if line.count("|") == 8 else f"{line} earlier |", ["", *rows]


def _row(row: dict[str, Any]) -> str:
    found = row["found"]
    return (
        f"| {row['layout']} | {row['notes']} | {found['loss']:.1e} | {found['norm']:.1e} "
        f"| {found['gradient']:.1e} | {found['where']} | {found['last_gradient']:.1e} |"
    )


def main() -> None:
    """Run, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if given.page:
        PAGE.write_text(page(given.results), encoding="utf-8")
    else:
        run(given.families or list(ALL), given.results)


if __name__ == "__main__":
    main()
