"""Forward and backward passes of a replica: what training, evaluation, proofs and timing run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shoal.models.anatomy import hidden_of, logits_of
from shoal.observe.pulse import Pulse
from shoal.observe.trace import Trace
from shoal.parallel import shard
from shoal.parallel.precision import compute_context
from shoal.parallel.replica import Replica
from shoal.tasks.task import Scores, Task

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Micro:
    """A micro batch, and its number among those of the global batch."""

    batch: Batch
    number: int = 0


class Passes(ABC):
    """How a replica computes. Every rank of it makes the same calls; all raise PeersLost."""

    def __init__(self) -> None:
        self.check: Callable[[], None] = lambda: None
        """Called before each pass of a step: raises PeersLost where its sum cannot complete."""
        self.trace = Trace()
        """Told of each pass of a step."""

    @abstractmethod
    def train(
        self, micros: Sequence[Micro], *, scale: float, step: int, done: Callable[[int], None]
    ) -> list[float]:
        """Add the gradients of `scale` x the SUM of losses; returns the sums, unscaled, in order.

        0.0 on ranks that see no loss. `done(number)`: the gradients of this micro batch are in.
        """

    @abstractmethod
    def look(self, micros: Sequence[Micro], *, step: int) -> list[Batch]:
        """What the task sees of each micro batch (`Task.seen`), without gradients."""

    @abstractmethod
    def score(self, micros: Sequence[Micro], *, predict: bool) -> list[Scores]:
        """The losses of batches, without gradients; empty on ranks that see no loss."""

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """Logits [B, V] of the last position, in float32, on every rank."""


class OneByOne(Passes):
    """One micro batch after the other, each forward followed by its backward."""

    def __init__(
        self,
        replica: Replica,
        *,
        task: Task,
        dtype: torch.dtype,
        device: torch.device,
        pulse: Pulse,
        scales_loss: bool = False,
    ) -> None:
        """`dtype`: of matrix products. `scales_loss`: gradients may overflow (float16)."""
        super().__init__()
        self._replica, self._task = replica, task
        self._dtype, self._device, self._pulse = dtype, device, pulse
        self._scales_loss = scales_loss

    def train(
        self, micros: Sequence[Micro], *, scale: float, step: int, done: Callable[[int], None]
    ) -> list[float]:
        sums = []
        for position, micro in enumerate(micros):
            shard.micro_batch(self._replica.model, last=position == len(micros) - 1)
            self.begin("forward")
            with self.trace.span("forward", step=step, micro_batch=micro.number):
                loss = self._run(self.loss, micro.batch, step, scale)
            self.begin("backward")
            with self.trace.span("backward", step=step, micro_batch=micro.number):
                self._replica.backward(loss * scale)
            sums.append(loss.item())
            done(micro.number)
        return self._replica.context.sum(sums) if self._replica.context else sums

    @torch.no_grad()
    def look(self, micros: Sequence[Micro], *, step: int) -> list[Batch]:
        found: list[Batch] = []

        def seen(model: nn.Module, batch: Batch) -> Tensor:
            found.append(self._task.seen(model, batch, step=step))
            return next(iter(found[-1].values()))  # a root wants a tensor

        for micro in micros:
            self.begin("forward")
            self._run(seen, micro.batch)
        return found

    def _run(
        self, function: Callable[..., Tensor], batch: Batch, *rest: Any, exactly: bool = False
    ) -> Tensor:
        dtype = torch.float32 if exactly else self._dtype
        with compute_context(dtype, device=self._device):
            return self._replica.run(function, self._own(batch), *rest)

    def _own(self, batch: Batch) -> Batch:
        """What this rank has of a batch, on its device."""
        moved = {name: tensor.to(self._device) for name, tensor in batch.items()}
        context = self._replica.context
        return moved if context is None else context.own_part(moved, self._task.fields)

    def begin(self, phase: str) -> None:
        """A pass begins. Raises PeersLost."""
        self.check()
        self._pulse.mark(phase)

    def loss(self, model: nn.Module, batch: Batch, step: int, scale: float) -> Tensor:
        """SUM of the losses of a batch."""
        output = self._task.output(model, self._replica.anatomy, batch, step=step)
        expected = scale if self._scales_loss else 1.0
        return output.total(vocabulary=self._replica.vocabulary, scale=expected)

    @torch.no_grad()
    def score(self, micros: Sequence[Micro], *, predict: bool) -> list[Scores]:
        kept: list[Scores] = []
        self._replica.model.eval()
        try:
            for micro in micros:
                found: list[Scores] = []
                self._through(partial(self._scores, predict=predict, found=found), micro)
                kept += [self._whole(each, micro.batch) for each in found]
        finally:
            self._replica.model.train()
        return kept

    def _through(self, function: Callable[..., Tensor], micro: Micro) -> None:
        """Run `function(model, batch)` without a backward, as far as this rank takes part."""
        self._run(function, micro.batch)

    def _scores(
        self, model: nn.Module, batch: Batch, *, predict: bool, found: list[Scores]
    ) -> Tensor:
        """The losses, which a root wants; they and the predictions go to `found`."""
        output = self._task.output(model, self._replica.anatomy, batch)
        found.append(output.each(vocabulary=self._replica.vocabulary, predict=predict))
        return found[0].losses

    def _whole(self, scores: Scores, batch: Batch) -> Scores:
        """Of whole rows, on the CPU."""
        losses, guesses = scores.losses, scores.predictions
        if (context := self._replica.context) is not None:
            losses = context.whole(losses, tokens=num_tokens(batch))
            guesses = None if guesses is None else context.whole(guesses, tokens=num_tokens(batch))
        return Scores(losses.cpu(), None if guesses is None else guesses.cpu())

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        model = self._replica.model
        model.eval()
        try:
            place = num_tokens(batch) - 1
            return self._run(self._last_logits, batch, place, exactly=True).float()
        finally:
            model.train()

    def _last_logits(self, model: nn.Module, batch: Batch, last: int) -> Tensor:
        hidden = hidden_of(model, batch)  # [B, T, D]; [B, D] of one state per sample, as an image's
        if self._replica.context is not None:
            hidden = self._replica.context.at(hidden, place=last)
        part = logits_of(model)(hidden[:, -1:] if hidden.dim() == 3 else hidden)
        vocabulary = self._replica.vocabulary
        logits = part if vocabulary is None else vocabulary.gather(part)
        return logits[:, -1] if logits.dim() == 3 else logits


def num_tokens(batch: Batch) -> int:
    """Positions of a row; 1 where rows have no tokens."""
    return batch["input_ids"].shape[1] if "input_ids" in batch else 1
