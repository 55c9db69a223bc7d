"""The losses: the cross entropy of many tokens, chunk by chunk, and the sum of any function.

Tokens x vocabulary in float32 is the largest tensor of a small model's step. So the logits of a
chunk of tokens are made, turned into their own gradient in place, pulled back to the hidden states
and the head, and forgotten, all within the forward (as Liger Kernel does, arXiv 2410.10989).
Where the head is cut by vocabulary, ranks exchange three numbers per token (the largest logit, the
sum of exponentials below it, the target's logit): no rank ever holds a token's whole logits.

Shapes: N tokens (any leading shape), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shoal.fields import IGNORED
from shoal.tasks.task import Output, Scores, Vocabulary

Logits = Callable[[Tensor], Tensor]

CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}
"""Budget for one chunk of logits in float32, by the kind of device. On a CPU: small enough for the
cache, large enough that the work hides the cost of starting it; a GPU has no use for the cache, and
starts products of less than a thousand tokens as often as it computes."""


@dataclass(frozen=True)
class TokenCrossEntropy:
    """Cross entropy of the classes that a head tells apart, such as a vocabulary's tokens.

    `logits_of` maps [N, D] to [N, V] and reads no parameters but `head`. The labels, shaped as the
    hidden states without D, are the field `labels`.
    """

    logits_of: Logits
    head: Sequence[nn.Parameter] = ()

    def total(
        self, output: Output, *, vocabulary: Vocabulary | None = None, scale: float = 1.0
    ) -> Tensor:
        """The sum over targets; see `chunked_loss`."""
        return chunked_loss(
            output.hidden,
            output.fields["labels"],
            self.logits_of,
            head_parameters=self.head,
            vocabulary=vocabulary,
            expected_scale=scale,
        )

    def each(
        self, output: Output, *, vocabulary: Vocabulary | None = None, predict: bool = False
    ) -> Scores:
        """Cross entropy and likeliest class of each position; see `chunked_losses`."""
        return chunked_losses(
            output.hidden,
            output.fields["labels"],
            self.logits_of,
            head_parameters=self.head,
            predict=predict,
            vocabulary=vocabulary,
        )


@dataclass(frozen=True)
class AtPlaces(TokenCrossEntropy):
    """As its parent while training; evaluated are other targets, at some places of each row.

    The fields `asked` [B, K] (targets, -100 is none) and `places` [B, K] say which; predictions are
    all logits there [B, K, V].
    """

    def each(
        self, output: Output, *, vocabulary: Vocabulary | None = None, predict: bool = False
    ) -> Scores:
        """The loss of each target that is asked for [B, K], and the logits when asked for."""
        places = output.fields["places"]
        rows = torch.arange(len(places), device=places.device)[:, None]
        hidden = output.hidden[rows, places]
        found = chunked_losses(
            hidden,
            output.fields["asked"],
            self.logits_of,
            head_parameters=self.head,
            vocabulary=vocabulary,
        )
        if not predict:
            return found
        with torch.no_grad():
            logits = self.logits_of(hidden)
            whole = logits if vocabulary is None else vocabulary.gather(logits)
        return Scores(found.losses, whole)


@dataclass(frozen=True)
class Summed:
    """The sum over targets of any function: regression, several labels, boxes, policy gradients.

    `function(hidden, fields)` gives the loss of each target, 0 where there is none, and is
    differentiated by torch; `guess(hidden, fields)` what the model says for each.
    """

    function: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    guess: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None = None

    def total(
        self, output: Output, *, vocabulary: Vocabulary | None = None, scale: float = 1.0
    ) -> Tensor:
        """The sum, added up in float32 or wider. Raises ValueError for a head that was cut."""
        return self._losses(output, vocabulary).sum()

    @torch.no_grad()
    def each(
        self, output: Output, *, vocabulary: Vocabulary | None = None, predict: bool = False
    ) -> Scores:
        """The function's values, and the guesses when asked for."""
        losses = self._losses(output, vocabulary)
        if not predict or self.guess is None:
            return Scores(losses)
        return Scores(losses, self.guess(output.hidden, output.fields))

    def _losses(self, output: Output, vocabulary: Vocabulary | None) -> Tensor:
        if vocabulary is not None:
            raise ValueError(
                "a summed loss reads the whole output of the head, but the head was cut by its "
                "classes\n    set parallel.tensor to 1"
            )
        losses = self.function(output.hidden, output.fields)
        return losses.to(_wide(losses.dtype))


