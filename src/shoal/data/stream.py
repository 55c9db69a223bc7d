"""The order of samples: a pure function of (seed, step), so any worker can ask for any part.

`Stream` is for training: endless, shuffled anew each epoch, every sample once per epoch.
`Evaluation` is a fixed list, split without doubled samples. Shapes: G samples in the global
batch, B in the share that is asked for, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.batch import Array, Batch, fill_rows, stack
from shoal.data.counts import Counts, training_counts
from shoal.data.mixture import Mixture
from shoal.data.pack import Part
from shoal.data.permutation import key_of, permute
from shoal.data.prepare import Prepared, open_prepared
from shoal.layout import Share
from shoal.splitmix import mixed

Ints = npt.NDArray[np.int64]


class Order:
    """Which samples each step reads, of sources of known sizes, by a seed; no data is needed."""

    def __init__(
        self,
        names: Sequence[str],
        num_samples: Sequence[int],
        *,
        seed: int,
        global_batch_samples: int,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        self.names, self.num_samples = list(names), list(num_samples)
        self.seed, self.global_batch_samples = seed, global_batch_samples
        self._mixture = Mixture(weights)
        # By its number, never its name: a file may be called anything and is the same data.
        self._keys = [key_of("order", seed, number) for number in range(len(self.names))]

    def ids(self, step: int) -> Ints:
        """(source, sample id) of every sample of the global batch of `step`: int64 [G, 2]."""
        return self._ids(step, share=Share(0, self.global_batch_samples))

    def _ids(self, step: int, *, share: Share) -> Ints:
        first = step * self.global_batch_samples
        slots = np.arange(first + share.start, first + share.stop, dtype=np.int64)
        source, running = self._mixture.at(slots)
        ids = np.empty_like(running)
        for number, (size, key) in enumerate(zip(self.num_samples, self._keys)):
            mine = source == number
            epoch, position = np.divmod(running[mine], size)
            keys = mixed(epoch.astype(np.uint64) ^ np.uint64(key))
            ids[mine] = epoch * size + permute(position, size=size, key=keys)
        return np.stack([source, ids], axis=1)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every sample of every source was read at least once (rounded up).

        With one source: its samples / global batch. In a mixture the source with the most
        samples for its weight decides.
        """
        shares = np.asarray(self._mixture.per_period) / self._mixture.period
        slots = max(size / share for size, share in zip(self.num_samples, shares))
        return max(1, -(-int(np.ceil(slots)) // self.global_batch_samples))

    def state(self, step: int) -> dict[str, int]:
        """Samples read from each source before `step`: the whole position of a run."""
        counts = self._mixture.before(step * self.global_batch_samples)
        return dict(zip(self.names, counts))

    def length(self, steps: int) -> str:
        """What `steps` come to, for people: how often all samples are read, of each source."""
        read = self.state(steps)
        passes = [read[name] / size for name, size in zip(self.names, self.num_samples)]
        said = [f"{each:.3g} epoch{'' if each == 1 else 's'}" for each in passes]
        many = [f"{each} of {name}" for each, name in zip(said, self.names)]
        return said[0] if len(said) == 1 else ", ".join(many)


class Stream(Order):
    """Training batches. `at(step, share)` reads only the share; nothing is remembered.

    Each worker (each thread too) opens its own. A sample's id is epoch x samples of its source +
    its index there: unique over the whole run.
    """

    def __init__(
        self, prepared: Prepared | Path | str, *, seed: int, global_batch_samples: int
    ) -> None:
        prepared = prepared if isinstance(prepared, Prepared) else open_prepared(prepared)
        self.prepared = prepared
        super().__init__(
            [source.name for source in prepared.sources],
            [source.num_samples("train") for source in prepared.sources],
            seed=seed,
            global_batch_samples=global_batch_samples,
            weights=[source.weight for source in prepared.sources],
        )
        self._parts = [source.part("train") for source in prepared.sources]

    def at(self, step: int, share: Share) -> Batch:
        """Samples `share.start` to `share.stop` of the global batch of `step`.

        The fields of the data, each [B, *dims] and padded with its fill; sample_ids and source_ids
        int64 [B].
        Raises ValueError for a share outside the global batch.
        """
        if not 0 <= share.start <= share.stop <= self.global_batch_samples:
            raise ValueError(
                f"share {share.start}:{share.stop} is outside the global batch of "
                f"{self.global_batch_samples} samples"
            )
        ids = self._ids(step, share=share)
        index = [int(sample) % self.num_samples[source] for source, sample in ids]
        return _read(self._parts, source=ids[:, 0], index=index, ids=ids[:, 1])

    def in_batches_of(self, samples: int) -> Stream:
        """The same samples, so many in a global batch."""
        return Stream(self.prepared, seed=self.seed, global_batch_samples=samples)

    def order_of(self, name: str, num_samples: int) -> Order:
        """An order of other samples, by the same seed in the same global batches."""
        batch = self.global_batch_samples
        return Order([name], [num_samples], seed=self.seed, global_batch_samples=batch)

    def kept(self) -> dict[str, Any]:
        """What is to be kept beside the step, to ask for its batch again: nothing."""
        return {}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Stand where `kept` says."""

    @property
    def bytes_read(self) -> int:
        """Bytes of prepared data that this stream has read."""
        return sum(part.bytes_read for part in self._parts)


class Evaluation:
    """A fixed list of samples of one part, split over workers without doubling any.

    Every worker has the same number of batches: rows that are left over are padding, with
    sample id -1 and no targets. `samples` limits the list (None: all); in a mixture each source
    gets its weight's share of the limit.
    """

    def __init__(
        self,
        prepared: Prepared | Path | str,
        *,
        batch_samples: int,
        samples: int | None = None,
        part: str = "validation",
    ) -> None:
        prepared = prepared if isinstance(prepared, Prepared) else open_prepared(prepared)
        self.prepared = prepared
        self.batch_samples = batch_samples
        sources = prepared.evaluated if part == "validation" else prepared.sources
        self._names = [source.name for source in sources]
        self._parts = [source.part(part) for source in sources]
        self._list = self._choose(samples, weights=[source.weight for source in sources])

    def _choose(self, samples: int | None, *, weights: Sequence[float]) -> Ints:
        sizes = [len(part) for part in self._parts]
        if samples is not None:
            counts = Mixture(weights).before(samples)
            sizes = [min(size, max(1, count)) for size, count in zip(sizes, counts)]
        # Documents lie in a keyed order already, so the first samples are a fair choice.
        sources = np.repeat(np.arange(len(sizes)), sizes)
        return np.stack([sources, np.concatenate([np.arange(size) for size in sizes])], axis=1)

    def __len__(self) -> int:
        return len(self._list)

    @property
    def names(self) -> list[str]:
        """Names of the sources, by their number."""
        return self._names

    def rows(self) -> Iterator[dict[str, Array]]:
        """The samples of this list one by one, in its order, with sample_ids and source_ids."""
        for source, sample in self._list:
            row = self._parts[source].row(int(sample))
            yield {**row, "sample_ids": sample, "source_ids": source}

    def training_rows(self) -> Iterator[dict[str, Array]]:
        """All samples of the training part one by one, as they are stored."""
        for source in self.prepared.sources:
            part = source.part("train")
            yield from (part.row(sample) for sample in range(len(part)))

    def training_counts(self) -> Ints:
        """How often each label is a target of the training part: int64 [labels]."""
        sources = self.prepared.sources
        if self.prepared.evaluated is not sources:  # none of theirs, but as many labels
            sources += self.prepared.evaluated
        return training_counts([Counts.read(each.directory) for each in sources])

    def num_batches(self, parts: int) -> int:
        """Batches that each of `parts` workers has."""
        return -(-len(self._list) // (parts * self.batch_samples))

    def at(self, number: int, *, part: int, parts: int) -> Batch:
        """Batch `number` of worker `part` of `parts`: as `Stream.at`, always B rows."""
        start = (number * parts + part) * self.batch_samples
        chosen = self._list[start : start + self.batch_samples]
        batch = _read(
            self._parts, source=chosen[:, 0], index=chosen[:, 1].tolist(), ids=chosen[:, 1]
        )
        return fill_rows(batch, self.prepared.shape.fields, count=self.batch_samples)


def _read(parts: Sequence[Part], *, source: Ints, index: Sequence[int], ids: Ints) -> Batch:
    rows = [parts[number].row(sample) for number, sample in zip(source, index)]
    shape = parts[0].shape
    batch = stack(rows, shape.fields, lengths=shape.lengths)
    batch["sample_ids"], batch["source_ids"] = ids.copy(), source.copy()
    return batch
