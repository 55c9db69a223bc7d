"""Reduction beside backward: buckets of gradients cross while earlier layers' are still computed.

As torch's DDP does (Li et al., arXiv 2006.15704): all replicas begin the buckets in one order, the
one in which a backward completes them, so a bucket waits for those before it in that order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shoal.comm.flat import Span
from shoal.engine.state import FlatState
from shoal.models.anatomy import canonical_parameters
from shoal.sync.policy import Policy


class Overlap:
    """Hands buckets to the policy as the last backward of a step completes them.

    For a replica that one rank has whole: elsewhere a gradient lacks sums after its backward.
    """

    def __init__(self, model: nn.Module, *, state: FlatState, policy: Policy) -> None:
        self._state, self._policy = state, policy
        self._parameters = canonical_parameters(model)
        self._plan: list[Span] = []
        self._of: dict[str, list[int]] = {}
        self._missing: list[int] = []
        self._left: list[int] = []
        self._next = 0
        self._armed = False
        self.squares: list[Tensor] = []
        """Of each bucket begun: the square of its norm before it was reduced."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._hook(name))

    def begin(self) -> bool:
        """A step begins. Returns whether buckets will be handed on, the same at all peers."""
        buckets = self._policy.buckets(numel=self._state.trainable_numel)
        if buckets != sorted(self._plan, key=lambda span: span.start):
            self._arrange(buckets)
        self._armed, self._next, self._left = False, 0, self._missing.copy()
        self.squares = []
        return bool(buckets)

    def arm(self) -> None:
        """The backward that follows is the last one of the step."""
        self._armed = bool(self._plan)

    def finish(self) -> None:
        """Hand on what no backward has completed: parameters that it did not meet. PeersLost."""
        self._armed = False
        while self._next < len(self._plan):
            self._hand_on()

    def _arrange(self, buckets: list[Span]) -> None:
        """Buckets in the order in which a backward completes them: that of their first layers,
        backwards."""
        layout = self._state.layout
        order = {name: place for place, name in enumerate(self._parameters)}
        inside: dict[Span, list[str]] = {span: [] for span in buckets}
        for name in self._state.trainable(self._state.gradients):
            start = layout.offsets[name]
            own = Span(start, start + self._parameters[name].numel())
            for span in buckets:
                if span.meet(own):
                    inside[span].append(name)
        first = {span: min((order[n] for n in names), default=0) for span, names in inside.items()}
        self._plan = sorted(buckets, key=lambda span: (-first[span], -span.start))
        self._missing = [len(inside[span]) for span in self._plan]
        self._of = {}
        for place, span in enumerate(self._plan):
            for name in inside[span]:
                self._of.setdefault(name, []).append(place)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def completed(_: Tensor) -> None:
            if self._armed:
                for place in self._of[name]:
                    self._left[place] -= 1
                while self._next < len(self._plan) and not self._left[self._next]:
                    self._hand_on()

        return completed

    @torch.no_grad()
    def _hand_on(self) -> None:
        span = self._plan[self._next]
        flat = self._state.gradients[span.start : span.stop]
        self.squares.append(torch.linalg.vector_norm(flat).square())
        self._next += 1
        self._policy.begin_reduce(flat)
