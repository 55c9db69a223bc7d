"""One step of one rank up to the update: count and vote, then passes over its micro batches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from shoal.comm.flat import ordered_sum, sum_rows
from shoal.comm.tree import Node, TreeSum
from shoal.data.batch import micro_batches
from shoal.data.verify import digest as samples_digest
from shoal.engine.membership.digest import compare
from shoal.engine.overlap import Overlap
from shoal.engine.passes import Batch, Micro, Passes
from shoal.engine.state import FlatState
from shoal.layout import Share
from shoal.parallel import shard
from shoal.parallel.precision import LossScale
from shoal.parallel.ranks import Ranks
from shoal.parallel.replica import Replica
from shoal.sync.policy import Gradients, Policy
from shoal.tasks.task import Task


@dataclass(frozen=True)
class Votes:
    """What a rank wants after this step; once summed, what anybody wants."""

    stop: bool = False
    """Asked to save and end."""
    save: bool = False
    """Asked to save."""
    leave: bool = False
    """Another generation was announced; all go there."""


@dataclass(frozen=True)
class Counted:
    """What the ranks that step together know before they compute."""

    targets: int
    votes: Votes
    read: list[int]
    """Digest of the samples that they read (data/verify.py)."""


@dataclass
class StepResult:
    """Loss over what is stepped together, and this rank's gradients."""

    loss: float
    counted: Counted
    gradients: Gradients
    norms: list[float] = field(default_factory=list)
    """Norm of each replica's own gradients, before the reduction; empty for one replica."""
    figures: dict[str, float] = field(default_factory=dict)
    """What else a row of metrics.jsonl tells of the step."""

    @property
    def targets(self) -> int:
        """Targets that the loss is a mean over."""
        return self.counted.targets


@dataclass(frozen=True)
class StepSettings:
    """How a share is computed."""

    micro_batch_samples: int
    global_batch_samples: int
    exact: bool
    loss_scale: LossScale | None = None
    """Shared with the update, which divides by it and changes it; for float16."""


