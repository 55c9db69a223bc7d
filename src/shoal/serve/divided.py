"""A replica whose model is divided: a thread for each rank of the tensor axis, one front."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from shoal.comm.threads import Meeting
from shoal.serve.cache import Cache, Span
from shoal.serve.part import Part
from shoal.serve.runner import Runner

_SILENT_SECONDS = 600.0
"""After that a rank is given up; the fleet ends a replica that is stuck much earlier."""
_T = TypeVar("_T")


class Divided:
    """What a `Runner` is to the engine, of several that hold a part of the model each."""

    def __init__(
        self,
        load: Callable[[], nn.Module],
        make: Callable[[nn.Module, Part], Runner],
        *,
        degree: int,
        pieces: int,
        threads: int,
    ) -> None:
        """`load`: reads the model; `make`: a runner of a part; `threads`: of all ranks together.

        Models are read and cut one after another, so that one is whole at a time. Raises what both
        raise.
        """
        self._meeting = Meeting(degree, timeout_seconds=_SILENT_SECONDS)
        reading = threading.Lock()
        self._ranks = [
            ThreadPoolExecutor(
                1,
                thread_name_prefix=f"tensor-{rank}",
                initializer=torch.set_num_threads,
                initargs=(max(1, threads // degree),),
            )
            for rank in range(degree)
        ]

        def begin(rank: int) -> Runner:
            part = Part(pieces=pieces, rank=rank, degree=degree, meeting=self._meeting)
            with reading:
                model = load()
                part.cut(model)
            return make(model, part)

        self._runners = self._on_all(begin)
        first = self._runners[0]
        self.sizes = replace(first.sizes, token_bytes=degree * first.sizes.token_bytes)
        self.report, self.adapters = first.report, first.adapters

    def close(self) -> None:
        """End the threads; the parts of the model go with this."""
        for each in self._ranks:
            each.shutdown()

    def _on_all(self, call: Callable[[int], _T]) -> list[_T]:
        """What each rank gives, in order. Raises the error of the one that failed first."""
        errors: list[BaseException] = []

        def called(rank: int) -> _T:
            try:
                return call(rank)
            except BaseException as error:
                errors.append(error)
                self._meeting.fail(f"rank {rank} of the tensor axis: {error}")
                raise

        made = [each.submit(called, rank) for rank, each in enumerate(self._ranks)]
        for each in made:
            each.exception()  # waits
        if errors:
            raise errors[0]
        return [each.result() for each in made]

    @property
    def model(self) -> nn.Module:
        """The first rank's part."""
        return self._runners[0].model

    @property
    def exact(self) -> bool:
        """Whether no rank's probes saw a bit depend on the other rows."""
        return all(each.exact for each in self._runners)

    @property
    def cache(self) -> Cache:
        """The first rank's; all have as many blocks, with their own heads in them."""
        return self._runners[0].cache

    @cache.setter
    def cache(self, like: Cache) -> None:
        for each in self._runners:
            each.cache = Cache(like.num_blocks, like.block_tokens)

    def hidden(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        wanted: Sequence[int],
        *,
        adapters: Sequence[str | None],
    ) -> Tensor:
        """As a runner's: every rank has the same."""
        return self._on_all(
            lambda rank: self._runners[rank].hidden(tokens, spans, wanted, adapters=adapters)
        )[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """As a runner's: each rank's entries of the vocabulary, one after another."""
        if not self._runners[0].part.head_is_cut:
            return self._runners[0].logits(hidden)
        return torch.cat(self._on_all(lambda rank: self._runners[rank].logits(hidden)), dim=-1)
