"""Learning from rewards of a language model's own completions (GRPO).

Loss of a token (Shao et al., arXiv 2402.03300, equation 3), with r its probability over what it was
when it was sampled, A the completion's advantage, q the reference's log-probability less its own:
-min(r A, clip(r, 1 - e, 1 + e') A) + k (exp(q) - q - 1). A is the reward less the group's mean,
over the group's deviation. The mean is over all tokens of the batch (DAPO, arXiv 2503.14476,
equation 8), so that long completions count for what they are.

The loss depends on each token's likelihood alone, so its gradient is the cross entropy's of each
token, weighted. Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import ConfigError, DataError, Problem
from shoal.fields import IGNORED, Field, Fields
from shoal.observe.events import read_lines
from shoal.tasks.causal_lm import CausalLM
from shoal.tasks.grpo_rollouts import Completions, Sampler, asked_of, records_of
from shoal.tasks.imports import imported
from shoal.tasks.pictures import OTHER, QUIET, STRONG, new_figure, save
from shoal.tasks.playing import Batches, Play, Stored
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
    Vocabulary,
    counted,
    real_rows,
    was,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

Reward = Callable[[str, Mapping[str, Any]], float]


class GRPO(Task):
    """Groups of completions of each prompt, by the model as it is; the better ones get likelier."""

    kind = "grpo"
    auto_class = "AutoModelForCausalLM"
    causal = True
    plays = True
    loss_falls = False
    target_name = "completion tokens"
    picture = "rewards.png"
    curve = Curve("GRPO's objective, per token", is_scored=False)

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._rollouts: Completions | None = None

    @property
    def fields(self) -> Fields:
        """What is stored: the prompt, and its record as JSON."""
        return {
            "prompt_ids": Field("int64", (None,), fill=-1, sequence="prompt"),
            "records": Field("uint8", (None,), sequence="record"),
        }

    @property
    def rows_per_sample(self) -> int:
        """Completions of a prompt."""
        return int(self.options["group"])

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"end": id}`: what ends a completion. Raises ConfigError where there is no reward."""
        self._reward()
        self.settings = {"end": tools.end_token_id}
        return self.settings

    def _reward(self) -> Reward:
        path = str(self.options["reward"])
        module, _, name = path.partition(":")
        found = getattr(imported(module, named=path, key="task.reward"), name, None)
        if not callable(found):
            what = f"{module} has no function {name}"
            hint = "write `def my_reward(completion, record): return 1.0` there"
            raise ConfigError([Problem("task.reward", what, hint)])

        def reward(completion: str, record: Mapping[str, Any]) -> float:
            given = found(completion, record)
            if not isinstance(given, int | float) or not math.isfinite(given):
                raise DataError(
                    f"task.reward: {path} gave {given!r} for {completion[:40]!r} to "
                    f"{record.get('text', '')[:40]!r}\n    it must give a finite number"
                )
            return float(given)

        return reward

    def examined(self) -> Task:
        """transformers has no rewards; the model is a language model."""
        return CausalLM()

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"text": prompt, ...}` -> its tokens, and the whole record. Raises DataError."""
        room = int(self.options["completion_tokens"])
        samples: list[Sample] = []
        for record in records:
            text = record.get("text")
            if not isinstance(text, str):
                raise DataError(
                    f"grpo: expected a prompt under 'text', got keys {sorted(record)}\n"
                    "    name the column that holds it (data.text_field)"
                )
            ids = list(tools.tokenizer.encode(text).ids)
            if tools.sequence_tokens is not None and len(ids) + room > tools.sequence_tokens:
                raise DataError(
                    f"grpo: the prompt {text[:40]!r} has {len(ids)} tokens, which with "
                    f"task.completion_tokens={room} are more than data.sequence_tokens="
                    f"{tools.sequence_tokens}\n    set that higher, or take the prompt out"
                )
            row = json.dumps(record, default=str).encode()
            samples.append({"prompt_ids": ids, "records": np.frombuffer(row, dtype=np.uint8)})
        return samples

    def batches(self, stored: Stored, *, play: Play | None) -> Batches:
        """Completions of the prompts that are stored, rewarded. Raises ConfigError."""
        sampler = None if play is None else self._sampler(play)
        group, epochs = self.rows_per_sample, int(self.options["epochs"])
        self._rollouts = Completions(stored, group=group, epochs=epochs, sampler=sampler)
        return self._rollouts

    def _sampler(self, play: Play) -> Sampler:
        return Sampler(
            play,
            self._reward(),
            group=self.rows_per_sample,
            tokens=int(self.options["completion_tokens"]),
            end=self.settings.get("end"),
        )

    def count(self, batch: Batch) -> int:
        """Tokens of completions; of an evaluation, prompts."""
        return counted(batch["labels"]) if "labels" in batch else int(real_rows(batch).sum())

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states [B, T, D], and the completions; with a divergence, the reference's too."""
        import torch

        from shoal.models.adapter import switched_off
        from shoal.models.anatomy import head_parameters, hidden_of, logits_of

        reference, kl = None, float(self.options["kl_coefficient"])
        if kl:
            was_training = model.training
            model.eval()
            with torch.no_grad(), switched_off(model):
                reference = hidden_of(model, dict(batch), step=step)
            model.train(was_training)
        clip = float(self.options["clip"])
        above = self.options.get("clip_above")
        return Output(
            hidden=hidden_of(model, dict(batch), step=step),
            fields=batch,
            loss=TokenPolicyLoss(
                logits_of(model),
                head_parameters(model),
                reference,
                Bounds(clip, clip if above is None else float(above), kl),
            ),
        )

    def scored(self, batch: Batch, play: Play) -> list[Scores]:
        """Of each prompt the mean reward of drawn completions, and that of the likeliest one."""
        import torch

        real, sampler = real_rows(batch), self._sampler(play)
        found = np.zeros((len(real), 2))
        asked = [
            asked_of(batch, row, key=(0, 0, int(batch["sample_ids"][row]))) if is_real else None
            for row, is_real in enumerate(real.tolist())
        ]
        for row, made in enumerate(sampler.complete(asked, likeliest=1)):
            if made is not None:
                found[row] = [made.rewards[:-1].mean(), made.rewards[-1]]
        scores = torch.from_numpy(found)
        return [Scores(-scores[:, 0], scores[:, 1])]

    def metrics(self) -> RewardMetrics:
        """A fresh accumulator."""
        return RewardMetrics(self._rollouts)

    def baseline(self, data: Evaluated) -> Named:
        """`silent_reward`: of saying nothing."""
        reward = self._reward()
        found = [reward("", records_of(np.asarray(row["records"]))) for row in data.rows()]
        return {"silent_reward": sum(found) / len(found)}

    def words(self, before: Named | None, after: Named) -> list[str]:
        """Mean reward before and after, of drawn completions and of the likeliest ones."""
        return [
            f"mean reward: {was(before, 'mean_reward', 3)}{after['mean_reward']:.3f} now; of the "
            f"likeliest completions: {was(before, 'likeliest_reward', 3)}"
            f"{after['likeliest_reward']:.3f} now ({after['evaluation_targets']:.0f} prompts); "
            f"saying nothing: {after['silent_reward']:.3f}"
        ]

    def prompts(self) -> tuple[Sequence[str], int]:
        """`prompts` and `sample_tokens` of the recipe's task."""
        return self.options.get("prompts", ()), self.options.get("sample_tokens", 0)

    def draw(self, shown: Mapping[str, Any], path: Path) -> None:
        """Rewards over the steps: of what was learned from, and of held-out prompts."""
        rows = [row for row in read_lines(path.parent / "metrics.jsonl") if "mean_reward" in row]
        figure = new_figure(8, 4.5)
        axes = figure.add_subplot()
        if shown["history"]:
            axes.plot(*zip(*shown["history"]), color=STRONG, alpha=0.6, label="training: drawn")
        at = [row["step"] for row in rows]
        drawn, likeliest = (
            [row[name] for row in rows] for name in ("mean_reward", "likeliest_reward")
        )
        axes.plot(at, drawn, "o-", color=OTHER, label="held out: drawn")
        axes.plot(at, likeliest, "s:", color=QUIET, label="held out: the likeliest")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("mean reward")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
        save(figure, path)


@dataclass(frozen=True)
class Bounds:
    """How far probabilities may move, and how they are held."""

    below: float
    above: float
    kl: float


@dataclass(frozen=True)
class TokenPolicyLoss:
    """The loss of tokens of completions, from their cross entropies.

    Fields [B, T]: labels (-100 is none), log_probabilities as sampled, and advantages.
    """

    logits_of: Any
    head: Sequence[nn.Parameter]
    reference: Tensor | None
    bounds: Bounds

    def total(
        self, output: Output, *, vocabulary: Vocabulary | None = None, scale: float = 1.0
    ) -> Tensor:
        """The SUM over tokens: its value, with the gradient of weighted cross entropies."""
        import torch

        from shoal.tasks.losses import chunked_loss

        with torch.no_grad():
            losses, slopes = self._tokens(output, vocabulary)
        weighted = chunked_loss(
            output.hidden,
            output.fields["labels"],
            self.logits_of,
            head_parameters=self.head,
            vocabulary=vocabulary,
            expected_scale=scale,
            weights=slopes,
        )
        return weighted + (losses.sum() - weighted.detach())

    def each(
        self, output: Output, *, vocabulary: Vocabulary | None = None, predict: bool = False
    ) -> Scores:
        """The loss of each token [B, T]."""
        import torch

        with torch.no_grad():
            return Scores(self._tokens(output, vocabulary)[0])

    def _tokens(self, output: Output, vocabulary: Vocabulary | None) -> tuple[Tensor, Tensor]:
        """Of each token its loss, and the derivative by its cross entropy [B, T]."""
        import torch

        fields, bounds = output.fields, self.bounds
        real, gains = fields["labels"] != IGNORED, fields["advantages"]
        own = self._losses(output.hidden, output, vocabulary)
        ratio = (-own - fields["log_probabilities"]).exp()
        plain = ratio * gains
        clipped = ratio.clamp(1 - bounds.below, 1 + bounds.above) * gains
        losses, slopes = -torch.minimum(plain, clipped), plain * (plain <= clipped)
        if self.reference is not None:
            apart = own - self._losses(self.reference, output, vocabulary)
            losses = losses + bounds.kl * (apart.exp() - apart - 1)
            slopes = slopes + bounds.kl * (apart.exp() - 1)
        return losses * real, slopes * real

    def _losses(self, hidden: Tensor, output: Output, vocabulary: Vocabulary | None) -> Tensor:
        from shoal.tasks.losses import chunked_losses

        return chunked_losses(
            hidden,
            output.fields["labels"],
            self.logits_of,
            head_parameters=self.head,
            vocabulary=vocabulary,
        ).losses


class RewardMetrics:
    """Sums over prompts: [reward of drawn completions, of the likeliest, prompts]."""

    needs_predictions = False
    examples: Sequence[Sequence[Any]] = ()

    def __init__(self, rollouts: Completions | None) -> None:
        self._sums, self._rollouts = np.zeros(3), rollouts

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count prompts by their scores [B]."""
        real = real_rows(batch)
        drawn, likeliest = -np.asarray(scores.losses)[real], np.asarray(scores.predictions)[real]
        self._sums += [float(drawn.sum()), float(likeliest.sum()), float(real.sum())]

    def vector(self) -> Vector:
        """[drawn, likeliest, prompts]."""
        return self._sums.copy()

    def result(self, vector: Vector | None = None) -> Named:
        """Mean rewards; the loss is minus the first, for it is to fall."""
        drawn, likeliest, prompts = (float(x) for x in (self._sums if vector is None else vector))
        mean, best = (x / prompts if prompts else math.nan for x in (drawn, likeliest))
        named = {"evaluation_loss": -mean, "mean_reward": mean, "likeliest_reward": best}
        return {**named, "evaluation_targets": prompts}

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Of each rollout the step and the mean reward."""
        return {"history": self._rollouts.history if self._rollouts else []}
