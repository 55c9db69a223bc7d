import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.fields import IGNORED
from shoal.tasks.losses import (
    Summed,
    TokenCrossEntropy,
    chunk_tokens_for,
    chunked_loss,
    chunked_losses,
)
from shoal.tasks.task import Output


def _problem(
    *, tokens: tuple[int, ...] = (3, 7), size: int = 8, labels: int = 11, ignored: float = 0.3
) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(0)
    hidden = torch.randn(*tokens, size, requires_grad=True)
    targets = torch.randint(0, labels, tokens)
    targets[torch.rand(tokens) < ignored] = IGNORED
    return hidden, targets, nn.Linear(size, labels)


def _whole(hidden: Tensor, labels: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    logits = logits_of(hidden).float()
    return functional.cross_entropy(
        logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="sum", ignore_index=IGNORED
    )


@pytest.mark.parametrize("chunk", [1, 4, 64, None])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("capped", [False, True])
def test_equals_the_whole_cross_entropy(chunk: int | None, ignored: float, capped: bool) -> None:
    hidden, labels, head = _problem(ignored=ignored)
    logits_of = (lambda h: torch.tanh(head(h) / 3) * 3) if capped else head
    parameters = list(head.parameters())
    ours = chunked_loss(hidden, labels, logits_of, head_parameters=parameters, chunk_tokens=chunk)
    theirs = _whole(hidden, labels, logits_of)
    # at most 21 float32 terms of size 3, summed in another order
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    mine = torch.autograd.grad(ours * 0.25, [hidden, *parameters], allow_unused=True)
    own = torch.autograd.grad(theirs * 0.25, [hidden, *parameters])
    for first, second in zip(mine, own):
        first = torch.zeros_like(second) if first is None else first
        assert torch.allclose(first, second, rtol=1e-5, atol=1e-6)


def test_gradients_in_float64() -> None:
    hidden, labels, head = _problem()
    head.double()
    hidden = hidden.detach().double().requires_grad_()

    def loss(states: Tensor, *_: Tensor) -> Tensor:
        parameters = list(head.parameters())
        return chunked_loss(states, labels, head, head_parameters=parameters, chunk_tokens=4)

    assert torch.autograd.gradcheck(loss, (hidden, *head.parameters()))


def test_a_tied_embedding_gets_both_gradients() -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    head.weight = embedding.weight
    ids, labels = torch.randint(0, 11, (2, 5)), torch.randint(0, 11, (2, 5))
    chunked_loss(embedding(ids), labels, head, head_parameters=[head.weight]).backward()
    ours = embedding.weight.grad.clone()
    embedding.weight.grad = None
    _whole(embedding(ids), labels, head).backward()
    assert torch.allclose(ours, embedding.weight.grad, rtol=1e-5, atol=1e-6)


def test_gradients_accumulate_over_micro_batches() -> None:
    hidden, labels, head = _problem(tokens=(4, 6))
    for rows in (slice(0, 2), slice(2, 4)):
        chunked_loss(
            hidden[rows], labels[rows], head, head_parameters=list(head.parameters())
        ).backward()
    expected = torch.autograd.grad(_whole(hidden, labels, head), [hidden, head.weight])
    assert torch.allclose(hidden.grad, expected[0], atol=1e-6)
    assert torch.allclose(head.weight.grad, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_frozen_parts_get_no_gradient(frozen: str) -> None:
    hidden, labels, head = _problem()
    if frozen == "head":
        head.requires_grad_(False)
    else:
        hidden = hidden.detach()
    loss = chunked_loss(hidden, labels, head, head_parameters=list(head.parameters()))
    loss.backward()
    assert (head.weight.grad is None) == (frozen == "head")
    assert (hidden.grad is None) == (frozen == "hidden")
    assert torch.allclose(loss, _whole(hidden, labels, head))


def test_bfloat16_regions_make_float32_losses() -> None:
    hidden, labels, head = _problem(tokens=(64,), size=32, labels=50)
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked_loss(
            hidden, labels, head, head_parameters=list(head.parameters()), chunk_tokens=16
        )
        logits = head(hidden)
    theirs = _whole(hidden, labels, lambda _: logits)
    assert ours.dtype == torch.float32 and logits.dtype == torch.bfloat16
    # both start from the same bfloat16 logits: only the float32 sums differ
    assert torch.allclose(ours, theirs, rtol=1e-6)
    mine = torch.autograd.grad(ours, [hidden, head.weight, head.bias])
    own = torch.autograd.grad(theirs, [hidden, head.weight, head.bias])
    for first, second in zip(mine, own):
        # the gradients of four chunks are rounded to bfloat16 (2^-9) before they are summed
        assert float((first - second).norm()) <= 2e-2 * float(second.norm())


@settings(deadline=None, max_examples=30)
@given(st.floats(-1e4, 1e4), st.floats(0, 1e4))
def test_extreme_logits_stay_finite(shift: float, spread: float) -> None:
    logits = (torch.linspace(-1, 1, 5) * spread + shift).repeat(3, 1).requires_grad_()
    labels = torch.tensor([0, 2, 4])
    loss = chunked_loss(logits, labels, lambda h: h)
    loss.backward()
    expected = functional.cross_entropy(logits.detach(), labels, reduction="sum")
    # the normaliser is read off the largest logit: one rounding of a number of its size
    assert abs(float(loss.detach() - expected)) <= 1e-6 * (abs(shift) + spread + 1) * 3
    assert torch.isfinite(logits.grad).all()


class _Largest(TorchDispatchMode):
    """The largest float32 tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and each.dtype == torch.float32:
                self.elements = max(self.elements, each.untyped_storage().nbytes() // 4)
        return result


def test_whole_logits_never_exist() -> None:
    hidden, labels, head = _problem(tokens=(640,), labels=3000, ignored=0.1)
    with _Largest() as seen:
        loss = chunked_loss(
            hidden, labels, head, head_parameters=list(head.parameters()), chunk_tokens=64
        )
        loss.backward()
        with torch.no_grad():
            chunked_losses(hidden, labels, head, chunk_tokens=64, predict=True)
    assert seen.elements == 64 * 3000


def test_a_head_without_a_target_has_a_gradient_of_zero() -> None:
    """A rank may see no target in its micro batch; peers still wait for what it sums."""
    hidden, labels, head = _problem()
    loss = chunked_loss(
        hidden, torch.full_like(labels, -100), head, head_parameters=list(head.parameters())
    )
    loss.backward()
    assert loss.item() == 0
    assert all(each.grad is not None and not each.grad.any() for each in head.parameters())


def test_chunks_follow_the_budget() -> None:
    assert chunk_tokens_for(4096) == 512
    assert chunk_tokens_for(4096, device="cuda") == 64 * 512
    assert chunk_tokens_for(250_000) == 64  # never less: smaller products waste the processor
    assert chunk_tokens_for(9) % 64 == 0


def test_evaluation_gives_losses_and_predictions_by_position() -> None:
    hidden, labels, head = _problem()
    found = chunked_losses(hidden, labels, head, chunk_tokens=4, predict=True)
    logits = head(hidden).detach()
    assert torch.allclose(found.losses.sum(), _whole(hidden, labels, head), rtol=1e-6)
    assert not found.losses[labels == IGNORED].any()
    expected = torch.where(labels == IGNORED, IGNORED, logits.argmax(-1))
    assert torch.equal(found.predictions, expected)
    assert chunked_losses(hidden, labels, head).predictions is None
    with torch.no_grad():
        loss = chunked_loss(hidden, labels, head)
    assert torch.allclose(loss, found.losses.sum())


def test_runs_repeat_bit_for_bit_in_threads() -> None:
    hidden, labels, head = _problem(tokens=(300,), labels=500)
    parameters = list(head.parameters())

    def run() -> tuple[Tensor, ...]:
        states = hidden.detach().requires_grad_()
        loss = chunked_loss(states, labels, head, head_parameters=parameters, chunk_tokens=64)
        return (loss.detach(), *torch.autograd.grad(loss, [states, *parameters]))

    torch.set_num_threads(1)
    expected, wrong = run(), []

    def work() -> None:
        torch.set_num_threads(1)
        for _ in range(5):
            if not all(torch.equal(a, b) for a, b in zip(run(), expected)):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_shapes_that_disagree_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and labels \(2, 4\) disagree"):
        chunked_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), lambda h: h)


def squares(hidden: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Regression: half the squared error of the mean of a row's hidden states."""
    return 0.5 * (hidden.mean(dim=-1) - fields["score"]) ** 2


def test_a_summed_loss_is_the_sum_of_its_function_and_differentiable() -> None:
    hidden = torch.randn(7, 4, requires_grad=True)
    score = torch.randn(7)
    output = Output(hidden, {"score": score}, Summed(squares))
    output.total(scale=3.0).backward()
    wanted = functional.mse_loss(hidden.mean(dim=-1), score, reduction="sum") / 2
    assert torch.allclose(output.total(), wanted)
    (gradient,) = torch.autograd.grad(wanted, hidden)
    assert torch.allclose(hidden.grad, gradient)
    found = output.each(predict=True)
    assert torch.allclose(found.losses.sum(), wanted) and found.predictions is None
    assert not found.losses.requires_grad


def test_sums_of_any_function_are_taken_in_float32() -> None:
    """1,000 ones in bfloat16 add up to 256, where one more changes nothing."""
    ones = torch.ones(1000, 1, dtype=torch.bfloat16)
    output = Output(ones, {}, Summed(lambda hidden, fields: hidden[:, 0]))
    assert output.total().dtype == torch.float32 and float(output.total()) == 1000
    double = Output(ones.double(), {}, Summed(lambda hidden, fields: hidden[:, 0]))
    assert double.total().dtype == torch.float64


def test_extra_terms_are_added_as_they_are() -> None:
    hidden, balance = torch.ones(2, 1), torch.tensor(0.25, requires_grad=True)
    output = Output(hidden, {}, Summed(lambda hidden, fields: hidden[:, 0]), extra=(balance,))
    output.total().backward()
    assert float(output.total().detach()) == 2.25 and float(balance.grad) == 1.0


def test_both_losses_agree_on_the_cross_entropy() -> None:
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(8, 5), torch.tensor([0, 4, IGNORED, 2, 1, 1])
    found = []
    for kind in ("tokens", "summed"):
        hidden = torch.linspace(-1, 1, 48).view(6, 8).requires_grad_()
        head.zero_grad()

        def entropy(hidden: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return functional.cross_entropy(head(hidden), fields["labels"], reduction="none")

        guess = Summed(entropy, guess=lambda hidden, fields: head(hidden).argmax(dim=-1))
        loss = TokenCrossEntropy(head, list(head.parameters())) if kind == "tokens" else guess
        output = Output(hidden, {"labels": labels}, loss)
        output.total().backward()
        scores = output.each(predict=True)
        chosen = labels != IGNORED
        found.append((scores.losses, scores.predictions[chosen], hidden.grad, head.weight.grad + 0))
    for ours, theirs in zip(*found):
        # one softmax is torch's, the other our own: float32 rounding between them
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_summed_loss_wants_a_whole_head() -> None:
    class Half:
        start, size = 0, 2

        def exchange(self, mine: torch.Tensor) -> torch.Tensor:
            return mine[None]

    output = Output(torch.ones(2, 1), {"score": torch.ones(2)}, Summed(squares))
    with pytest.raises(
        ValueError, match=r"the head was cut by its classes\n    set parallel.tensor"
    ):
        output.total(vocabulary=Half())
