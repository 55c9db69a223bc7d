"""Passes of a replica whose blocks are divided into stages, several micro batches on their way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.group import Traffic, watched
from shoal.engine.passes import Batch, Micro, OneByOne, num_tokens
from shoal.legal import ZERO_BUBBLE
from shoal.parallel import shard
from shoal.parallel.schedules import Line, Schedule, Shape, shown_to_all, walk
from shoal.parallel.stages import Stage, Stages


class Scheduled(OneByOne):
    """Every rank runs the model's own forward; in all stages but the last it ends at their end."""

    def __init__(self, *arguments: Any, schedule: str, traffic: Traffic, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._name, self.traffic = schedule, traffic
        self.takes_apart = schedule in ZERO_BUBBLE
        """Gradients of weights are made after those of inputs, by themselves."""
        self._schedules: dict[int, Schedule] = {}
        self._of: nn.Module | None = None

    @property
    def stages(self) -> Stages:
        """Those of this rank."""
        stages = self._replica.sharded.stages
        assert stages is not None, "the replica has a pipeline"
        return stages

    @property
    def model(self) -> nn.Module:
        """What of the model this rank has."""
        return self._replica.model

    @property
    def _line(self) -> Line:
        sharded, model = self._replica.sharded, self._replica.model
        group = sharded.mesh.group("pipeline")
        assert group is not None, "a pipeline has several ranks"
        return Line(group, self._device, next(model.parameters()).dtype, self.traffic)

    def _shape(self, batch: Batch) -> Shape:
        """Of the hidden states that one stage hands to the next."""
        model: Any = self._replica.model
        rows, tokens = self._own(batch)["input_ids"].shape
        multiple = int(getattr(model, "shoal_sequence_multiple", 1))
        return rows, -(-tokens // multiple), model.config.hidden_size

    def _schedule(self, count: int) -> Schedule:
        """The one for `count` micro batches, of the model as it is cut now."""
        model = self._replica.model
        if model is not self._of:
            self._schedules, self._of = {}, model
        if count not in self._schedules:
            stages = self.stages
            self._schedules = {
                count: Schedule(
                    stages,
                    line=self._line,
                    schedule=self._name,
                    num_micro_batches=count,
                    parameters=partial(stages.parameters, model),
                )
            }
        return self._schedules[count]

    def train(
        self, micros: Sequence[Micro], *, scale: float, step: int, done: Callable[[int], None]
    ) -> list[float]:
        schedule = self._schedule(len(micros))
        step_of = _Step(self, micros, scale=scale, step=step, done=done)
        shapes = [self._shape(each.batch) for each in micros]
        if self.takes_apart:
            # the end of one stage's backward would give up what another of this rank has gathered,
            # whose weights are then looked for among parts, and not found
            shard.micro_batch(self.model, last=False)
        self.begin("forward")  # which may be another rank's for a while: nobody is stuck who waits
        watched(lambda: schedule.step(step_of, shapes=shapes))
        step_of.wait()
        if self.takes_apart:
            watched(lambda: shard.reduce_held(self.model))
        sums = [0.0 if each is None else each.item() for each in step_of.losses]
        return self._replica.context.sum(sums) if self._replica.context else sums

    def through(
        self,
        stage: Stage,
        hidden: Tensor | None,
        function: Callable[..., Tensor],
        micro: Micro,
        *,
        exactly: bool = False,
    ) -> Tensor:
        """`function(model, batch)` as far as it runs in `stage`; `exactly`: in float32."""

        def part(model: nn.Module, batch: Batch) -> Tensor:
            return self.stages.run(stage, hidden, lambda: function(model, batch))

        return self._run(part, micro.batch, exactly=exactly)

    def _through(self, function: Callable[..., Tensor], micro: Micro) -> None:
        self._walk(function, micro)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        model = self._replica.model
        model.eval()
        try:
            last = partial(self._last_logits, last=num_tokens(batch) - 1)
            found = self._walk(last, Micro(batch), exactly=True)
            given = None if found is None else found.float()
            return watched(lambda: shown_to_all(given, stages=self.stages, line=self._line))
        finally:
            model.train()

    def _walk(
        self, function: Callable[..., Tensor], micro: Micro, *, exactly: bool = False
    ) -> Tensor | None:
        forward = partial(self.through, function=function, micro=micro, exactly=exactly)
        shape = self._shape(micro.batch)
        return watched(lambda: walk(self.stages, line=self._line, shape=shape, forward=forward))


class _Step:
    """What the stages of this rank compute in one step (parallel/schedules.py: Compute)."""

    def __init__(
        self,
        passes: Scheduled,
        micros: Sequence[Micro],
        *,
        scale: float,
        step: int,
        done: Callable[[int], None],
    ) -> None:
        self._passes, self._micros = passes, micros
        self._scale, self._step, self._done = scale, step, done
        self._left = [len(passes.stages.own)] * len(micros)
        self._to_come = dict.fromkeys(passes.stages.own, len(micros))
        self._left_at = time.perf_counter()
        self.losses: list[Tensor | None] = [None] * len(micros)

    def forward(self, stage: Stage, hidden: Tensor | None, number: int) -> Tensor:
        passes, micro = self._passes, self._micros[number]
        with self._pass("forward", stage, number):
            output = passes.through(stage, hidden, self._loss, micro)
        if not stage.is_last:
            return output
        self.losses[number] = output.detach()
        return output * self._scale

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._passes.loss(model, batch, self._step, self._scale)

    @contextmanager
    def backward(self, stage: Stage, number: int) -> Iterator[None]:
        passes = self._passes
        with self._pass("backward", stage, number):
            self._to_come[stage] -= 1
            last = not self._to_come[stage] and not passes.takes_apart
            shard.micro_batch(passes.model, last=last, blocks=passes.stages.blocks(stage))
            all_last = last and not any(self._to_come.values())
            shard.micro_batch(passes.model, last=all_last, blocks=())
            yield

    def weights(self, stage: Stage, number: int) -> AbstractContextManager[None]:
        return self._pass("weights", stage, number)

    def after_backward(self, stage: Stage, number: int) -> None:
        self._left[number] -= 1
        if not self._left[number]:
            self._done(self._micros[number].number)

    def wait(self) -> None:
        """Since it last computed, this rank has waited for other stages and their transfers."""
        self._passes.traffic.count("send", 0, began=self._left_at)
        self._left_at = time.perf_counter()

    @contextmanager
    def _pass(self, name: str, stage: Stage, number: int) -> Iterator[None]:
        """What a stage computes for one micro batch."""
        self.wait()
        passes, micro = self._passes, self._micros[number].number
        passes.begin("forward" if name == "forward" else "backward")
        with passes.trace.span(name, step=self._step, stage=stage.number, micro_batch=micro):
            yield
        self._left_at = time.perf_counter()