def chunk_tokens_for(num_labels: int, *, device: str = "cpu") -> int:
    """Tokens per chunk so that their float32 logits fit the budget; a multiple of 64."""
    fitting = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (4 * max(num_labels, 1))
    return max(64, fitting // 64 * 64)


def chunked_loss(
    hidden: Tensor,
    labels: Tensor,
    logits_of: Logits,
    *,
    head_parameters: Sequence[nn.Parameter] = (),
    chunk_tokens: int | None = None,
    vocabulary: Vocabulary | None = None,
    expected_scale: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """SUM over targets of the cross entropy, a float32 scalar (float64 for float64 hidden states).

    `hidden` [..., D]; `labels` int64 [...], -100 = no target. `logits_of` maps [N, D] to [N, V] and
    reads no parameters but `head_parameters`, which get gradients (a tied embedding among them adds
    this gradient to its own). Differentiable once. `chunk_tokens` None: from a byte budget.
    `vocabulary`: `logits_of` gives this rank's part of the logits; every rank of the group gets the
    same loss, and a part of the gradient of `hidden` (its sum over the group is the gradient).
    `expected_scale`: what the loss will be multiplied by before backward. Right without it; with
    it, gradients are made at that scale, which float16 needs (its smallest number is 6e-8).
    `weights` [...] like the labels: each target's cross entropy is multiplied by its own, which is
    held fixed; None: all 1.
    """
    flat, targets = _targets(hidden, labels)
    if not torch.is_grad_enabled():
        losses = chunked_losses(
            hidden,
            labels,
            logits_of,
            head_parameters=head_parameters,
            chunk_tokens=chunk_tokens,
            vocabulary=vocabulary,
        ).losses
        return (losses if weights is None else losses * weights).sum()
    wanted = [each for each in head_parameters if each.requires_grad]
    chunk = chunk_tokens or _chunk_for(flat, logits_of, head_parameters)
    each = None if weights is None else weights.detach().reshape(-1)
    how = _How(logits_of, chunk, vocabulary, expected_scale, each)
    result: Tensor = _ChunkedLoss.apply(flat, targets, how, *wanted)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def chunked_losses(
    hidden: Tensor,
    labels: Tensor,
    logits_of: Logits,
    *,
    head_parameters: Sequence[nn.Parameter] = (),
    chunk_tokens: int | None = None,
    predict: bool = False,
    vocabulary: Vocabulary | None = None,
) -> Scores:
    """Evaluation: `losses` float32 like `labels`; `predictions` int64 like `labels` when `predict`.

    Positions without a target have loss 0 and prediction -100.
    """
    flat, targets = _targets(hidden, labels)
    chosen = targets != IGNORED
    rows = torch.nonzero(chosen).squeeze(1)
    wide = _wide(hidden.dtype)
    losses = torch.zeros(targets.shape, dtype=wide, device=hidden.device)
    guesses = torch.full_like(targets, IGNORED) if predict else None
    chunk = chunk_tokens or _chunk_for(flat, logits_of, head_parameters)
    for part in rows.split(chunk):
        logits = logits_of(flat[part])
        scores = _scored(logits, targets[part], vocabulary)
        losses[part] = scores.normaliser - scores.at_target
        if guesses is not None:
            guesses[part] = scores.best
    return Scores(
        losses.view(labels.shape), None if guesses is None else guesses.view(labels.shape)
    )


@dataclass(frozen=True)
class _How:
    """Everything of one loss that is no tensor."""

    logits_of: Logits
    chunk: int
    vocabulary: Vocabulary | None
    scale: float
    weights: Tensor | None = None


class _ChunkedLoss(torch.autograd.Function):
    """Loss and all gradients in the forward; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, how: _How, *head: nn.Parameter
    ) -> Tensor:
        wide = _wide(hidden.dtype)
        rows = _rows_with_targets(targets)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_gradient = torch.zeros_like(hidden) if rows is not None else torch.empty_like(hidden)
        head_gradients: list[Tensor | None] = [None] * len(head)
        needs_hidden = ctx.needs_input_grad[0]
        for part in _parts(len(targets) if rows is None else len(rows), how.chunk, rows):
            weights = None if how.weights is None else how.weights[part]
            loss, gradients = _chunk(
                hidden[part].detach(), targets[part], how, head, needs_hidden, weights
            )
            total += loss
            if needs_hidden:
                hidden_gradient[part] = gradients[0]
                gradients = gradients[1:]
            for index, gradient in enumerate(gradients):
                before = head_gradients[index]
                head_gradients[index] = gradient if before is None else before.add_(gradient)
        ctx.scale = how.scale
        # without a target too: a rank whose head had no gradient would send its peers less
        ctx.save_for_backward(
            hidden_gradient,
            *[
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(head, head_gradients)
            ],
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, *head_gradients = ctx.saved_tensors
        factor = gradient / ctx.scale
        head = [each * factor for each in head_gradients]
        scaled = hidden_gradient * factor if ctx.needs_input_grad[0] else None
        return (scaled, None, None, *head)


def _chunk(
    hidden: Tensor,
    targets: Tensor,
    how: _How,
    head: Sequence[nn.Parameter],
    needs_hidden: bool,
    weights: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss of one chunk [N, D] and its scaled gradients by (hidden if needed, *head)."""
    with torch.enable_grad():
        hidden = hidden.requires_grad_(needs_hidden)
        logits = how.logits_of(hidden)
    with torch.no_grad():
        scores = _scored(logits, targets, how.vocabulary)
        losses = scores.normaliser - scores.at_target
        loss = (losses if weights is None else losses * weights).sum()
        gradient = scores.probabilities
        if how.vocabulary is None:
            gradient[torch.arange(len(targets), device=targets.device), targets] -= 1.0
        else:
            gradient.scatter_add_(1, scores.own[:, None], -scores.has[:, None].to(gradient.dtype))
        if weights is not None:
            gradient *= weights[:, None]
        if how.scale != 1.0:
            gradient *= how.scale
        gradient = gradient.to(logits.dtype)
    wanted = [hidden, *head] if needs_hidden else list(head)
    return loss, torch.autograd.grad(logits, wanted, grad_outputs=gradient)


@dataclass(frozen=True)
class _Chunk:
    """Of one chunk, per token [N]; `probabilities` [N, entries on this rank]."""

    normaliser: Tensor
    at_target: Tensor
    best: Tensor
    probabilities: Tensor
    own: Tensor
    has: Tensor


def _scored(logits: Tensor, targets: Tensor, vocabulary: Vocabulary | None) -> _Chunk:
    """Softmax over the vocabulary from the part of the logits [N, entries] on this rank."""
    wide = _wide(logits.dtype)
    # One buffer of N x V and one exponential: probabilities, which become the gradient. The
    # normaliser is read off the largest probability, which cannot underflow:
    # log sum exp(x) = max x - log p(max).
    highest, best = logits.max(dim=-1)
    probabilities = functional.softmax(logits, dim=-1, dtype=wide)
    normaliser = highest.to(wide) - probabilities.gather(-1, best[:, None])[:, 0].log()
    own, has = targets, torch.ones_like(targets, dtype=torch.bool)
    if vocabulary is not None:
        own = targets - vocabulary.start
        has = (own >= 0) & (own < vocabulary.size)
        own, best = own.masked_fill(~has, 0), best + vocabulary.start
    at_target = logits.gather(-1, own[:, None])[:, 0].to(wide)
    if vocabulary is not None:
        parts = vocabulary.exchange(
            torch.stack(
                [normaliser, at_target.masked_fill(~has, 0.0), highest.to(wide), best.to(wide)]
            )
        )
        # a rank's normaliser is its own part's: their log-sum-exp is the whole's
        whole = torch.logsumexp(parts[:, 0], dim=0)
        probabilities *= torch.exp(normaliser - whole)[:, None]
        normaliser, at_target = whole, parts[:, 1].sum(dim=0)
        winner = parts[:, 2].argmax(dim=0)
        best = parts[:, 3].gather(0, winner[None])[0].to(best.dtype)
    return _Chunk(normaliser, at_target, best, probabilities, own, has)


def _targets(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"chunked loss: hidden states {tuple(hidden.shape)} and labels {tuple(labels.shape)} "
            "disagree; expected hidden [..., D] and labels [...]"
        )
    return hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)


def _rows_with_targets(targets: Tensor) -> Tensor | None:
    """Positions of rows with a target, or None when every row has one (no copy is needed then)."""
    chosen = targets != IGNORED
    return None if bool(chosen.all()) else torch.nonzero(chosen).squeeze(1)


def _parts(count: int, chunk: int, rows: Tensor | None) -> list[Any]:
    if rows is not None:
        return list(rows.split(chunk)) if count else []
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Type of the softmax: float32, or float64 where the input has it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_for(flat: Tensor, logits_of: Logits, head: Sequence[nn.Parameter]) -> int:
    return chunk_tokens_for(_num_labels(flat, logits_of, head), device=flat.device.type)


def _num_labels(flat: Tensor, logits_of: Logits, head: Sequence[nn.Parameter]) -> int:
    """V: the longest first dim of the head's weights, else the width of one row's logits."""
    if head:
        return max(int(parameter.shape[0]) for parameter in head)
    if not len(flat):
        return 1
    with torch.no_grad():
        return int(logits_of(flat[:1]).shape[-1])
