"""Policy streaming-diloco: fragments of the model meet in turn, and on their way steps go on.

Douillard et al., "Streaming DiLoCo with overlapping communication" (arXiv 2501.18512). A fragment
is due once in `every_steps`, the fragments one after the other, so a step sends a fragment at most.
What a replica has moved by is sent after step s and used after step s + `overlap_steps`: the agreed
part makes its outer step, and the replica goes on from a mix of it and its own parameters.

In the last steps each fragment meets once more, one a step; the run ends with the agreed parameters
on all replicas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.comm.codec.codec import Encoding, mixed
from shoal.comm.codec.kinds import encoding
from shoal.comm.flat import FlatLayout, Span, Vector
from shoal.comm.group import Group, Pending
from shoal.config.sync import StreamingDiLoCo as Section
from shoal.sync.diloco import outer_of
from shoal.sync.policy import Given
from shoal.sync.rounds import Rounds

_BLOCK = re.compile(r"\.(\d+)\.")


def fragments_of(layout: FlatLayout, *, numel: int, count: int) -> list[list[Span]]:
    """The spans of each fragment: blocks p, p + count, ...

    What comes before the blocks, such as an embedding, joins the first fragment, and what comes
    after them the last, however the model is cut. Together they cover the first `numel` elements
    once, padding between parameters included.
    """
    parts: dict[str, int] = {}
    for members in layout.members.values():
        beyond = 0
        for name in members:
            found = _BLOCK.search(name)
            beyond = count - 1 if found else beyond
            parts[name] = int(found[1]) % count if found else beyond
    names = sorted(
        (n for n, start in layout.offsets.items() if start < numel), key=layout.offsets.__getitem__
    )
    edges = [*(layout.offsets[name] for name in names[1:]), numel]
    spans: list[list[Span]] = [[] for _ in range(count)]
    for name, edge in zip(names, edges):
        spans[parts[name]].append(Span(layout.offsets[name], edge))
    return [merged(each) for each in spans]


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans in order, those that touch as one."""
    found: list[Span] = []
    for span in spans:
        if found and found[-1].stop == span.start:
            found[-1] = Span(found[-1].start, span.stop)
        else:
            found.append(span)
    return found


