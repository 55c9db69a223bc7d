"""Learning to act by trying (PPO). Scores: the mean return of episodes, beside acting at random.

Loss of a transition (Schulman et al., arXiv 1707.06347, equations 7 and 9), with r the probability
of its action over what it was when it was played, A its advantage, V the value, R the return:
-min(r A, clip(r, 1 - e, 1 + e) A) + c_v (V - R)^2 - c_e entropy. Values are learned in units of
1 / (1 - gamma), what a reward of 1 at every step is worth, so that a new head is not far off.

The model classifies: an observation is an image of one pixel, its classes are the actions and, as
the last one, the value. Shapes: B transitions, N numbers of an observation, A actions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError, DataError, Problem
from shoal.fields import Field, Fields
from shoal.observe.events import read_lines
from shoal.tasks.image_classification import ImageClassification
from shoal.tasks.pictures import OTHER, QUIET, STRONG, new_figure, save
from shoal.tasks.playing import Batches, Floats, Play, Stored, log_softmax
from shoal.tasks.reinforcement_actors import Environment, Rollouts, Settings, returns_of
from shoal.tasks.task import (
    NO_TOOLS,
    Batch,
    Curve,
    Evaluated,
    Named,
    Output,
    Record,
    Sample,
    Scores,
    Task,
    Tools,
    Vector,
    real_rows,
    was,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

_WIDTH = 16
"""Rows of a forward in evaluations, whatever the layout: so their digits are the same."""


class Reinforcement(Task):
    """Policy and values in one model. Actions are drawn in training; the likeliest are scored."""

    kind = "reinforcement"
    auto_class = "AutoModelForImageClassification"
    needs_tokenizer = False
    plays = True
    loss_falls = False
    target_name = "transitions"
    picture = "returns.png"
    curve = Curve("PPO's objective, per transition", is_scored=False)

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._rollouts: Rollouts | None = None
        self._random: Named = {}

    @property
    def fields(self) -> Fields:
        """What is stored: the number that an episode begins with."""
        return {"episodes": Field("int64", ())}

    @property
    def _environment(self) -> str:
        return str(self.options["environment"])

    @property
    def _num_actions(self) -> int:
        return int(self.settings.get("actions", 1))

    @property
    def _unit(self) -> float:
        """What values are measured in."""
        return 1.0 / (1.0 - float(self.options["gamma"]))

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"observations": N, "actions": A}` of the environment. Raises ConfigError."""
        found = Environment(self._environment)
        self.settings = {"observations": found.num_observations, "actions": found.num_actions}
        return self.settings

    def model_settings(self) -> dict[str, Any]:
        """An image of one pixel with N channels; a class for each action, and the value."""
        names = [f"action {number}" for number in range(self._num_actions)] + ["value"]
        return {
            "image_size": 1,
            "num_channels": self.settings.get("observations", 1),
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }

    def examined(self) -> Task:
        """transformers has no policies; the model is that of tiny images."""
        settings = self.model_settings()
        shape = [settings["num_channels"], 1, 1]
        return ImageClassification({"classes": list(settings["label2id"]), "shape": shape})

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"episode": n}` -> `episodes`. Raises DataError for anything else."""
        for record in records:
            if not isinstance(record.get("episode"), int):
                raise DataError(
                    "reinforcement: expected records with a number under 'episode', got keys "
                    f"{sorted(record)}\n    set data.source=episodes; the rest comes from playing"
                )
        return [{"episodes": record["episode"]} for record in records]

    def batches(self, stored: Stored, *, play: Play | None) -> Batches:
        """What the actors do, from the beginnings that are stored. Raises ConfigError."""
        options = self.options
        settings = Settings(
            self._environment,
            int(self.settings["observations"]),
            *(int(options[name]) for name in ("actors", "rollout_steps", "epochs")),
            *(float(options[name]) for name in ("gamma", "gae_lambda")),
        )
        if settings.transitions % stored.global_batch_samples:
            what = f"{stored.global_batch_samples} does not divide the {settings.transitions:,}"
            what += " transitions of a rollout (task.actors x task.rollout_steps)"
            raise ConfigError([Problem("train.global_batch_samples", what, "choose a divisor")])

        def policy(seen: NDArray[np.float32]) -> tuple[Floats, Floats]:
            assert play is not None, "who asks for batches plays"
            logits = play.logits(_pixels(seen))
            return log_softmax(logits[:, :-1]), logits[:, -1].astype(np.float64) * self._unit

        self._rollouts = Rollouts(stored, settings, policy=policy, play=play)
        return self._rollouts

    def count(self, batch: Batch) -> int:
        """Transitions, or episodes, of a batch."""
        return int(real_rows(batch).sum())

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states [B, D] that the head reads, and the transitions."""
        from shoal.models.anatomy import hidden_of, logits_of
        from shoal.tasks.losses import Summed

        dtype, head, options = next(model.parameters()).dtype, logits_of(model), self.options
        pixels = batch["observations"].to(dtype)[:, :, None, None]

        def losses(hidden: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
            return ppo_losses(
                head(hidden),
                fields,
                clip=options["clip"],
                value_coefficient=options["value_coefficient"],
                entropy_coefficient=options["entropy_coefficient"],
                unit=self._unit,
            )

        hidden = hidden_of(model, {**batch, "pixel_values": pixels}, step=step)
        return Output(hidden, batch, Summed(losses))

    def scored(self, batch: Batch, play: Play) -> list[Scores]:
        """The episodes of a batch, played with the likeliest actions; a loss is minus a return."""
        import torch

        real, starts = real_rows(batch), np.asarray(batch["episodes"])
        found = np.zeros(len(starts))

        def act(seen: NDArray[np.float32]) -> NDArray[np.int64]:
            padded = np.zeros((_WIDTH, seen.shape[1]), dtype=np.float32)
            padded[: len(seen)] = seen
            best: NDArray[np.int64] = play.logits(_pixels(padded))[: len(seen), :-1].argmax(1)
            return best

        for first in range(0, len(starts), _WIDTH):
            rows = first + np.flatnonzero(real[first : first + _WIDTH])
            found[rows] = returns_of(
                self._environment,
                starts[rows].tolist(),
                act,
                still=play.still,
                tell=lambda steps: play.tell("playing episodes", None),
            )
        return [Scores(torch.from_numpy(-found))]

    def metrics(self) -> ReturnMetrics:
        """A fresh accumulator, where nobody knows the episodes."""
        return ReturnMetrics(self._rollouts, random=math.nan)

    def metrics_on(self, data: Evaluated) -> ReturnMetrics:
        """A fresh accumulator."""
        return ReturnMetrics(self._rollouts, random=self.baseline(data)["random_return"])

    def baseline(self, data: Evaluated) -> Named:
        """`random_return`: of actions drawn alike, on the same episodes."""
        if not self._random:
            draw, actions = np.random.default_rng(0), self._num_actions
            starts = [int(row["episodes"]) for row in data.rows()]
            found = returns_of(
                self._environment, starts, lambda seen: draw.integers(actions, size=len(seen))
            )
            self._random = {"random_return": float(found.mean())}
        return self._random

    def words(self, before: Named | None, after: Named) -> list[str]:
        """Mean return before and after, and of acting at random."""
        played = after.get("environment_steps")
        steps = f" after {played:,.0f} steps of the environment" if played else ""
        return [
            f"mean return: {was(before, 'mean_return', 1)}{after['mean_return']:.1f} now{steps} "
            f"({after['evaluation_targets']:.0f} episodes, deviation "
            f"{after['return_deviation']:.1f}); acting at random: {after['random_return']:.1f}"
        ]

    def draw(self, shown: Mapping[str, Any], path: Path) -> None:
        """Returns over the steps of the environment: of training, and of evaluations."""
        rows = [row for row in read_lines(path.parent / "metrics.jsonl") if "mean_return" in row]
        figure = new_figure(8, 4.5)
        axes = figure.add_subplot()
        if shown["history"]:
            axes.plot(*zip(*shown["history"]), ".-", color=STRONG, label="training: actions drawn")
        at, mean, spread = (
            np.array([row[name] for row in rows])
            for name in ("environment_steps", "mean_return", "return_deviation")
        )
        axes.plot(at, mean, "o-", color=OTHER, label="scored: the likeliest actions")
        axes.fill_between(at, mean - spread, mean + spread, color=OTHER, alpha=0.15, linewidth=0)
        axes.axhline(shown["random"], color=QUIET, linestyle=":", label="acting at random")
        axes.set_xlabel("steps of the environment")
        axes.set_ylabel("return of an episode")
        axes.set_title(shown["environment"], loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
        save(figure, path)


class ReturnMetrics:
    """Sums over episodes: returns, their squares, how many. The rest is for a picture."""

    needs_predictions = False
    examples: Sequence[Sequence[Any]] = ()

    def __init__(self, rollouts: Rollouts | None, *, random: float) -> None:
        self._sums, self._rollouts, self._random = np.zeros(3), rollouts, random

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count episodes by their scores [B]."""
        returns = -np.asarray(scores.losses)[real_rows(batch)]
        self._sums += [float(returns.sum()), float((returns**2).sum()), float(len(returns))]

    def vector(self) -> Vector:
        """[returns, squares, episodes]."""
        return self._sums.copy()

    def result(self, vector: Vector | None = None) -> Named:
        """Mean and deviation of the returns; the loss is minus the mean, for it is to fall."""
        total, squares, episodes = (float(x) for x in (self._sums if vector is None else vector))
        mean = total / episodes if episodes else math.nan
        deviation = math.sqrt(max(0.0, squares / episodes - mean**2)) if episodes else math.nan
        named = {"evaluation_loss": -mean, "mean_return": mean, "return_deviation": deviation}
        if self._rollouts is not None:
            named["environment_steps"] = float(self._rollouts.num_played)
        return {**named, "evaluation_targets": episodes}

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Of each rollout the steps so far and the mean return; that of acting at random."""
        assert self._rollouts is not None, "a run has rollouts"
        return {
            "environment": self._rollouts.names[0],
            "history": self._rollouts.history,
            "random": self._random,
        }


def ppo_losses(
    logits: Tensor,
    fields: Mapping[str, Tensor],
    *,
    clip: float,
    value_coefficient: float,
    entropy_coefficient: float,
    unit: float,
) -> Tensor:
    """The loss of each transition [B]; the formula is at the head of this file.

    `logits` [B, A + 1]: of the actions, and the value in units of `unit`. `fields` [B]: actions,
    log_probabilities (as they were played), advantages, returns.
    """
    logs = logits[:, :-1].log_softmax(-1)
    ratio = (logs.gather(1, fields["actions"][:, None])[:, 0] - fields["log_probabilities"]).exp()
    gains = fields["advantages"]
    bounded = (ratio * gains).minimum(ratio.clamp(1 - clip, 1 + clip) * gains)
    errors = (logits[:, -1] - fields["returns"] / unit) ** 2
    entropy = -(logs.exp() * logs).sum(-1)
    return -bounded + value_coefficient * errors - entropy_coefficient * entropy


def _pixels(seen: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Observations [B, N] as images of one pixel [B, N, 1, 1]."""
    return {"pixel_values": seen[:, :, None, None]}
