"""Whether a run ends before its last step: its loss diverges, or it has reached what was asked.

Decided from numbers that all ranks have alike, so that all end at the same step. Where replicas
step alone each sees its own losses, and they agree where they meet.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import msgspec

from shoal.config.recipe import TrainSection

_BEGINNING = 5


@dataclass(frozen=True)
class Ending:
    """Why a run ends early."""

    kind: Literal["diverged", "reached", "no-progress"]
    text: str

    @property
    def is_success(self) -> bool:
        """Whether what was trained is wanted: it is saved, and the model is written."""
        return self.kind != "diverged"


@dataclass
class _Seen:
    """What is decided from; it travels with the state of the run."""

    first: list[float] = field(default_factory=list)
    """Losses of the first steps."""
    step: int = 0
    loss: float = 0.0
    above: int = 0
    """Steps in a row, up to this one, whose loss is above the start or not finite."""
    diverged: bool = False
    """Some replica's has been so for long enough, as all know."""
    evaluated_at: int = -1
    evaluation_loss: float | None = None
    best_step: int | None = None
    best_loss: float = math.inf
    worse: int = 0
    """Evaluations since the best one."""


class Watch:
    """Looks at every loss and evaluation. `alone`: replicas see losses of their own."""

    def __init__(
        self, train: TrainSection, *, keep_best: bool, alone: bool, falls: bool = True
    ) -> None:
        """`falls`: a loss that stays above its start diverges, not only one that is not finite."""
        self._train, self._keep_best, self._alone = train, keep_best, alone
        self._falls = falls
        self._seen = _Seen()

    def stepped(self, step: int, loss: float, *, applied: bool) -> None:
        """A step was taken. `applied`: False where its gradients were not finite."""
        seen, finite = self._seen, applied and math.isfinite(loss)
        if len(seen.first) < _BEGINNING and finite:
            seen.first.append(loss)
        low = not self._falls or loss <= self.start
        seen.above = 0 if finite and low else seen.above + 1
        seen.step, seen.loss = step, loss
        if not self._alone:
            self.agree(self.diverges)

    def evaluated(self, step: int, loss: float) -> None:
        """The validation part has been scored after `step` steps."""
        seen = self._seen
        if step == seen.evaluated_at:  # done again, for a rank was lost
            return
        seen.evaluated_at, seen.evaluation_loss, seen.worse = step, loss, seen.worse + 1
        if loss < seen.best_loss:
            seen.best_step, seen.best_loss, seen.worse = step, loss, 0

    @property
    def start(self) -> float:
        """The loss to stay below: the highest of the first steps, if they did not diverge."""
        first = self._seen.first
        return min(max(first), first[0] + abs(first[0]) / 2) if first else math.inf

    @property
    def diverges(self) -> bool:
        """Whether the losses seen here have been above the start for long enough."""
        return self._seen.above >= self._train.divergence_steps

    def agree(self, diverged: bool) -> None:
        """What is true of any replica, said on every rank."""
        self._seen.diverged = diverged

    @property
    def begins_to_diverge(self) -> str | None:
        """What to warn of at this step, if anything; the same once for each time."""
        if self._train.on_divergence != "warn":
            return None
        return self._text() if self._seen.above == self._train.divergence_steps else None

    def _text(self) -> str:
        seen = self._seen
        steps = max(seen.above, self._train.divergence_steps)
        return (
            f"the loss has been above its start ({self.start:.4g}) or not finite for {steps} steps "
            f"(from step {seen.step - steps + 1}); at step {seen.step} it is {seen.loss:.4g}"
        )

    @property
    def best(self) -> int | None:
        """The step of the best evaluation, where its save is to be kept."""
        return self._seen.best_step if self._keep_best else None

    @property
    def ending(self) -> Ending | None:
        """Why the run ends here, if it does."""
        seen, until = self._seen, self._train.until
        if seen.diverged and self._train.on_divergence == "stop":
            return Ending("diverged", self._text())
        if until is None or seen.evaluation_loss is None:
            return None
        wanted, loss = until.evaluation_loss, seen.evaluation_loss
        if wanted is not None and loss <= wanted:
            text = f"the evaluation loss is {loss:.4g}, train.until.evaluation_loss {wanted:.4g}"
            return Ending("reached", text)
        if until.patience is not None and seen.worse >= until.patience:
            text = (
                f"{seen.worse} evaluations in a row were no better than {seen.best_loss:.4g} "
                f"at step {seen.best_step}"
            )
            return Ending("no-progress", text)
        return None

    def state(self) -> dict[str, Any]:
        """Plain data, for `restore`."""
        return asdict(self._seen)

    def restore(self, state: dict[str, Any]) -> None:
        """Stand where `state` says; older checkpoints have none, and the watch begins anew."""
        self._seen = msgspec.convert(state, type=_Seen)
