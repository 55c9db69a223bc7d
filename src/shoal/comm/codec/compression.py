"""A codec as it is used: with error feedback around it, and a brake that takes it out.

Error feedback (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847): what a sum left out of
this rank's values is added to them the next time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.comm.codec.codec import Codec, NoCodec
from shoal.comm.flat import FlatLayout, Vector
from shoal.comm.group import Group
from shoal.config.sync import Brake

Note = tuple[str, dict[str, Any]]
"""An event: its name and its fields."""


class Compression:
    """Sums over a group by `codec`. `numel`: elements of each sum, the first of `layout`.

    A sum that is not used after all (a peer is lost, a step is given up) leaves no trace: what it
    changes is changed by `commit`.
    """

    def __init__(
        self,
        codec: Codec,
        layout: FlatLayout,
        *,
        numel: int,
        like: Tensor,
        error_feedback: bool,
        brake: Brake | None = None,
        after_rounds: int = 0,
        what: str = "gradient",
    ) -> None:
        """`after_rounds`: sums that cross as they are first. `like` has the dtype and device of
        what is summed; `what`: names it."""
        self._codec, self._brake, self._after = codec, brake, after_rounds
        self._rounds, self._off = 0, False
        self._notes: list[Note] = []
        self._memory: Vector | None = None
        self._next: Tensor | None = None
        if error_feedback:
            regions = frozenset(layout.regions) - {"frozen"}
            self._memory = Vector(
                f"error/{what}",
                like.new_zeros(numel),
                regions,
                equal=False,
                sums=True,
                optional=True,
            )

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded: there is no codec yet, or the brake took it out."""
        early = self._rounds < self._after
        return self._off or early or isinstance(self._codec, NoCodec)

    def sum_(self, group: Group, values: Tensor, *, key: int, span: slice = slice(None)) -> None:
        """Replace flat `values` by (about) their sum over ranks; the same bits on all.

        `key`: of the round, the same on all ranks. `span`: which elements of the vector they are.
        Raises PeersLost.
        """
        self._next = None
        if group.size == 1:
            return
        memory = None if self._memory is None else self._memory.tensor[span]
        braking = self._brake is not None and not self._off
        braking = braking and (self._rounds + 1) % self._brake.every_rounds == 0  # type: ignore[union-attr]
        true = values.clone() if braking else None
        if memory is not None:
            values.add_(memory)
        own = values.clone() if memory is not None else None
        if self.is_exact:
            group.sum_(values)
            self._next = None if memory is None else torch.zeros_like(memory)
        else:
            sent = self._codec.sum_(group, values, key=key)
            if own is not None:
                self._next = own.sub_(sent)
        if true is not None:
            group.sum_(true)
            self._judge(values, true)
        if self._next is not None and not bool(torch.isfinite(values).all()):
            self._next = None  # the step is skipped, and its gradients forgotten

    def _judge(self, found: Tensor, true: Tensor) -> None:
        """Take the codec out if what it made points elsewhere. The same on all ranks."""
        assert self._brake is not None, "asked only then"
        norms = float(found.double().norm() * true.double().norm())
        cosine = float(found.double() @ true.double()) / norms if norms > 0 else 1.0
        if cosine >= self._brake.cosine or cosine != cosine:
            return
        self._off = True
        text = f"the compressed sum has a cosine of {cosine:.3f} with the true one, below "
        text += f"{self._brake.cosine:g}: sums are sent as they are from now on"
        self._notes.append(("codec-off", {"cosine": cosine, "text": text}))

    def commit(self, *, span: slice = slice(None)) -> None:
        """The last sum was used."""
        self._rounds += 1
        self._codec.commit()
        if self._memory is not None and self._next is not None:
            self._memory.tensor[span] = self._next
        self._next = None

    def notes(self) -> list[Note]:
        """What happened since the last call, to be told as events."""
        found, self._notes = self._notes, []
        return found

    def vectors(self) -> Iterable[Vector]:
        """Error memory, and the codec's own state."""
        return (*(() if self._memory is None else (self._memory,)), *self._codec.vectors())

    def facts(self) -> dict[str, Any]:
        """JSON-able state besides vectors; the same on all ranks."""
        return {"rounds": self._rounds, "off": self._off}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Stand where `facts` say."""
        self._rounds, self._off = int(facts.get("rounds", 0)), bool(facts.get("off", False))
