"""Vectors of texts: the loss and all its gradients against plain torch in float64, data, scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from shoal.tasks.embedding import Contrast
from shoal.tasks.task import Output


class Encoder(nn.Module):
    """Any function of rows with parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()

    def forward(self, rows: Tensor) -> Tensor:
        return normalize(self.layers(rows), dim=-1)


def plain(vectors: Tensor, ids: list[list[int]], *, heat: float, symmetric: bool) -> Tensor:
    """Sum over pairs, one at a time, as the formula has it; no masks, no tables."""
    total = vectors.new_zeros(())
    pairs = [row for row, (query, text, _) in enumerate(ids) if query and text]
    answers: dict[int, set[int]] = {}
    for row in pairs:
        answers.setdefault(ids[row][0], set()).add(ids[row][1])
    for row in pairs:
        query, text = ids[row][0], ids[row][1]
        own = vectors[row, 0] @ vectors[row, 1] / heat
        against = [own]
        for other, each in enumerate(ids):
            for place in (1, 2):
                if each[place] and each[place] not in answers[query]:
                    against.append(vectors[row, 0] @ vectors[other, place] / heat)
        loss = torch.logsumexp(torch.stack(against), 0) - own
        if symmetric:
            back = [own]
            for other, each in enumerate(ids):
                if each[0] and text not in answers.get(each[0], set()):
                    back.append(vectors[other, 0] @ vectors[row, 1] / heat)
            loss = (loss + torch.logsumexp(torch.stack(back), 0) - own) / 2
        total = total + loss
    return total


IDS = [
    [1, 11, 0],
    [2, 12, 21],  # a hard negative
    [3, 11, 0],  # another question of the same text
    [4, 13, 12],  # a negative that is another's text
    [1, 14, 0],  # another text that answers the first question
    [0, 15, 0],  # a text without a question: a negative of all
    [0, 0, 0],  # a row that nobody computed
    [5, 16, 11],
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(symmetric: bool, micro: int) -> None:
    """Each has its own rows' vectors alone, though they are in the losses of all others."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(len(IDS), 3, 6, generator=draw, dtype=torch.float64)
    ids = torch.tensor(IDS)
    there = (ids > 0)[:, :, None]
    theirs, ours = Encoder(), Encoder()
    wanted = plain(theirs(inputs) * there, IDS, heat=0.1, symmetric=symmetric)
    wanted.backward()

    loss = Contrast(0.1, symmetric)
    with torch.no_grad():
        found = loss.slopes(ours(inputs) * there, ids)
    total = 0.0
    for start in range(0, len(IDS), micro):
        part = slice(start, start + micro)
        fields = {"ids": ids[part], **{name: each[part] for name, each in found.items()}}
        output = Output(ours(inputs[part]) * there[part], fields, loss)
        value = output.total()
        value.backward()
        total += value.item()
    assert total == pytest.approx(wanted.item(), rel=1e-12)
    for own, other in zip(ours.parameters(), theirs.parameters()):
        assert own.grad is not None and other.grad is not None
        assert torch.allclose(own.grad, other.grad, rtol=0, atol=1e-12 * wanted.item())


def test_of_distinct_pairs_it_is_the_cross_entropy_of_both_directions() -> None:
    vectors = normalize(torch.randn(6, 3, 4, dtype=torch.float64), dim=-1)
    ids = torch.arange(1, 19).view(6, 3) * torch.tensor([1, 1, 0])
    scores = vectors[:, 0] @ vectors[:, 1].T / 0.05
    both = [cross_entropy(each, torch.arange(6), reduction="none") for each in (scores, scores.T)]
    found = Contrast(0.05, True).losses(vectors, ids)
    assert torch.allclose(found, (both[0] + both[1]) / 2, atol=1e-12)
    assert np.isclose(float(Contrast(0.05, False).losses(vectors, ids).sum()), float(both[0].sum()))
