"""Which way of agreeing pays: recipe sync-bench under every policy and codec, over seeds.

python benchmarks/sync.py --out DIR [--seeds 3] [--only NAME]     train what DIR lacks, then a table
python benchmarks/sync.py --out DIR --table                       the table of what is there

Two replicas on one machine. Bytes are those that worker 0 sends after the first steps that all take
together (a tenth of the run), of every operation; losses are of the last evaluation. DIR gets a
folder for each run, figures in compare.json, and compare.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from shoal.config.load import load_recipe
from shoal.launch import local
from shoal.launch.pool import pool_or_own
from shoal.observe.events import read_lines
from shoal.prove.compare import Choice, outcome_of
from shoal.prove.compare_picture import draw
from shoal.prove.comparison import Comparison, Outcome

RECIPE, START = "sync-bench", 120
DILOCO = f"kind: diloco, every_steps: 30, start_steps: {START}"
CHOICES = {
    "every-step": "{kind: every-step}",
    "int8": "{kind: every-step, codec: {kind: int8}}",
    "int4": "{kind: every-step, codec: {kind: int4}}",
    "topk 1 %": "{kind: every-step, codec: {kind: topk, fraction: 0.01}}",
    "topk 2 of 16": "{kind: every-step, codec: {kind: topk, fraction: 0.125, block: 16}}",
    "powersgd 4": "{kind: every-step, codec: {kind: powersgd, rank: 4}}",
    "diloco": f"{{{DILOCO}}}",
    "diloco int8": f"{{{DILOCO}, codec: {{kind: int8, error_feedback: true}}}}",
    "diloco int4": f"{{{DILOCO}, codec: {{kind: int4}}}}",
    "streaming": f"{{{DILOCO.replace('diloco', 'streaming-diloco')}, fragments: 2}}",
    "local-sgd": f"{{kind: local-sgd, every_steps: 30, start_steps: {START}}}",
    "diloco from scratch": "{kind: diloco, every_steps: 30}",
    "gossip": "{kind: gossip, meet_every_steps: 120}",
    "sign": "{kind: every-step, codec: {kind: sign}}",
}


def sent_after(run: Path, step: int) -> tuple[float, int]:
    """Bytes a step that worker 0 sent after `step`, and the most in one."""
    rows = [r for r in read_lines(run / "metrics.jsonl") if "loss" in r and r["step"] > step]
    return mean(r["sent_bytes"] for r in rows), max(r["sent_bytes"] for r in rows)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=list(CHOICES))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    outcomes: list[Outcome] = []
    with pool_or_own(None) as pool:
        for seed in range(given.seeds):
            for name, text in CHOICES.items():
                run = given.out / f"{name.replace(' ', '-').replace('-%', '')}-{seed}"
                overrides = [f"sync={text}", f"seed={seed}", *given.overrides]
                wanted = not given.table and (not given.only or name in given.only)
                if wanted and not (run / "summary.json").is_file():
                    local.train(RECIPE, overrides, out=run, console=False, pool=pool)
                if (run / "summary.json").is_file():
                    recipe, choice = load_recipe(RECIPE, overrides), Choice(name, ())
                    outcomes.append(outcome_of(run, choice=choice, recipe=recipe, seed=seed))
    names = [name for name in CHOICES if any(each.name == name for each in outcomes)]
    found = Comparison(names, outcomes)
    (given.out / "compare.json").write_text(json.dumps(found.to_json(), indent=1))
    full = [n for n in names if len(found.of(n)) == len(found.of(names[0]))]
    draw(
        Comparison(full, [each for each in outcomes if each.name in full]),
        given.out / "compare.png",
    )
    print(table(found))


def table(found: Comparison) -> str:
    """Losses and bytes of each choice, over every-step's."""
    base = found.of("every-step")
    sent = {n: [sent_after(Path(e.run), START) for e in found.of(n)] for n in found.choices}
    rate = mean(each for each, _ in sent["every-step"])
    lines = [
        "| policy, codec | seeds | loss | +- | over every-step | its spread | bytes a step | of "
        "every-step | peak step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in found.choices:
        runs = found.of(name)
        losses = [each.loss for each in runs]
        paired = {each.seed: each.loss for each in base}
        ratios = [each.loss / paired[each.seed] for each in runs if each.seed in paired]
        each, peak = mean(e for e, _ in sent[name]), max(p for _, p in sent[name])
        spread = [stdev(values) if len(values) > 1 else 0.0 for values in (losses, ratios)]
        lines.append(
            f"| {name} | {len(runs)} | {mean(losses):.4f} | {spread[0]:.4f} | {mean(ratios):.4f} | "
            f"{spread[1]:.4f} | {each:,.0f} | {each / rate:.2%} (1/{rate / each:.1f}) | {peak:,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
