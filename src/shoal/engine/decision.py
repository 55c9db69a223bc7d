"""What was decided about a run that its recipe left open, and why; plain data, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shoal.config.recipe import Recipe
from shoal.errors import ConfigError, Problem
from shoal.layout import Layout
from shoal.legal import fits_schedule

Format = Literal["float32", "bfloat16", "float16"]


def format_of(compute: str, *, auto: Format = "float32") -> Format:
    """The number format that `precision.compute` names; `auto`: what it is when left open."""
    names: dict[str, Format] = {
        "auto": auto,
        "float32": "float32",
        "bfloat16": "bfloat16",
        "float16": "float16",
    }
    return names[compute]


@dataclass(frozen=True, order=True)
class WorkerSetup:
    """The workers of a run on one machine: `count` of a kind, each with `threads` cores."""

    workers: Literal["threads", "processes"]
    count: int
    threads: int

    def __str__(self) -> str:
        cores = f" with {self.threads} core{'s' if self.threads > 1 else ''}"
        if self.count == 1:
            return f"1 worker{cores}"
        return f"{self.count} {self.workers}" + (f"{cores} each" if self.threads > 1 else "")


@dataclass(frozen=True)
class Decision:
    """Layout, kind of worker, threads, micro batch and number format of a run."""

    layout: Layout
    workers: Literal["threads", "processes"]
    threads_per_worker: int
    micro_batch_samples: int
    compute: Format
    reason: str
    measured: dict[str, Any] = field(default_factory=dict)
    """What was timed to decide it: `candidates`, `seconds`, `speedup` over what it is `beside`."""
    predicted: dict[str, float] = field(default_factory=dict)
    """step_seconds and peak_memory_bytes, where they can be told before; of the latter the
    `state_bytes` are exact."""
    shard_level: str | None = None
    """Where the plan chose it; None: as the recipe says."""
    recompute: str | None = None
    """Likewise."""
    schedule: str | None = None
    """Likewise, of a pipeline; with it the stages of each rank."""
    stages_per_rank: int | None = None
    flops_per_token: float | None = None
    """Model FLOPs of a trained token (plan/workload.py), of a family that is known."""
    peak_flops_per_second: float | None = None
    """Of all workers together, in the number format of `compute`, where it is known."""
    device: str = "cpu"
    """What the workers compute on: "cpu", or a device as its driver calls it."""

    def mfu(self, *, tokens: int, seconds: float) -> float | None:
        """Model FLOPs per second over the peak; None when one of them is unknown."""
        if not self.flops_per_token or not self.peak_flops_per_second or seconds <= 0:
            return None
        return self.flops_per_token * tokens / (seconds * self.peak_flops_per_second)

    def shard_level_of(self, recipe: Recipe) -> str:
        """What the shard axis cuts: the plan's choice, else what `recipe` says."""
        return self.shard_level or recipe.parallel.sharding.level

    def recompute_of(self, recipe: Recipe) -> str:
        """What blocks compute again: the plan's choice, else what `recipe` says."""
        return self.recompute or recipe.parallel.recompute

    def schedule_of(self, recipe: Recipe) -> tuple[str, int]:
        """In which order a pipeline's stages compute, and how many a rank has: likewise."""
        given = recipe.parallel.pipelining
        return self.schedule or given.schedule, self.stages_per_rank or given.stages

    def to_json(self) -> dict[str, Any]:
        """Plain data, read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Decision:
        """The inverse of `to_json`."""
        return cls(**{**tree, "layout": Layout(**tree["layout"])})

    def __str__(self) -> str:
        cut = f" ({self.layout})" if self.layout.replica_workers > 1 else ""
        return (
            f"{self.setup}{cut}, micro batch {self.micro_batch_samples}, {self.compute}: "
            f"{self.reason}"
        )

    @property
    def setup(self) -> WorkerSetup:
        """Kind, number and cores of the workers."""
        return WorkerSetup(self.workers, self.layout.workers, self.threads_per_worker)


def given_layout(recipe: Recipe) -> Layout:
    """The layout as far as the recipe gives it; an axis without a value is 1.

    Raises ConfigError for degrees that do not go together.
    """
    parallel = recipe.parallel
    degrees = {axis: getattr(parallel, axis) or 1 for axis in ("tensor", "expert")}
    degrees |= {"shard": parallel.sharding.degree, "context": parallel.rows.degree}
    degrees["pipeline"] = parallel.pipelining.degree
    degrees["replicate"] = parallel.replicas or 1
    try:
        return Layout(**degrees)
    except ValueError as error:
        both, wanted = degrees["shard"] * degrees["context"], degrees["expert"]
        near = max(n for n in range(1, wanted) if both % n == 0)
        hint = f"set it to {near}, or parallel.shard to a multiple of {wanted}"
        raise ConfigError([Problem("parallel", str(error), hint)]) from None


def largest_micro_batch(recipe: Recipe, *, parts: int, at_most: int) -> int:
    """The largest divisor of one of `parts` shares of the global batch that is `at_most`.

    A pipeline gets four micro batches for each of its ranks if it can, so that it idles for a fifth
    of a step at most, or else what its schedule needs.
    """
    share, pipeline = recipe.train.global_batch_samples // parts, recipe.parallel.pipelining
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    ranks, name = pipeline.degree, pipeline.schedule
    able = [n for n in sizes if fits_schedule(name, ranks=ranks, micro_batches=share // n)] or [1]
    filling = able if ranks == 1 else [n for n in able if share // n >= 4 * ranks]
    return max([size for size in filling if size <= at_most] or [min(able)])
