"""The loss of pairs of texts as its formula has it, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def plain(vectors: Tensor, ids: Sequence[Sequence[int]], *, heat: float, symmetric: bool) -> Tensor:
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