class StreamingDiLoCo(Rounds):
    """What is on its way lies in a vector too: after a resume, or with other peers, it is sent
    again."""

    def __init__(self, section: Section, given: Given) -> None:
        super().__init__(
            given.division,
            every_steps=section.every_steps,
            steps=given.steps,
            start_steps=section.start_steps,
        )
        self._section, self._values, self._seed = section, given.values, given.seed
        self._fragments = fragments_of(
            given.layout, numel=given.values.numel(), count=section.fragments
        )
        self.outer = outer_of(section, given)
        self._codec: Encoding | None = encoding(section.codec)
        regions = frozenset(given.layout.regions) - {"frozen"}
        own = {"regions": regions, "equal": False, "optional": True}
        self._sent = Vector("outer/on-its-way", torch.zeros_like(given.values), **own)  # type: ignore[arg-type]
        self._memory: Vector | None = None
        if section.codec.error_feedback:
            zeros = torch.zeros_like(given.values)
            self._memory = Vector("error/outer", zeros, sums=True, **own)  # type: ignore[arg-type]
        self._marks = [0] * section.fragments
        """Targets of this replica when each fragment last met."""
        self._flight: tuple[int, int, int] | None = None
        """The fragment on its way, after how many steps it left, and the targets up to then."""
        self._work: Pending[Any] | None = None
        self._left_at, self._used = [0] * section.fragments, 0

    @classmethod
    def of(cls, section: Section, given: Given) -> StreamingDiLoCo:
        return cls(section, given)

    @property
    def round(self) -> int:
        return self._used

    def enter(self, *, world: Group, peers: Group, inside: Group) -> None:
        super().enter(world=world, peers=peers, inside=inside)
        self._work = None

    def before_step(self, step: int) -> None:
        self._step = step
        if step > self._start:
            self._go_on(step)

    def after_step(self, step: int, *, targets: int) -> None:
        if step < self._start:
            self.begin(step + 1)
            return
        self._targets += targets
        self._go_on(step + 1)

    def due(self, step: int) -> list[int]:
        """The fragments that leave after `step` steps."""
        count, since = len(self._fragments), step - self._start
        ending = self._steps - count
        if step > ending:
            return [p for p in range(count) if step == max(ending + 1 + p, self._start + 1)]
        each = range(count)
        return [
            p
            for p in each
            if since > 0 and (since - (p + 1) * self._every // count) % self._every == 0
        ]

    @torch.no_grad()
    def _go_on(self, step: int) -> None:
        """What is to be done after `step` steps and is not done yet. Raises PeersLost."""
        ending = step > self._steps - len(self._fragments)
        if self._flight is not None and (ending or step >= self._arrives):
            self._use()
        for fragment in self.due(step):
            if self._left_at[fragment] == step:
                continue
            if self._flight is not None:
                self._use()
            self._leave(fragment, step)
            if ending or not self._section.overlap_steps:
                self._use()
        if self._flight is not None and self._work is None:
            self._send()
        if step == self._steps and self._met_at < step:
            self._values.copy_(self.outer.anchor)
            self._met_at, self._targets = step, 0

    @property
    def _arrives(self) -> int:
        assert self._flight is not None, "asked only then"
        return self._flight[1] + self._section.overlap_steps

    def _leave(self, fragment: int, step: int) -> None:
        """Note what this replica has moved by in a fragment; nobody is met."""
        for span in self._fragments[fragment]:
            part = slice(span.start, span.stop)
            moved = self._sent.tensor[part]
            torch.sub(self.outer.anchor[part], self._values[part], out=moved)
            if self._memory is not None:
                moved.add_(self._memory.tensor[part])
        self._flight, self._work = (fragment, step, self._targets), None
        self._left_at[fragment] = step

    def _packed(self, flat: Tensor, fragment: int) -> Tensor:
        return torch.cat([flat[span.start : span.stop] for span in self._fragments[fragment]])

    def _send(self) -> None:
        """Send what left, weighted by the targets it was trained on: the last number is these."""
        assert self._flight is not None, "something left"
        fragment, step, targets = self._flight
        if not self._fragments[fragment]:  # this rank has none of its blocks, nor have its peers
            self._work = Pending(lambda: None)
            return
        moved = self._packed(self._sent.tensor, fragment)
        weight = moved.new_tensor([targets - self._marks[fragment]])
        if self._codec is None:
            self._work = self.peers.start_sum(torch.cat([moved.mul_(weight), weight]))
            return
        message = self._encoded(moved, step)
        mine = torch.cat([message[0], weight.float().view(torch.uint8)])
        self._work = self.peers.start_gather(mine)

    def _encoded(self, moved: Tensor, step: int) -> Tensor:
        assert self._codec is not None, "asked only then"
        padded = moved.new_zeros(1, self._codec.part(moved.numel(), size=1), dtype=torch.float32)
        padded[0, : moved.numel()] = moved
        return self._codec.encode(padded, key=mixed(self._seed, step, self.peers.rank))

    def _mean(self, arrived: Any, numel: int) -> Tensor:
        """The weighted mean over replicas of what they have moved by; the same bits on all."""
        if self._codec is None:
            total, weight = arrived[:-1], arrived[-1]
            return total / weight.clamp(min=1.0)  # type: ignore[no-any-return]
        weights = [each[-4:].clone().view(torch.float32).item() for each in arrived]
        total = torch.zeros(numel, dtype=torch.float32, device=self._values.device)
        width = self._codec.part(numel, size=1)
        for each, weight in zip(arrived, weights):
            total.add_(self._codec.decode(each[None, :-4], numel=width)[0, :numel], alpha=weight)
        return total.div_(max(sum(weights), 1.0)).to(self._values.dtype)

    def _use(self) -> None:
        """Wait for the fragment on its way; its outer step, and the mix with one's own."""
        assert self._flight is not None, "something left"
        if self._work is None:
            self._send()
        fragment, step, targets = self._flight
        assert self._work is not None, "sent"
        numel = sum(len(span) for span in self._fragments[fragment])
        arrived = self._work.wait()
        if numel:
            mean = self._mean(arrived, numel)
            if self._memory is not None:
                self._remember(fragment, step)
            if bool(torch.isfinite(mean).all()):
                self._apply(mean, fragment)
        self._marks[fragment] = targets
        self._flight, self._work, self._used = None, None, self._used + 1

    def _remember(self, fragment: int, step: int) -> None:
        """Keep what the codec left out of this replica's part."""
        assert self._memory is not None and self._codec is not None, "only with a codec"
        moved = self._packed(self._sent.tensor, fragment)
        width = self._codec.part(moved.numel(), size=1)
        sent = self._codec.decode(self._encoded(moved, step), numel=width)[0, : moved.numel()]
        rest = (moved - sent.to(moved.dtype)).nan_to_num_(0.0, 0.0, 0.0)
        for span, part in zip(self._fragments[fragment], self._split(rest, fragment)):
            self._memory.tensor[span.start : span.stop] = part

    def _split(self, packed: Tensor, fragment: int) -> list[Tensor]:
        return list(packed.split([len(span) for span in self._fragments[fragment]]))

    def _apply(self, mean: Tensor, fragment: int) -> None:
        share = self._section.own_share
        for span, part in zip(self._fragments[fragment], self._split(mean, fragment)):
            at = slice(span.start, span.stop)
            self.outer.step(part, span=at)
            self._values[at].mul_(share).add_(self.outer.anchor[at], alpha=1 - share)

    def _meet(self, step: int, *, share: float) -> None:
        raise AssertionError("fragments meet one by one")

    def meets_after(self, step: int) -> bool:
        return self.equal_after(step) or (step - self._start) % self._every == 0

    @torch.no_grad()
    def begin(self, step: int) -> None:
        super().begin(step)
        self.outer.anchor.copy_(self._values)
        self._marks = [0] * len(self._fragments)
        self._flight, self._work, self._left_at = None, None, [step] * len(self._fragments)

    def vectors(self) -> Iterable[Vector]:
        memory = () if self._memory is None else (self._memory,)
        return (self._sent, *memory, *self.outer.vectors())

    def facts(self) -> dict[str, Any]:
        state = {"marks": list(self._marks), "left_at": list(self._left_at), "used": self._used}
        return {**super().facts(), **state, "flight": self._flight}

    def restore(self, facts: Mapping[str, Any]) -> None:
        super().restore(facts)
        self._marks = [int(each) for each in facts["marks"]]
        self._left_at, self._used = [int(each) for each in facts["left_at"]], int(facts["used"])
        flight = facts["flight"]
        self._flight, self._work = (None if flight is None else tuple(flight)), None
