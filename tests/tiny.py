"""A tiny corpus, a tiny recipe, and a bench that trains it: seconds per run, no network."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.engine.job import Instruments
from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.observe.events import read_lines

SUBJECTS = (
    "The lamp keeper",
    "A small boat",
    "My neighbour",
    "The clever fox",
    "Our teacher",
    "An old clock",
    "The river",
    "Every child",
)
VERBS = ("finds", "carries", "remembers", "paints", "follows", "repairs", "hides", "counts")
OBJECTS = (
    "the silver key",
    "a quiet street",
    "seven apples",
    "the morning train",
    "a letter from home",
    "the long bridge",
    "two wooden chairs",
    "a map of the island",
)
ENDS = (
    "before sunrise",
    "near the harbour",
    "without a word",
    "in the rain",
    "after school",
    "behind the wall",
    "for a whole week",
    "again and again",
)

RECIPE = """\
seed: 3
model:
  kind: config
  architecture: llama
  hidden_size: 32
  intermediate_size: 64
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  max_position_embeddings: 64
  tie_word_embeddings: true
data:
  source: {source}
  sequence_tokens: 32
  validation: {{fraction: 0.1}}
  evaluation_samples: 24
  tokenizer: {{kind: train, vocabulary_size: 300}}
train:
  steps: 30
  global_batch_samples: 16
  micro_batch_samples: auto
  evaluate_every_steps: 15
  optimizer: {{kind: adamw, learning_rate: 3.0e-3}}
  schedule: {{kind: cosine, warmup_steps: 4}}
parallel: {{replicate: 1}}
precision: {{compute: float32}}
checkpoint: {{every_steps: 10}}
launch: {{workers: processes, threads_per_worker: 1}}
"""


def tales(*, seed: int, documents: int) -> list[str]:
    """Made-up documents of very uneven length: a word or two, or 1 to 9 sentences.

    A document's last token predicts nothing, so packed rows differ in their number of targets.
    """
    draw = random.Random(seed)
    lengths = [draw.choice((0, 0, 0, 0, 1, 2, 9)) for _ in range(documents)]
    return [" ".join(_sentence(draw) for _ in range(n)) or draw.choice(ENDS) for n in lengths]


def _sentence(draw: random.Random) -> str:
    return " ".join(draw.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, ENDS)) + "."


def write_corpus(path: Path, *, seed: int = 0, documents: int = 400) -> Path:
    """JSON lines with the column `text`."""
    lines = [json.dumps({"text": text}) + "\n" for text in tales(seed=seed, documents=documents)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def share_of_letters(completion: str, record: Mapping[str, Any]) -> float:
    """A reward that any text has some of (`task.reward: tiny:share_of_letters`)."""
    return sum(each.isalpha() for each in completion) / (1 + len(completion))


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    path: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "metrics.jsonl")

    @property
    def losses(self) -> list[float]:
        """Loss of each logged step, in the order logged."""
        return [row["loss"] for row in self.rows if "loss" in row]

    @property
    def digits(self) -> list[dict[str, Any]]:
        """Every logged number that the promise covers: no times, no bytes, no memory."""
        outside = ("second", "bytes", "mfu")
        return [
            {key: value for key, value in row.items() if not any(word in key for word in outside)}
            for row in self.rows
        ]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "evaluation_loss" in row]

    @property
    def events(self) -> list[str]:
        return [row["event"] for row in read_lines(self.path / "events.jsonl")]

    @property
    def weights(self) -> str:
        """sha256 of the merged model's weights."""
        return hashlib.sha256((self.path / "model/model.safetensors").read_bytes()).hexdigest()


class Bench:
    """Trains the tiny recipe with workers of one shared fork server."""

    def __init__(self, folder: Path, *, pool: WorkerPool) -> None:
        self.folder, self.pool = folder, pool
        self.corpus = write_corpus(folder / "tales.jsonl")
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(RECIPE.format(source=self.corpus), encoding="utf-8")
        self._numbers = itertools.count()
        self._known: dict[tuple[str, ...], Run] = {}

    def new_path(self) -> Path:
        """A run directory that does not exist yet."""
        return self.folder / f"run-{next(self._numbers):03d}"

    def run(self, *overrides: str) -> Run:
        """A run with these overrides: trained once in a session, and not to be changed."""
        if overrides not in self._known:
            self._known[overrides] = self.train(*overrides)
        return self._known[overrides]

    def train(self, *overrides: str, out: Path | None = None, fault: str | None = None) -> Run:
        """A new run with these overrides, all its own; `fault` plants a mistake."""
        out = out or self.new_path()
        instruments = Instruments(mistake=fault)
        local.train(
            self.recipe,
            overrides,
            out=out,
            console=False,
            pool=self.pool,
            instruments=instruments,
        )
        return Run(out)

    def resume(self, run: Run, *overrides: str) -> Run:
        """Go on with `run`."""
        local.resume(run.path, overrides, console=False, pool=self.pool)
        return run

    def command(self, *words: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
        """Run the real command to its end."""
        keywords.setdefault("timeout", 90)
        return subprocess.run(shoal(*words), capture_output=True, text=True, **keywords)


def shoal(*words: str | Path) -> list[str]:
    """The command line of `shoal words...` with this interpreter."""
    code = "from shoal.cli.main import main; main()"
    return [sys.executable, "-c", code, *map(str, words)]


def largest_difference(found: Iterable[float], wanted: Iterable[float]) -> float:
    """Largest relative difference of two equally long series."""
    pairs = list(zip(found, wanted, strict=True))
    assert pairs, "nothing to compare"
    return max(abs(a - b) / abs(b) for a, b in pairs)
