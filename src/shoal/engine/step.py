"""Forward and backward of one replica's share of a step, micro batch by micro batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shoal.comm.flat import ordered_sum
from shoal.comm.tree import Node, TreeSum
from shoal.data.verify import digest
from shoal.engine.state import FlatState
from shoal.layout import Share
from shoal.models.anatomy import Anatomy
from shoal.parallel.loss import chunked_loss
from shoal.parallel.precision import compute_context
from shoal.sync.every_step import EveryStep
from shoal.tasks.outcome import TaskOutput

Batch = dict[str, Tensor]


@dataclass
class StepResult:
    """Loss over the global batch, and this rank's gradients (in the state, or as tree nodes)."""

    loss: float
    targets: int
    stop: bool
    num_grains: int
    read: list[int]
    """Digest of the samples that all ranks read (data/verify.py)."""
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class StepSettings:
    """How a share is computed."""

    micro_batch_samples: int
    global_batch_samples: int
    exact: bool
    dtype: torch.dtype
    device: torch.device
    fault: str | None = None
    """`mean-of-means`: plant the classic mistake of averaging averages, to show what it does."""


class ForwardBackward:
    """Runs the task's forward and the loss's backward over the micro batches of a share."""

    def __init__(
        self,
        model: nn.Module,
        *,
        anatomy: Anatomy,
        forward: Callable[..., TaskOutput],
        state: FlatState,
        sync: EveryStep,
        settings: StepSettings,
    ) -> None:
        self._model, self._anatomy, self._forward = model, anatomy, forward
        self._state, self._sync, self._settings = state, sync, settings
        self._free: list[Tensor] = []

    def run(self, batch: Batch, *, share: Share, step: int, stop: bool) -> StepResult:
        """Gradients of the mean loss over all targets of the *global* batch (DESIGN 5.3).

        batch: input_ids, labels, position_ids, document_ids [share x T]. `stop`: this rank was
        asked to stop; the request travels with the count of targets, so that all ranks know.
        """
        settings = self._settings
        counts = torch.tensor([int((batch["labels"] != -100).sum()), int(stop), 0, 0])
        counts[2:] = torch.from_numpy(
            digest(source_ids=batch["source_ids"], sample_ids=batch["sample_ids"])
        )
        self._sync.group.sum_(counts)
        targets, stops, *read = counts.tolist()
        grains = torch.zeros(
            settings.global_batch_samples // settings.micro_batch_samples, dtype=torch.float64
        )
        self._state.zero_gradients()
        tree = TreeSum()
        for micro, start in micro_batches(batch, size=settings.micro_batch_samples):
            grain = (share.start + start) // settings.micro_batch_samples
            if targets:
                scale = 1.0 / targets
                if settings.fault == "mean-of-means":
                    scale = 1.0 / (max(1, int((micro["labels"] != -100).sum())) * grains.numel())
                grains[grain] = self._one(micro, step=step, scale=scale)
            if settings.exact:
                self._take(tree, grain)
        self._sync.group.sum_(grains)
        return StepResult(
            loss=ordered_sum(grains.tolist()) / max(targets, 1),
            targets=targets,
            stop=stops > 0,
            read=read,
            num_grains=grains.numel(),
            nodes=tree.nodes if settings.exact else [],
        )

    def _one(self, micro: Batch, *, step: int, scale: float) -> float:
        settings = self._settings
        micro = {name: tensor.to(settings.device) for name, tensor in micro.items()}
        with compute_context(settings.dtype, device=settings.device):
            output = self._forward(self._model, anatomy=self._anatomy, batch=micro, step=step)
            loss = chunked_loss(
                output.hidden,
                labels=output.labels,
                logits_of=output.logits_of,
                head_parameters=output.head_parameters,
            )
        (loss * scale).backward()
        return loss.item()

    def _take(self, tree: TreeSum, grain: int) -> None:
        """Move the gradients of one grain into the tree."""
        gradients = self._state.gradients
        node = self._free.pop() if self._free else torch.empty_like(gradients)
        node.copy_(gradients)
        gradients.zero_()
        freed = tree.push(Node(0, grain, node))
        if freed is not None:
            self._free.append(freed)


def micro_batches(batch: Batch, *, size: int) -> list[tuple[Batch, int]]:
    """Rows of `batch` in parts of `size`, each cut to its longest row, with its first row."""
    rows = batch["input_ids"].shape[0]
    parts = []
    for start in range(0, rows, size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items()}
        longest = int((part["document_ids"] >= 0).sum(dim=1).max()) if rows else 0
        length = min(part["input_ids"].shape[1], max(8, -(-longest // 8) * 8))
        part = {n: t[:, :length] if t.dim() == 2 else t for n, t in part.items()}
        parts.append((part, start))
    return parts
