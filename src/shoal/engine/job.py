"""What a worker is given to do: one type for every way of starting, and its JSON. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision


@dataclass(frozen=True)
class Inputs:
    """Where everything lies that a worker reads, and what the task learned from the data."""

    data_directory: str
    tokenizer_directory: str | None
    """None where the task has no text."""
    model_directory: str | None
    task_settings: dict[str, Any]
    vocabulary_size: int | None
    train_samples: int
    validation_samples: int
    counts: dict[str, int] = field(default_factory=dict)
    """Of the part that is trained on: documents, samples, tokens, targets. Empty in older runs."""
    special_tokens: dict[str, Any] = field(default_factory=dict)
    """Fields of data/special.py's SpecialTokens; empty without a tokenizer, and in older runs."""
    generation: dict[str, Any] | None = None
    """The generation_config.json that a pretrained model came with."""
    content: dict[str, str] = field(default_factory=dict)
    """Hashes of data, tokenizer and model folder, which a resume compares. Empty in older runs."""
    adapter_directory: str | None = None
    """Where the adapter lies that a run begins with."""
    companion_directory: str | None = None
    """Where the frozen model lies that the task's loss needs."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Inputs:
        """The inverse of `to_json`; keys that older runs have beside are left out."""
        return cls(**{each.name: tree[each.name] for each in fields(cls) if each.name in tree})


@dataclass(frozen=True)
class Instruments:
    """What proofs, rehearsals and tests attach to a run (engine/instruments/)."""

    mistake: str | None = None
    """A planted mistake, for showing that checks see it."""
    planned_faults: tuple[dict[str, Any], ...] = ()
    """Faults to commit at a rank, step and phase."""
    record: bool = False
    """Keep parameters and gradients of every step."""


@dataclass(frozen=True)
class Job:
    """A run as its workers see it. `to_json` is what travels; `from_json` reads it back."""

    recipe: Recipe
    run: Path
    inputs: Inputs
    decision: Decision
    resume: bool = False
    joining: bool = False
    """Takes the place of a lost worker: the state comes from a living one, and is not drawn."""
    final_model: bool = True
    score: str | None = None
    """Only evaluate, and write the scores to this file."""
    servers: str | None = None
    """Folder with the keys and addresses of the run's parameter servers, where it has any."""
    start: int = 0
    """Of the run, by its number in the object store that it saves to (checkpoint/remote.py)."""
    own_disks: bool = False
    """Hosts share no run folder: who started the workers keeps what they say of the run."""
    double: bool = False
    """Compute in float64, for proofs."""
    instruments: Instruments = field(default_factory=Instruments)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a message to a worker, which has another working directory."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "run": str(self.run.resolve()),
            "inputs": self.inputs.to_json(),
            "decision": self.decision.to_json(),
            "resume": self.resume,
            "joining": self.joining,
            "final_model": self.final_model,
            "score": self.score,
            "servers": self.servers,
            "start": self.start,
            "own_disks": self.own_disks,
            "double": self.double,
            "instruments": asdict(self.instruments),
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Job:
        """The inverse of `to_json`; keys that are not a job's (a rank, a path) are left alone."""
        attached = dict(tree["instruments"])
        attached["planned_faults"] = tuple(attached["planned_faults"])
        return cls(
            recipe=Recipe.model_validate(tree["recipe"]),
            run=Path(tree["run"]),
            inputs=Inputs.from_json(tree["inputs"]),
            decision=Decision.from_json(tree["decision"]),
            resume=tree["resume"],
            joining=tree["joining"],
            final_model=tree["final_model"],
            score=tree["score"],
            servers=tree["servers"],
            start=tree["start"],
            own_disks=tree["own_disks"],
            double=tree["double"],
            instruments=Instruments(**attached),
        )

    def without_fault(self, number: int) -> Job:
        """The same job once the planned fault `number` has struck: nobody commits it again."""
        left = (f for f in self.instruments.planned_faults if f["number"] != number)
        return replace(self, instruments=replace(self.instruments, planned_faults=tuple(left)))