class Step:
    """The two halves of a step before the update. Both are collective; both raise PeersLost."""

    def __init__(
        self,
        replica: Replica,
        *,
        task: Task,
        passes: Passes,
        state: FlatState,
        ranks: Ranks,
        policy: Policy,
        settings: StepSettings,
    ) -> None:
        self._replica, self._task, self.passes, self._state = replica, task, passes, state
        self.ranks, self._policy, self._settings = ranks, policy, settings
        self._free: list[Tensor] = []
        whole = not settings.exact and not replica.is_cut
        self._overlap = Overlap(replica.model, state=state, policy=policy) if whole else None
        self.poison = 1.0
        """Factor on this rank's gradients of the next step; anything but 1 is a planned fault."""

    def in_micro_batches_of(self, samples: int) -> Step:
        """The same step, in micro batches of `samples`."""
        other = copy(self)
        other._settings = replace(self._settings, micro_batch_samples=samples)
        return other

    def count(
        self, batch: Batch, *, votes: Votes, step: int = 0, digest: int | None = None
    ) -> Counted:
        """Targets of those who step together, what anybody wants, the digest of all samples read.

        batch: the task's fields, sample_ids and source_ids, each [share x *dims]. `digest`: this
        rank's hash of its state, compared where all ranks step together. Shares of later steps are
        agreed by the way. Raises ReplicasDiffer on all ranks when those hashes are not one.
        """
        group, shares = self._policy.together, self._policy.shares
        told = None if self._policy.alone else shares.told(step)
        counts = torch.zeros(6 + group.size * (1 if told is None else 2), dtype=torch.int64)
        if told is not None:
            counts[6 + group.size + group.rank] = told
        counts[1:4] = torch.tensor([votes.stop, votes.save, votes.leave])
        if self.ranks.reads:
            counts[0] = self._task.count(batch)
            counts[4:6] = torch.from_numpy(
                samples_digest(source_ids=batch["source_ids"], sample_ids=batch["sample_ids"])
            )
        if digest is not None:
            counts[6 + group.rank] = digest >> 1  # 63 bits: the sum of one number and zeros
        group.sum_(counts)
        targets, stop, save, leave, *read = counts[:6].tolist()
        if digest is not None:
            compare(counts[6 : 6 + group.size].tolist(), layout=self.ranks.layout)
        if told is not None:
            shares.agree(counts[6 + group.size :].tolist(), step=step)
        return Counted(targets, Votes(stop > 0, save > 0, leave > 0), read)

    def train(self, batch: Batch, *, share: Share, counted: Counted, step: int) -> StepResult:
        """Gradients of the mean loss over all targets counted, by passes over the micro batches.

        batch: the samples of `share`, this rank's part of the global batch, as the task has them.
        """
        settings, targets, policy = self._settings, counted.targets, self._policy
        factor = settings.loss_scale.value if settings.loss_scale else 1.0
        micros = self._micros(batch, share=share)
        if targets and self._task.compares:
            seen = sum_rows(
                self.passes.look(micros, step=step),
                group=policy.together,
                count=settings.global_batch_samples,
                start=share.start if self.ranks.reads else None,
            )
            for name, rows in self._task.compared(seen).items():
                batch = {**batch, name: rows[share.start : share.stop]}
            micros = self._micros(batch, share=share)
        self._state.zero_gradients()
        self._replica.load()  # what a step that was given up has counted
        tree, losses = TreeSum(), [0.0] * len(micros)
        overlap = self._overlap if targets and self._overlap and self._overlap.begin() else None
        if targets:
            if overlap is not None and len(micros) == 1:
                overlap.arm()
            began = time.perf_counter()
            losses = self.passes.train(
                micros,
                scale=factor * self.poison / targets,
                step=step,
                done=partial(self._done, micros=micros, tree=tree, overlap=overlap),
            )
            policy.shares.note(time.perf_counter() - began, micro_batches=len(micros))
        elif settings.exact:
            for micro in micros:
                self._take(tree, micro.number)
        self.poison = 1.0
        policy.together.pulse.mark("reduce")
        if targets:
            self._finish(num_micro_batches=len(micros))
        if overlap is not None:
            overlap.finish()
        gradients = Gradients(
            self._state.gradients,
            self._state.layout,
            tree.nodes if settings.exact else [],
            targets,
        )
        squares = overlap.squares if overlap is not None else []
        loss, norms, figures = self._sum_losses(
            micros, losses, gradients=gradients, squares=squares
        )
        return StepResult(
            loss=loss / targets if targets else math.nan,
            counted=counted,
            gradients=gradients,
            norms=[norm / factor for norm in norms],
            figures=figures,
        )

    def _micros(self, batch: Batch, *, share: Share) -> list[Micro]:
        size = self._settings.micro_batch_samples
        parts = micro_batches(batch, self._task.fields, rows=size)
        return [Micro(micro, (share.start + start) // size) for micro, start in parts]

    def _finish(self, *, num_micro_batches: int) -> None:
        """After the last backward: the sums that axes inside the replica still lack."""
        self._replica.sum_partial(self._state.trainable(self._state.gradients))
        sent = shard.sent_bytes(self._replica.model, micro_batches=num_micro_batches)
        for name, num_bytes in sent.items():
            self.ranks.world.traffic.sent_bytes[name] += num_bytes

    def _sum_losses(
        self,
        micros: Sequence[Micro],
        losses: Sequence[float],
        *,
        gradients: Gradients,
        squares: Sequence[Tensor],
    ) -> tuple[float, list[float], dict[str, float]]:
        """The loss summed over all micro batches in order, each replica's gradient norm, and what
        the experts were given."""
        settings, ranks, group = self._settings, self.ranks, self._policy.together
        count = settings.global_batch_samples // settings.micro_batch_samples
        replicas = 0 if self._policy.alone or ranks.num_replicas == 1 else ranks.num_replicas
        given = self._replica.load()
        sums = torch.zeros(count + replicas, dtype=torch.float64)
        if ranks.speaks:  # else another rank of this replica says the same
            for micro, loss in zip(micros, losses, strict=True):
                sums[micro.number] = loss
        if replicas:
            own = float(torch.stack(list(squares)).sum()) if squares else self._square(gradients)
            sums[count + ranks.replica] = own
        sums = torch.cat([sums, given])
        group.sum_(sums)
        each, norms, given = sums.split([count, replicas, len(given)])
        figures = self._replica.load_figures(given)
        return ordered_sum(each.tolist()), norms.sqrt().tolist(), figures

    def _square(self, gradients: Gradients) -> float:
        """Square of the norm of this rank's own part of its replica's gradients."""
        if self._replica.is_cut:
            named = self._state.trainable(gradients.flat)
            return float(self._replica.holdings.own_square(named))
        vectors = [node.value for node in gradients.nodes] or [gradients.flat]
        return float(torch.stack([torch.linalg.vector_norm(v) for v in vectors]).norm()) ** 2

    def _done(
        self, number: int, *, micros: Sequence[Micro], tree: TreeSum, overlap: Overlap | None
    ) -> None:
        """The gradients of micro batch `number` are in."""
        if self._settings.exact:
            self._take(tree, number)
        elif overlap is not None and len(micros) > 1 and number == micros[-2].number:
            overlap.arm()

    def _take(self, tree: TreeSum, number: int) -> None:
        """Move the gradients of one micro batch into the tree."""
        gradients = self._state.gradients
        node = self._free.pop() if self._free else torch.empty_like(gradients)
        node.copy_(gradients)
        gradients.zero_()
        freed = tree.push(Node(0, number, node))
        if freed is not None:
            self._free.append(freed)
