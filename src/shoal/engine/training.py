"""The objects of one rank's run: plain data, put together by `build`, used by the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shoal.checkpoint.store import Store
from shoal.data.stream import Evaluation
from shoal.engine.ending import Watch
from shoal.engine.job import Job
from shoal.engine.passes import Batch, Passes
from shoal.engine.state import FlatState, Progress
from shoal.engine.step import Step
from shoal.engine.update import Update
from shoal.layout import Share
from shoal.models.anatomy import Anatomy
from shoal.observe.trace import Trace
from shoal.parallel.player import Player
from shoal.parallel.precision import LossScale
from shoal.parallel.ranks import Ranks
from shoal.parallel.replica import Replica, cut_anew, fill
from shoal.parallel.settings import Settings
from shoal.sync.policy import Policy
from shoal.tasks.playing import Batches
from shoal.tasks.task import Task


@dataclass
class Training:
    """What a rank trains with."""

    job: Job
    ranks: Ranks
    replica: Replica
    settings: Settings
    task: Task
    state: FlatState
    policy: Policy
    passes: Passes
    step: Step
    update: Update
    store: Store
    watch: Watch
    stream: Batches
    evaluation: Evaluation
    play: Player
    steps: int
    loss_scale: LossScale | None = None
    progress: Progress = field(default_factory=Progress)
    peak_memory_bytes: int | None = None
    shown: dict[str, Any] | None = None
    """What the task's picture is drawn of, as the last evaluation has it."""

    @property
    def model(self) -> nn.Module:
        """The model as this rank has it."""
        return self.replica.model

    @property
    def anatomy(self) -> Anatomy:
        """Where its parts are."""
        return self.replica.anatomy

    def attach(self, trace: Trace, *, check: Callable[[], None]) -> None:
        """Tell `trace` of passes and exchanges; call `check` before each pass."""
        self.passes.check = self.play.check = check
        self.passes.trace = trace
        if trace.on:
            self.ranks.world.traffic.on_sent = trace.sent

    def enter(self, ranks: Ranks) -> None:
        """Go on among other ranks, with the state as it is. Collective; raises PeersLost."""
        if self.replica.is_cut:
            cut_anew(self.replica, mesh=ranks.mesh, settings=self.settings)
            gradients = self.state.trainable(self.state.gradients)
            storage = self.state.named("parameter")
            fill(self.replica, storage=storage, gradients=gradients, draws=False)
            self.state.holdings = self.replica.holdings
        ranks.attach(self.model)
        self.ranks = self.step.ranks = self.play.ranks = ranks
        self.policy.enter(world=ranks.world, peers=ranks.peers, inside=ranks.inside)

    def share(self, step: int = 0) -> Share:
        """This rank's part of the batch of `step`: of its replica's, what its shard computes."""
        policy = self.policy
        return self.ranks.share_of(policy.share(step), multiple=policy.division.micro_batch_samples)

    def batches(self, step: int, share: Share) -> Batch:
        """A part of the global batch of `step`; reads nothing else."""
        read = self.task.drawn(self.stream.at(step, share), seed=self.job.recipe.seed)
        return {name: torch.from_numpy(array) for name, array in read.items()}

    def is_hash_due(self, step: int) -> bool:
        """Whether replicas must have something alike after `step` steps, and are to show it."""
        every = self.job.recipe.sync.verify_every_steps
        if every == "auto":
            every = 1 if self.ranks.mesh.device.type == "cpu" else 100
        alone = self.ranks.num_replicas == 1 or self.ranks.world.shares_memory
        due = bool(every) and step % every == 0 and not alone
        return due and (self.policy.equal_after(step) or self.policy.meets_after(step))

    def facts(self) -> dict[str, Any]:
        """What a rank that joins, or a run that is resumed, needs besides tensors."""
        facts = {
            "progress": vars(self.progress).copy(),
            "peak_memory_bytes": self.peak_memory_bytes,
            "watch": self.watch.state(),
            "policy": self.policy.facts(),
            "shares": self.policy.shares.facts(),
            "batches": self.stream.kept(),
        }
        return facts | ({"loss_scale": self.loss_scale.state()} if self.loss_scale else {})

    def resume(self, state: dict[str, Any], *, same_policy: bool) -> None:
        """Stand where the state of a checkpoint says, whichever layout and policy wrote it."""
        self.restore({key: value for key, value in state.items() if key != "policy"})
        own = state.get("policies", [])
        if same_policy and len(own) == self.ranks.world.size:
            self.policy.restore(own[self.ranks.world.rank])
        else:  # what replicas had of their own went into a mean, or there was another policy
            self.policy.begin(self.progress.step)

    def arrive(self, step: int) -> int:
        """Join replicas that meet at servers; the step to go on with, where they know a later one.

        The moments of this replica's own optimizer stay as they are.
        """
        there, facts = self.policy.arrive(step, brings=not self.job.joining)
        if there != step:
            self.restore(facts or {"progress": {}})
            progress = self.progress
            progress.step, progress.samples = there, there * self.stream.global_batch_samples
            progress.applied_steps = min(progress.applied_steps, there)
            self.update.restore(there, applied_steps=progress.applied_steps)
        return there

    def restore(self, facts: dict[str, Any]) -> None:
        """Stand where `facts` of a living rank say."""
        for name, value in facts["progress"].items():
            setattr(self.progress, name, value)
        self.watch.restore(facts.get("watch", {}))
        self.peak_memory_bytes = facts.get("peak_memory_bytes") or self.peak_memory_bytes
        if self.loss_scale is not None and "loss_scale" in facts:
            self.loss_scale.restore(facts["loss_scale"])
        self.stream.restore(facts.get("batches", {}))
        self.policy.shares.restore(facts.get("shares", {}))
        if facts.get("policy"):
            self.policy.restore(facts["policy"])
        self.update.restore(self.progress.step, applied_steps=self.progress.applied_steps)
