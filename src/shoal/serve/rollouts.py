"""Completions by a model that is being trained: the engine on a copy of its weights, made anew.

The copy has exact products, so what a prompt is completed with depends on its keys and the weights
alone: not on which rank completes it, nor on what else is computed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoal.errors import ModelError
from shoal.models.huggingface import build_meta
from shoal.models.init import materialise, record
from shoal.models.stored import Weights
from shoal.serve.engine import Engine
from shoal.serve.exact import Ways
from shoal.serve.request import Request, Sampling
from shoal.serve.runner import Runner
from shoal.serve.scheduler import blocks_for
from shoal.tasks.playing import Wanted, Written

_RUNNING = 64
"""Sequences of one forward."""
_STEP_TOKENS = 256


class Rollouts:
    """`Writes` by weights that are asked for at each call; float32, on the CPU."""

    def __init__(self, config: Any, *, auto_class: str, weights: Callable[[], Weights]) -> None:
        """Raises ModelError for a model that is not served exactly."""
        self._config, self._auto_class, self._weights = config, auto_class, weights
        self._record = record(build_meta(config, auto_class=auto_class))
        self._ways: Ways = {}
        runner = self._runner()
        self.words = str(runner.report)
        if not runner.exact:
            raise ModelError(f"its answers depend on who is computed beside whom; {self.words}")

    def _runner(self) -> Runner:
        """The model as it is now; its cache has no room yet. Unpacked weights are read in place."""
        model = build_meta(self._config, auto_class=self._auto_class)
        with torch.no_grad():
            materialise(model, record=self._record, seed=0, source=self._weights())
        model.eval().requires_grad_(False)
        return Runner(model, num_blocks=2, release=True, ways=self._ways, large_pages=False)

    def __call__(
        self,
        wanted: Sequence[Wanted],
        *,
        tokens: int,
        end: int | None,
        alive: Callable[[float], None],
    ) -> list[Written]:
        """See `Writes`."""
        if not wanted:
            return []
        runner = self._runner()
        longest = max(len(each.prompt) for each in wanted) + tokens
        each_blocks = blocks_for(longest, runner.cache.block_tokens)
        runner.cache.num_blocks = 1 + min(_RUNNING, len(wanted)) * each_blocks
        engine = Engine(runner, step_tokens=_STEP_TOKENS, max_running=_RUNNING)
        for number, one in enumerate(wanted):
            sampling = Sampling(
                max_tokens=tokens,
                temperature=0.0 if one.likeliest else 1.0,
                seed=one.seed,
                index=one.index,
                stop_tokens=() if end is None else (end,),
                logprobs=0,
            )
            engine.submit(Request(id=str(number), prompt=tuple(one.prompt), sampling=sampling))
        said: list[tuple[list[int], list[float]]] = [([], []) for _ in wanted]
        ended = 0
        while not engine.idle:
            for event in engine.step():
                ids, logs = said[int(event.id)]
                ids += [token.token for token in event.tokens]
                logs += [token.logprob for token in event.tokens]
                ended += event.finish is not None
            alive(ended / len(wanted))
        return [Written(*each) for each in said]
