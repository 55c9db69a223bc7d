"""Completing prompts for GRPO: whole rows for each token, and the engine of serving, in turns.

    python benchmarks/rollouts.py [--pairs 5] [--prompts 8] [--tokens 64]

A llama of random weights, one thread. Both complete the same prompts by the same draws; what they
say is compared. The engine's time has the making of its copy of the weights in it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.models.anatomy import canonical_parameters, hidden_of, logits_of
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.models.stored import InMemory
from shoal.serve.rollouts import Rollouts
from shoal.tasks.grpo_rollouts import Asked, Sampler
from shoal.tasks.playing import Wanted, Writes, Written

VOCABULARY = 8192
GROUP = 8
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


class Player:
    """Plays alone, in one of both ways."""

    part, num_parts = 0, 1

    def __init__(self, model: Any, writes: Writes | None) -> None:
        self._model, self._writes = model, writes

    @torch.no_grad()
    def logits(self, batch: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Of the last position [B, V]."""
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        found: NDArray[np.float32] = (
            logits_of(self._model)(hidden_of(self._model, tensors)[:, -1]).float().numpy()
        )
        return found

    def write(self, wanted: Sequence[Wanted], **asked: Any) -> list[Written] | None:
        """By the engine, where this is its way."""
        asked.pop("what")
        return self._writes and self._writes(wanted, **asked, alive=lambda done: None)

    def text_of(self, ids: Sequence[int]) -> str:
        """Nothing is rewarded."""
        return ""

    def together(self, mine: Any) -> Any:
        """There are no others."""
        return mine

    def still(self, mine: bool) -> bool:
        """As this one wants."""
        return mine

    def tell(self, what: str, done: float | None) -> None:
        """Nobody listens."""


def main() -> None:
    """Time both ways, and say the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = read_config(architecture="llama", settings=SHAPE, vocabulary_size=VOCABULARY)
    model = build_meta(config, auto_class="AutoModelForCausalLM")
    materialise(model, record=record(model), seed=0).eval()
    weights = InMemory(canonical_parameters(model))
    engine = Rollouts(config, auto_class="AutoModelForCausalLM", weights=lambda: weights)
    drawn = np.random.default_rng(0)
    asked = [
        Asked(drawn.integers(0, VOCABULARY, 24 + n % 8), {}, (0, 0, n))
        for n in range(given.prompts)
    ]
    times: dict[str, list[float]] = {"whole rows": [], "engine": []}
    said: dict[str, list[NDArray[np.int64]]] = {}
    for _ in range(given.pairs):
        for name, writes in (("whole rows", None), ("engine", engine)):
            sampler = Sampler(
                Player(model, writes), lambda *_: 0.0, group=GROUP, tokens=given.tokens, end=None
            )
            began = time.perf_counter()
            made = sampler.complete(asked)
            times[name].append(time.perf_counter() - began)
            said[name] = [each.tokens for each in made if each is not None]
    ratios = [whole / own for whole, own in zip(times["whole rows"], times["engine"])]
    same = sum(int((a == b).sum()) for a, b in zip(said["whole rows"], said["engine"]))
    for name, found in times.items():
        print(f"{name}: {statistics.median(found):.2f} s (least {min(found):.2f})")
    print(f"whole rows / engine: {statistics.median(ratios):.2f} (from {min(ratios):.2f})")
    print(f"{same:,} of {given.prompts * GROUP * given.tokens:,} tokens are the same")


if __name__ == "__main__":
    main()
