"""Ways of agreeing, or layouts, beside one another: the same seeds, data and steps, one table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config.load import load_recipe
from shoal.config.recipe import Recipe
from shoal.errors import ConfigError, Problem
from shoal.launch import local
from shoal.launch.object_store import refuse_one_store
from shoal.launch.pool import WorkerPool, pool_or_own
from shoal.legal import OWN_PARAMETERS
from shoal.observe.events import read_lines
from shoal.prove.compare_picture import draw
from shoal.prove.comparison import Comparison, Outcome


@dataclass(frozen=True)
class Choice:
    """One row of the comparison: what it is called, and the overrides that make it."""

    name: str
    overrides: tuple[str, ...]

    @classmethod
    def of_sync(cls, text: str) -> Choice:
        """`diloco`, or a section such as `{kind: diloco, every_steps: 30}`."""
        plain = re.fullmatch(r"[a-z-]+", text.strip())
        return cls(_short(text), (f"sync={{kind: {text.strip()}}}" if plain else f"sync={text}",))

    @classmethod
    def of_layout(cls, text: str) -> Choice:
        """Degrees, such as `replicate=2,tensor=2`. Raises ConfigError."""
        parts = [part.strip() for part in text.split(",")]
        if not all(re.fullmatch(r"[a-z]+=\d+", part) for part in parts):
            hint = "such as --layout replicate=2,tensor=2"
            raise ConfigError([Problem("--layout", f"cannot read {text!r}", hint)])
        return cls(text, tuple(f"parallel.{part}" for part in parts))


def _short(text: str) -> str:
    """A section in few words: its kind first, then what it says."""
    words = re.sub(r"[{}\s]", "", text).replace("codec:kind:", "codec:").removeprefix("kind:")
    return words.replace("every_steps:", "H=").replace(":", "=").replace(",", " ")


def compare(
    recipe: str | Path,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    *,
    choices: Sequence[Choice],
    out: Path,
    seeds: int = 1,
    link: str | None = None,
    pool: WorkerPool | None = None,
    console: bool = False,
) -> Comparison:
    """Train `recipe` under each choice with each seed, below `out`; the same batches for all.

    `seeds`: so many, from the recipe's own on. Writes out/compare.json and out/compare.png. Raises
    ConfigError for what cannot run, before anything is trained, and the errors of a run.
    """
    if len({each.name for each in choices}) < max(2, len(choices)):
        what = "expected two different choices or more to compare"
        raise ConfigError([Problem("--sync", what, "give --sync or --layout several times")])
    texts = local.override_texts(overrides)
    if link is not None:
        texts.append(f'launch.link="{link}"')
    recipes = {each.name: load_recipe(str(recipe), [*texts, *each.overrides]) for each in choices}
    for each in recipes.values():
        refuse_one_store(each)
    outcomes: list[Outcome] = []
    with pool_or_own(pool) as workers:
        for number in range(seeds):
            for choice in choices:
                resolved = recipes[choice.name]
                seed = resolved.seed + number
                run = out / f"{len(outcomes):02d}-{re.sub(r'[^a-z0-9=.-]+', '-', choice.name)}"
                local.train(
                    recipe,
                    [*texts, *choice.overrides, f"seed={seed}"],
                    out=run,
                    console=console,
                    pool=workers,
                )
                outcomes.append(outcome_of(run, choice=choice, recipe=resolved, seed=seed))
    found = Comparison([each.name for each in choices], outcomes, link)
    (out / "compare.json").write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
    draw(found, out / "compare.png")
    return found


def outcome_of(run: Path, *, choice: Choice, recipe: Recipe, seed: int) -> Outcome:
    """What the rows of a run say."""
    rows = read_lines(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    layout = json.loads((run / "plan.json").read_text(encoding="utf-8"))["layout"]
    # Replicas that step by themselves count their own targets, of their share of the batch.
    alone, replicas = recipe.sync.kind in OWN_PARAMETERS, layout.get("replicate", 1)
    tokens = seconds = sent = 0
    shares: list[float] = []
    curve: list[tuple[int, float, float, int]] = []
    for row in rows:
        if "loss" in row:
            shares.append(row.get("share", 1 / replicas) if alone else 1.0)
            tokens = round(row["tokens"] * len(shares) / max(sum(shares), 1e-9))
            sent += row["sent_bytes"]
            seconds += row["step_seconds"]
        elif "evaluation_loss" in row:
            curve.append((tokens, seconds, row["evaluation_loss"], sent))
    if not curve:
        hint = "set train.evaluate_every_steps above 0"
        raise ConfigError([Problem("train.evaluate_every_steps", "nothing to compare by", hint)])
    return Outcome(
        choice.name,
        seed,
        str(run),
        loss=curve[-1][2],
        tokens=tokens,
        seconds=seconds,
        sent_bytes=sent,
        peak_bytes=max(row["sent_bytes"] for row in steps),
        staleness=staleness_of(recipe, rows=steps),
        curve=curve,
    )


def staleness_of(recipe: Recipe, *, rows: Sequence[Mapping[str, Any]]) -> int | None:
    """As the rows say where they do; else what the policy allows."""
    seen = [row["staleness"] for row in rows if row.get("staleness") is not None]
    if seen:
        return int(max(seen))
    sync = recipe.sync
    every = getattr(sync, "outer_every_steps", None) or getattr(sync, "every_steps", 1)
    if sync.kind == "every-step":
        return 0
    if sync.kind == "gossip":
        return None
    if every == "end" or every is None:
        return recipe.train.steps
    return int(every) + int(getattr(sync, "overlap_steps", 0))
