"""Plays a pipeline schedule out: which rank computes what, when, and where it waits.

F is a forward pass, B the backward pass for the input, W the one for the weights. Schedules that
do not split the backward run B and W as one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.plan.workload import SCHEDULES

_SPLIT = {"interleaved-zero-bubble", "zbv-zero-bubble"}


@dataclass(frozen=True, slots=True)
class Piece:
    """One pass of one micro batch through one stage: kind F, B or W; times in seconds."""

    rank: int
    kind: str
    micro_batch: int
    stage: int
    start: float
    stop: float


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one stage (one chunk of a rank) for one micro batch."""

    forward: float
    backward_input: float
    backward_weight: float


@dataclass
class _Rank:
    """What a rank has still to do: an order to follow, or free choice, and weights put off."""

    order: list[tuple[str, int, int]] = field(default_factory=list)
    at: int = 0
    free_at: float = 0.0
    busy: bool = False
    put_off: list[tuple[int, int]] = field(default_factory=list)
    held: int = 0


def play(
    schedule: str,
    *,
    stages: Sequence[Times],
    ranks: int,
    micro_batches: int,
    send_seconds: float = 0.0,
) -> list[Piece]:
    """Every piece of a step, in order of start.

    `stages` holds chunks x ranks entries, in the order that a micro batch passes them. Raises
    ValueError for an unknown schedule and for numbers that it cannot place.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
    chunks, left = divmod(len(stages), ranks)
    if left or chunks < 1:
        raise ValueError(f"{len(stages)} stages do not divide over {ranks} ranks")
    if schedule in {"gpipe", "1f1b"} and chunks != 1:
        raise ValueError(f"{schedule} has one stage per rank, got {chunks}")
    if schedule == "zbv-zero-bubble" and chunks != 2:
        raise ValueError(f"zbv-zero-bubble has two stages per rank, got {chunks}")
    if schedule.startswith("interleaved") and micro_batches % ranks:
        raise ValueError(
            f"{schedule} needs micro batches in multiples of {ranks} ranks, got {micro_batches}"
        )
    player = _Player(
        schedule=schedule,
        stages=stages,
        ranks=ranks,
        micro_batches=micro_batches,
        send_seconds=send_seconds,
    )
    return player.run()


def rank_of_stage(schedule: str, *, stage: int, ranks: int) -> int:
    """The rank that holds a stage: in a V for zbv, looped for the others (as torch places them)."""
    lap, at = divmod(stage, ranks)
    return ranks - 1 - at if schedule == "zbv-zero-bubble" and lap % 2 else at


def order_of(
    schedule: str, *, rank: int, ranks: int, micro_batches: int, chunks: int
) -> list[tuple[str, int, int]]:
    """(kind, micro batch, stage) of one rank in the order it runs them; without W."""
    if schedule == "gpipe":
        forward = [("F", micro, rank) for micro in range(micro_batches)]
        return forward + [("B", micro, rank) for micro in range(micro_batches)]
    if schedule == "1f1b":
        ahead = min(micro_batches, ranks - rank - 1)
        forwards = [("F", micro, rank) for micro in range(micro_batches)]
        backwards = [("B", micro, rank) for micro in range(micro_batches)]
    else:
        # The order of Megatron (arXiv 2104.04473): groups of `ranks` micro batches go through
        # chunk after chunk; the backward takes the chunks from the last to the first.
        total = micro_batches * chunks
        warm = (ranks - rank - 1) * 2 + (chunks - 1) * ranks
        ahead = min(total, warm)

        def at(number: int, *, backward: bool) -> tuple[int, int]:
            group, within = divmod(number, ranks * chunks)
            chunk, offset = divmod(within, ranks)
            chunk = chunks - 1 - chunk if backward else chunk
            return group * ranks + offset, chunk * ranks + rank

        forwards = [("F", *at(number, backward=False)) for number in range(total)]
        backwards = [("B", *at(number, backward=True)) for number in range(total)]
    steady = [
        piece
        for pair in zip(forwards[ahead:], backwards[: len(backwards) - ahead], strict=True)
        for piece in pair
    ]
    return forwards[:ahead] + steady + backwards[len(backwards) - ahead :]


class _Player:
    """An event simulation: a rank that is free takes its next piece, or waits for it."""

    def __init__(
        self,
        *,
        schedule: str,
        stages: Sequence[Times],
        ranks: int,
        micro_batches: int,
        send_seconds: float,
    ) -> None:
        self.schedule, self.stages, self.count = schedule, stages, ranks
        self.micro_batches, self.send = micro_batches, send_seconds
        self.splits = schedule in _SPLIT
        self.done: dict[tuple[str, int, int], float] = {}
        self.pieces: list[Piece] = []
        self.ranks = [_Rank() for _ in range(ranks)]
        self.home = [
            rank_of_stage(schedule, stage=stage, ranks=ranks) for stage in range(len(stages))
        ]
        self.chooses = schedule == "zbv-zero-bubble"
        for index, rank in enumerate(self.ranks):
            if not self.chooses:
                rank.order = order_of(
                    schedule,
                    rank=index,
                    ranks=ranks,
                    micro_batches=micro_batches,
                    chunks=len(stages) // ranks,
                )
        self.next: list[dict[tuple[str, int], int]] = [{} for _ in range(ranks)]

    def run(self) -> list[Piece]:
        """Play until nothing is left."""
        events: list[tuple[float, int]] = [(0.0, rank) for rank in range(self.count)]
        heapq.heapify(events)
        total = len(self.stages) * self.micro_batches * (3 if self.splits else 2)
        while events:
            now, index = heapq.heappop(events)
            rank = self.ranks[index]
            if now < rank.free_at:
                continue
            piece = self._pick(index, now=now)
            if piece is None:
                continue
            kind, micro, stage = piece
            stop = now + self._seconds(kind, stage)
            rank.free_at = stop
            self._note(index, piece, stop=stop)
            self.pieces.append(Piece(index, kind, micro, stage, now, stop))
            heapq.heappush(events, (stop, index))
            for other in self._waiters(kind, stage):
                heapq.heappush(events, (stop + self.send, other))
        if len(self.pieces) != total:
            raise AssertionError(
                f"{self.schedule} stopped after {len(self.pieces)} of {total} pieces"
            )
        return self.pieces

    def _seconds(self, kind: str, stage: int) -> float:
        times = self.stages[stage]
        if kind == "F":
            return times.forward
        if kind == "W":
            return times.backward_weight
        return times.backward_input + (0.0 if self.splits else times.backward_weight)

    def _waiters(self, kind: str, stage: int) -> list[int]:
        """Ranks for which this piece may have been the one they waited for."""
        if kind == "F":
            return [self.home[stage + 1]] if stage + 1 < len(self.stages) else []
        return [self.home[stage - 1]] if kind == "B" and stage else []

    def _ready(self, piece: tuple[str, int, int], *, now: float) -> bool:
        kind, micro, stage = piece
        last = len(self.stages) - 1
        if kind == "F":
            needs = ("F", micro, stage - 1) if stage else None
        else:
            if self.done.get(("F", micro, stage), now + 1) > now:
                return False
            needs = ("B", micro, stage + 1) if stage < last else None
        if needs is None:
            return True
        there = self.home[needs[2]] != self.home[stage]
        arrival = self.done.get(needs)
        # Rounding of sums must not make a message late by one unit in the last place.
        return arrival is not None and arrival + self.send * there <= now + 1e-12 * (1 + now)

    def _pick(self, index: int, *, now: float) -> tuple[str, int, int] | None:
        rank = self.ranks[index]
        if self.chooses:
            found = self._choose(index, now=now)
            if found:
                return found
        elif rank.at < len(rank.order) and self._ready(rank.order[rank.at], now=now):
            return rank.order[rank.at]
        if self.splits and rank.put_off:
            return ("W", *rank.put_off[0])
        return None

    def _choose(self, index: int, *, now: float) -> tuple[str, int, int] | None:
        """V schedule: backward first, then the later stage, as long as activations have room.

        Every rank may hold 2 x ranks of its half-size stages, the memory of 1f1b's first rank
        (arXiv 2405.15362); the room for micro batches already on the way back is never given to
        new ones.
        """
        near, far = index, 2 * self.count - 1 - index
        rank = self.ranks[index]
        for kind, stage in (("B", far), ("B", near), ("F", far), ("F", near)):
            micro = self.next[index].get((kind, stage), 0)
            if micro >= self.micro_batches:
                continue
            if kind == "F" and stage == near:
                started = micro - self.next[index].get(("B", near), 0)
                if rank.held + 1 > 2 * self.count - 1 or started >= self.count:
                    continue
            if self._ready((kind, micro, stage), now=now):
                return kind, micro, stage
        return None

    def _note(self, index: int, piece: tuple[str, int, int], *, stop: float) -> None:
        kind, micro, stage = piece
        rank = self.ranks[index]
        self.done[piece] = stop
        if kind == "W":
            rank.put_off.remove((micro, stage))
            rank.held -= 1
            return
        if self.chooses:
            self.next[index][kind, stage] = micro + 1
        else:
            rank.at += 1
        if kind == "F":
            rank.held += 1
        elif self.splits:
            rank.put_off.append((micro, stage))
        else:
            rank.held -= 1


def idle_fraction(pieces: Sequence[Piece], *, ranks: int) -> float:
    """Idle share of all ranks between the start of the first and the end of the last piece."""
    length = max(piece.stop for piece in pieces) - min(piece.start for piece in pieces)
    busy = sum(piece.stop - piece.start for piece in pieces)
    return 1 - busy / (length * ranks)
