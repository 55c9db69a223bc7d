"""What a run asks for together: layout, policy, codec, model, and what else bears on them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from shoal.layout import Layout
from shoal.legal.facts import ModelFacts


def axis_names() -> list[str]:
    """All axes, `expert` among them."""
    return [each.name for each in fields(Layout)]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What a run asks for together. None: not known (yet), and so not judged."""

    layout: Layout = field(default_factory=Layout)
    policy: str = "every-step"
    codec: str = "none"
    fragments: int = 1
    """Parts of the model that meet in turn."""
    workers: str = "processes"
    """`processes`, `threads` or `auto`."""
    num_workers: int | None = None
    """How many there are."""
    elastic: bool = False
    """The replicate degree may shrink while the run goes on."""
    shard_level: str = "parameters"
    context_kind: str = "ring"
    offload: bool = False
    recompute: str = "none"
    compile: bool = False
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    split: tuple[int, ...] = ()
    """Blocks of each stage of a pipeline; empty: by cost."""
    runs_once: bool = True
    """The task's loss follows from one forward of the model."""
    sequence_tokens: int | None = None
    global_batch_samples: int | None = None
    micro_batch_samples: int | None = None
    exact: bool = False
    grid_group: int | None = None
    """Layers compute with rounded weights, of which so many share a scale; 0: a whole row."""
    optimizer: str = "adamw"
    dropout: str = "keyed"
    balance: str = "sequence"
    """Over what the balance loss of experts is taken."""
    family: str | None = None
    facts: ModelFacts | None = None
    """None although the family is given: nobody has written down its sizes."""
    whole_logits: bool = False
    """The model's logits are more than head(hidden) (models/anatomy.py)."""
    token_losses: bool = True
    """The task's loss is a sum over tokens, each of which reads its own hidden state."""
    shares: str = "equal"
    """Of every batch: `equal` or `measured`."""

    @property
    def cut_axes(self) -> list[str]:
        """Axes along which a replica is cut."""
        return [
            axis for axis in axis_names() if axis != "replicate" and self.layout.degree(axis) > 1
        ]

    def of_model(self, facts: ModelFacts) -> Combination:
        """The same for a model of these sizes."""
        return replace(self, family=facts.family, facts=facts)
