"""The model as it is, and the ranks that play with it beside one another (tasks/playing.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.data.tokenize import load_tokenizer
from shoal.parallel.ranks import Ranks
from shoal.tasks.playing import Wanted, Writes, Written

Floats = NDArray[np.float64]


def _nothing(*told: object) -> None:
    """Nobody listens."""


@dataclass
class Player:
    """The `Play` of one rank. All of it raises PeersLost."""

    forward: Callable[[dict[str, Tensor]], Tensor]
    """Logits [B, V] of the last position, on every rank of the replica."""
    ranks: Ranks
    is_cut: bool
    """Whether ranks of a replica exchange within a forward."""
    tokenizer_directory: str | None = None
    writes: Writes | None = None
    check: Callable[[], None] = _nothing
    """Called before each forward: raises PeersLost where the next exchange cannot complete."""
    tell: Callable[[str, float | None], None] = _nothing

    @property
    def part(self) -> int:
        """Which part this rank plays."""
        return self.ranks.part

    @property
    def num_parts(self) -> int:
        """Parts that are played beside one another."""
        return self.ranks.num_parts

    def logits(self, batch: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """`forward` of arrays; each is a sign of life."""
        self.check()
        self.ranks.world.pulse.mark("play")
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        found: NDArray[np.float32] = self.forward(tensors).cpu().numpy()
        return found

    def write(
        self, wanted: Sequence[Wanted], *, tokens: int, end: int | None, what: str | None = None
    ) -> list[Written] | None:
        """See `Play`; each step of it is a sign of life."""
        if self.writes is None:
            return None

        def alive(done: float) -> None:
            self.check()
            self.ranks.world.pulse.mark("play")
            if what is not None:
                self.tell(what, done)

        alive(0.0)
        return self.writes(wanted, tokens=tokens, end=end, alive=alive)

    @cached_property
    def _tokenizer(self) -> Any:
        assert self.tokenizer_directory is not None, "a task of texts has one"
        return load_tokenizer(Path(self.tokenizer_directory))

    def text_of(self, ids: Sequence[int]) -> str:
        """What token ids say, special tokens left out; what is made of it may take a while."""
        self.ranks.world.pulse.mark("reward")
        return str(self._tokenizer.decode(list(ids)))

    def together(self, mine: Mapping[str, Floats]) -> dict[str, Floats]:
        """The sums over all parts; of the ranks that play one part, the first one's counts."""
        summed = {}
        for name, array in mine.items():
            total = torch.from_numpy(array.copy() if self.ranks.speaks else np.zeros_like(array))
            self.ranks.world.sum_(total)
            summed[name] = total.numpy()
        return summed

    def still(self, mine: bool) -> bool:
        """Whether any rank that computes with this one wants another call of `logits`."""
        if not self.is_cut:
            return mine
        playing = torch.tensor([int(mine)])
        self.ranks.inside.sum_(playing)
        return bool(playing.item())
