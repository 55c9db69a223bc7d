"""The user's own batches, divided: every worker reads its rows of each global batch.

The global batches are those that the loader would give without shoal, in its order: it is drawn
as rank 0 draws it, and a digest of each batch is compared at the step (fleet.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from shoal.comm.group import Group
from shoal.errors import DataError
from shoal.fields import IGNORED
from shoal.layout import Share, split_evenly


@dataclass(frozen=True)
class Part:
    """What a worker has of a global batch."""

    rows: int
    """Of this worker; 0 where there are fewer rows than workers: it computes one for nothing."""
    digest: int
    """32 bits of the whole batch: its indices, or its content."""


class Worker(Protocol):
    """Who reads: a fleet, as batches know it."""

    @property
    def world(self) -> Group: ...

    @property
    def device(self) -> torch.device: ...

    def share_of(self, rows: int) -> Share:
        """Its rows of a global batch."""

    def reads(self, part: Part | None, *, labels: int | None = None) -> None:
        """A batch is handed out; None: it was the last."""


class Batches:
    """Batches of a loader, each of which is this worker's part of a global batch."""

    def __init__(self, loader: Iterable[Any], fleet: Worker) -> None:
        """Raises DataError for what gives no batches."""
        if isinstance(loader, Dataset) or not hasattr(loader, "__iter__"):
            raise DataError(
                f"fleet.batches: expected a DataLoader or what gives batches, got "
                f"{type(loader).__name__}\n    fleet.batches(DataLoader(dataset, batch_size=16))"
            )
        self._loader, self._fleet = loader, fleet

    def __len__(self) -> int:
        """Global batches."""
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        fleet, loader = self._fleet, self._loader
        parts: deque[Part] = deque()
        batches: Iterable[Any] = self._cut(loader, parts)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            sampler: Any = loader.batch_sampler  # None where rows are not put together
            if sampler is not None:
                batches = _only(loader, _Indices(sampler, fleet, parts))
        try:
            for batch in batches:
                fleet.reads(parts.popleft(), labels=labels_in(batch))
                yield moved(batch, fleet.device)
        finally:
            fleet.reads(None)

    def _cut(self, loader: Iterable[Any], parts: deque[Part]) -> Iterator[Any]:
        """Rows of batches that every worker reads whole. Raises DataError for what has no rows."""
        for batch in loader:
            tensors = list(_tensors(batch))
            rows = len(tensors[0]) if tensors and tensors[0].dim() else 0
            if not rows:
                raise DataError(
                    "fleet.batches: expected batches of tensors with their rows in the first dim, "
                    f"got {type(batch).__name__}\n    let collate_fn make tensors"
                )
            share = self._fleet.share_of(rows)
            parts.append(Part(len(share), _digest(tensors)))
            yield _rows(batch, share if len(share) else Share(0, 1), of=rows)


class _Indices:
    """A batch sampler that gives this worker's part of each batch of another."""

    def __init__(self, sampler: Iterable[Any], fleet: Worker, parts: deque[Part]) -> None:
        self._sampler, self._fleet, self._parts = sampler, fleet, parts

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Any]]:
        """Rank 0 draws as if alone; the others draw from a copy of its generator."""
        state = torch.get_rng_state()
        self._fleet.world.broadcast_(state)
        indices, first = iter(self._sampler), self._fleet.world.rank == 0
        while True:
            own = torch.get_rng_state()
            if not first:
                torch.set_rng_state(state)
            chosen = next(indices, None)
            if not first:
                state = torch.get_rng_state()
                torch.set_rng_state(own)
            if chosen is None:
                return
            listed = list(chosen)
            share = self._fleet.share_of(len(listed))
            digest = xxhash.xxh32_intdigest(repr([*map(str, listed)]).encode())
            self._parts.append(Part(len(share), digest))
            yield listed[share.start : share.stop] or listed[:1]


def _only(loader: DataLoader[Any], indices: _Indices) -> DataLoader[Any]:
    """`loader` with other indices."""
    more: dict[str, Any] = {}
    if loader.num_workers:
        names = ("timeout", "prefetch_factor", "multiprocessing_context", "worker_init_fn")
        more = {name: getattr(loader, name) for name in names}
    return DataLoader(
        loader.dataset,
        batch_sampler=indices,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
        **more,
    )


def labels_in(batch: Any) -> int | None:
    """Labels that are targets, of a batch that names its `labels` as transformers does."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        return int((labels != IGNORED).sum())
    return None


def moved(batch: Any, device: torch.device) -> Any:
    """The batch on `device`; on the CPU it is left as it is."""
    if device.type == "cpu":
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    return _each(batch, lambda value: moved(value, device))


def _each(batch: Any, change: Any) -> Any:
    """`batch` with every value of a dict, list or tuple changed; anything else as it is."""
    if isinstance(batch, Mapping):
        changed = {key: change(value) for key, value in batch.items()}
        return changed if type(batch) is dict else type(batch)(changed)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(change, batch))
    return type(batch)(map(change, batch)) if isinstance(batch, list | tuple) else batch


def _rows(value: Any, share: Share, *, of: int) -> Any:
    """Rows of everything that has `of` of them."""
    is_rows = isinstance(value, Tensor) and value.dim() and len(value) == of
    if is_rows or (isinstance(value, list) and len(value) == of and not list(_tensors(value))):
        return value[share.start : share.stop]
    return _each(value, lambda inner: _rows(inner, share, of=of))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)


def _digest(tensors: list[Tensor]) -> int:
    total = xxhash.xxh32()
    for each in tensors:
        total.update(each.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.intdigest()


def part_of(rows: int, *, part: int, parts: int) -> Share:
    """Part `part` of `parts` of so many rows, as even as they can be."""
    return split_evenly(rows, parts, part)
