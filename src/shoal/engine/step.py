"""Forward and backward of one replica's share of a step, micro batch by micro batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.comm.flat import ordered_sum
from shoal.comm.tree import Node, TreeSum
from shoal.data.batch import micro_batches
from shoal.data.verify import digest as samples_digest
from shoal.engine.digest import compare
from shoal.engine.ranks import Ranks
from shoal.engine.replica import Replica
from shoal.engine.state import FlatState
from shoal.layout import Share
from shoal.parallel import shard
from shoal.parallel.precision import LossScale, compute_context
from shoal.tasks.task import Task

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Word:
    """What a rank tells the others with its count of targets; once summed, what anybody said."""

    stop: bool = False
    """Asked to save and end after this step."""
    save: bool = False
    """Asked to save after this step."""
    leave: bool = False
    """Another epoch was announced; all go there after this step."""


@dataclass
class StepResult:
    """Loss over the global batch, and this rank's gradients (in the state, or as tree nodes)."""

    loss: float
    targets: int
    word: Word
    num_grains: int
    read: list[int]
    """Digest of the samples that all ranks read (data/verify.py)."""
    norms: list[float] = field(default_factory=list)
    """Norm of each replica's own gradients, before the reduction; empty for one replica."""
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class StepSettings:
    """How a share is computed."""

    micro_batch_samples: int
    global_batch_samples: int
    exact: bool
    dtype: torch.dtype
    device: torch.device
    loss_scale: LossScale | None = None
    """Shared with the update, which divides by it and changes it; for float16."""
    fault: str | None = None
    """`mean-of-means`: plant the classic mistake of averaging averages, to show what it does."""


class ForwardBackward:
    """Runs the task's forward and the loss's backward over the micro batches of a share."""

    def __init__(
        self,
        replica: Replica,
        *,
        task: Task,
        state: FlatState,
        ranks: Ranks,
        settings: StepSettings,
    ) -> None:
        self._replica, self._task = replica, task
        self._state, self.ranks, self._settings = state, ranks, settings
        self._free: list[Tensor] = []
        self.poison = 1.0
        """Factor on this rank's gradients of the next step; anything but 1 is a planned fault."""

    def run(
        self, batch: Batch, *, share: Share, step: int, word: Word, digest: int | None = None
    ) -> StepResult:
        """Gradients of the mean loss over all targets of the *global* batch (DESIGN 5.3).

        batch: the task's fields, sample_ids and source_ids, each [share x *dims]. `word` travels
        with the count of targets, so that all ranks know; so does `digest`, this rank's hash of its
        state.
        Raises ReplicasDiffer on all ranks when those hashes are not one; PeersLost.
        """
        settings, ranks = self._settings, self.ranks
        targets, word, read = self._count(batch, word=word, digest=digest)
        grains = torch.zeros(
            settings.global_batch_samples // settings.micro_batch_samples, dtype=torch.float64
        )
        factor = settings.loss_scale.value if settings.loss_scale else 1.0
        self._state.zero_gradients()
        tree = TreeSum()
        parts = micro_batches(batch, self._task.fields, rows=settings.micro_batch_samples)
        for number, (micro, start) in enumerate(parts):
            grain = (share.start + start) // settings.micro_batch_samples
            if targets:
                scale = 1.0 / targets
                if settings.fault == "mean-of-means":
                    scale = 1.0 / (max(1, self._task.count(micro)) * grains.numel())
                shard.micro_batch(self._replica.model, last=number == len(parts) - 1)
                grains[grain] = self._one(micro, step=step, scale=scale * factor * self.poison)
            if settings.exact:
                self._take(tree, grain)
        self.poison = 1.0
        ranks.world.pulse.mark("reduce")
        if targets:
            self._replica.finish_gradients()
            for name, sent in shard.sent_bytes(
                self._replica.model, micro_batches=len(parts)
            ).items():
                ranks.world.traffic.sent_bytes[name] += sent
        nodes = tree.nodes if settings.exact else []
        if not ranks.counts:
            grains.zero_()  # another rank of this replica says the same
        told = torch.cat([grains, torch.zeros(ranks.num_replicas, dtype=torch.float64)])
        if ranks.num_replicas > 1:
            told[grains.numel() + ranks.replica] = self._square(nodes)
        ranks.world.sum_(told)
        squares = told[grains.numel() :]
        return StepResult(
            loss=ordered_sum(told[: grains.numel()].tolist()) / max(targets, 1),
            targets=targets,
            word=word,
            read=read,
            num_grains=grains.numel(),
            norms=(squares.sqrt() / factor).tolist() if ranks.num_replicas > 1 else [],
            nodes=nodes,
        )

    def _count(
        self, batch: Batch, *, word: Word, digest: int | None
    ) -> tuple[int, Word, list[int]]:
        """Targets of the global batch, what anybody said, the digest of all samples read."""
        world = self.ranks.world
        counts = torch.zeros(6 + world.size, dtype=torch.int64)
        counts[1:4] = torch.tensor([word.stop, word.save, word.leave])
        if self.ranks.counts:
            counts[0] = self._task.count(batch)
            counts[4:6] = torch.from_numpy(
                samples_digest(source_ids=batch["source_ids"], sample_ids=batch["sample_ids"])
            )
        if digest is not None:
            counts[6 + world.rank] = digest >> 1  # 63 bits: the sum of one number and zeros
        world.sum_(counts)
        targets, stop, save, leave, *read = counts[:6].tolist()
        if digest is not None:
            compare(counts[6:].tolist(), places=self.ranks.cut.workers)
        return targets, Word(stop > 0, save > 0, leave > 0), read

    def _square(self, nodes: list[Node]) -> float:
        """Square of the norm of this rank's own part of its replica's gradients."""
        if self._replica.is_cut:
            return self._replica.own_square(self._state)
        vectors = [node.value for node in nodes] or [self._state.gradients]
        return float(torch.stack([torch.linalg.vector_norm(v) for v in vectors]).norm()) ** 2

    def _one(self, micro: Batch, *, step: int, scale: float) -> float:
        settings, pulse, replica = self._settings, self.ranks.world.pulse, self._replica
        pulse.mark("forward")
        micro = {name: tensor.to(settings.device) for name, tensor in micro.items()}

        def compute() -> Tensor:
            output = self._task.output(replica.model, replica.anatomy, micro, step=step)
            expected = scale if settings.loss_scale else 1.0
            return output.total(vocabulary=replica.vocabulary, scale=expected)

        with compute_context(settings.dtype, device=settings.device):
            loss = replica.forward(compute)
        pulse.mark("backward")
        replica.backward(loss * scale)
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
