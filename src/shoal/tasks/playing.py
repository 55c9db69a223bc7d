"""What a task plays with that learns from what its model does, and where its batches come from.

Shapes: B rows of a batch, V logits of one.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.errors import RunError
from shoal.layout import Share

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Floats = NDArray[np.float64]


class Order(Protocol):
    """Which samples each step reads: a pure function of the step."""

    @property
    def steps_per_epoch(self) -> int: ...

    def ids(self, step: int) -> NDArray[np.int64]:
        """(source, sample id) of every sample of the global batch of `step` [G, 2]."""

    def state(self, step: int) -> dict[str, int]:
        """Samples read from each source before `step`."""

    def length(self, steps: int) -> str:
        """What `steps` come to, for people."""


class Batches(Order, Protocol):
    """Where the batches of a run come from; the data's `Stream` is one.

    A sample's id is unique over the run, and each of `num_samples` is read once in a pass: `shoal
    data verify` goes by that.
    """

    names: list[str]
    num_samples: list[int]
    global_batch_samples: int

    def at(self, step: int, share: Share) -> dict[str, Array]:
        """Samples `share.start` to `share.stop` of the global batch of `step`; asked again, the
        same. With sample_ids and source_ids. Raises PeersLost where ranks play for it."""

    def kept(self) -> dict[str, Any]:
        """What is to be kept beside the step to go on from here, JSON-able; made once a batch."""

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Stand where `kept` says, whichever layout it comes from."""


class Stored(Batches, Protocol):
    """Batches of stored samples, of which a task may make others."""

    seed: int

    def in_batches_of(self, samples: int) -> Stored:
        """The same samples, so many in a global batch."""

    def order_of(self, name: str, num_samples: int) -> Order:
        """An order of other samples, by the same seed in the same global batches."""


@dataclass(frozen=True)
class Wanted:
    """A completion that is asked for: token n of its row is drawn by (seed, index, n)."""

    prompt: Sequence[int]
    seed: int
    index: int
    """Which of the completions of its prompt."""
    likeliest: bool = False
    """Take the likeliest tokens, and draw none."""


@dataclass(frozen=True)
class Written:
    """What was said, the end token too; its log-probabilities."""

    tokens: Sequence[int]
    logs: Sequence[float]


class Writes(Protocol):
    """Completes prompts by a copy of the model that keeps what it computed of a row."""

    words: str
    """What it is, for people."""

    def __call__(
        self,
        wanted: Sequence[Wanted],
        *,
        tokens: int,
        end: int | None,
        alive: Callable[[float], None],
    ) -> list[Written]:
        """At most `tokens` of each, by the weights as they are; what one says depends on no other.

        `alive` is called now and then with how much is done, 0 to 1.
        """


class Play(Protocol):
    """The model as it is, on this rank, and the ranks that play other parts beside it."""

    @property
    def part(self) -> int:
        """Which of `num_parts` parts this rank plays."""

    @property
    def num_parts(self) -> int: ...

    def logits(self, batch: Arrays) -> NDArray[np.float32]:
        """Logits of the last position [B, V], without dropout. Ranks of one replica call it
        together. Rows are independent, but their last bits may depend on B: keep it the same."""

    def write(
        self, wanted: Sequence[Wanted], *, tokens: int, end: int | None, what: str | None = None
    ) -> list[Written] | None:
        """As `Writes`; None where rows are to be computed by `logits`. `what` is told meanwhile."""

    def text_of(self, ids: Sequence[int]) -> str:
        """What token ids say, special tokens left out."""

    def together(self, mine: Mapping[str, Floats]) -> dict[str, Floats]:
        """The sums over all parts, exact where each place is zero in all parts but one."""

    def still(self, mine: bool) -> bool:
        """Whether any rank that computes with this one wants another call of `logits`."""

    def tell(self, what: str, done: float | None) -> None:
        """How far it is, 0 to 1, for people."""


def log_softmax(logits: Array) -> Floats:
    """Logarithms of the probabilities that logits [..., V] stand for, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def choose(logs: Floats, at: float) -> int:
    """Which of the choices with these log-probabilities [V] a number from 0 to 1 falls on."""
    sums = np.exp(logs).cumsum()
    return min(int(np.searchsorted(sums, at * sums[-1], "right")), len(sums) - 1)


def packed(arrays: Arrays) -> dict[str, list[Any]]:
    """Arrays as JSON has them: each its type, its shape, its bytes in base64."""
    return {
        name: [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]
        for name, array in arrays.items()
    }


def unpacked(tree: Mapping[str, Sequence[Any]]) -> dict[str, Array]:
    """The inverse of `packed`. Raises RunError for what is none."""
    found = {}
    for name, (dtype, shape, text) in tree.items():
        try:
            if dtype not in ("<f4", "<i8"):
                raise ValueError(f"type {dtype!r}")
            raw = base64.b64decode(text, validate=True)
            found[name] = np.frombuffer(raw, dtype=dtype).reshape(shape).copy()
        except (ValueError, TypeError) as error:
            raise RunError(f"what was played, as the save has it, is damaged: {error}") from None
    return found
