"""Runs the stages of a pipeline: by a schedule of torch with backward, or one after the other.

torch.distributed.pipelining has the order of work and the transfers; what a stage computes is the
caller's. Gradients are sums: nothing is divided by the number of micro batches.

Shapes: hidden states between stages are [B, T, D] of their micro batch; micro batches may differ in
T, so buffers are made when they are to be filled, and given up once they are used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from shoal.comm.group import Traffic
from shoal.legal import fits_schedule
from shoal.parallel.stages import Stage, Stages
from shoal.runtime import complete

# when a step fails, as it does when a rank is lost, it logs every action of every rank
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)

Shape = tuple[int, ...]

_SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_LOOPED = {
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "interleaved-zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv-zero-bubble": ScheduleZBVZeroBubble,
    "breadth-first": ScheduleLoopedBFS,
}


class Compute(Protocol):
    """What the stages of a rank do, asked for in the order of the schedule."""

    def forward(self, stage: Stage, hidden: Tensor | None, number: int) -> Tensor:
        """Hidden states after a stage for micro batch `number`; of the last stage what backward
        starts from."""

    def backward(self, stage: Stage, number: int) -> AbstractContextManager[None]:
        """Gradients of this micro batch are made inside, all or those of the stage's inputs."""

    def weights(self, stage: Stage, number: int) -> AbstractContextManager[None]:
        """Those of its parameters are made inside, where the schedule has taken them apart."""

    def after_backward(self, stage: Stage, number: int) -> None:
        """Its gradients of the stage's parameters are in."""


@dataclass(frozen=True)
class Line:
    """The ranks that pass micro batches on to one another."""

    group: dist.ProcessGroup
    device: torch.device
    dtype: torch.dtype
    """Of hidden states between blocks: that of the weights, whatever products are computed in."""
    traffic: Traffic


class Schedule:
    """One schedule for a number of micro batches; `step` may be called again and again."""

    def __init__(
        self,
        stages: Stages,
        *,
        line: Line,
        schedule: str,
        num_micro_batches: int,
        parameters: Callable[[Stage], list[nn.Parameter]],
    ) -> None:
        self._stages, self._count = stages, num_micro_batches
        self._chunks = [_Chunk(each, line=line, parameters=parameters) for each in stages.own]
        chunks: Any = self._chunks[0] if schedule in _SINGLE else self._chunks
        known: dict[str, Any] = {**_SINGLE, **_LOOPED}
        ranks = 1 + max(stages.ranks)
        if not fits_schedule(schedule, ranks=ranks, micro_batches=num_micro_batches):
            # replicas share the batch out anew when one is lost: the same sums in another order
            schedule = "gpipe" if schedule in _SINGLE else "breadth-first"
        self._schedule = known[schedule](
            chunks, num_micro_batches, loss_fn=lambda loss, target: loss, scale_grads=False
        )

    def step(self, compute: Compute, *, shapes: Sequence[Shape]) -> None:
        """Forward and backward of all micro batches; `shapes` of the hidden states of each.

        Collective along the pipeline. Raises what `compute` raises.
        """
        for chunk in self._chunks:
            chunk.compute, chunk.shapes = compute, shapes
        numbers = torch.arange(self._count)
        own = self._stages.own
        first = (numbers,) if any(each.is_first for each in own) else ()
        target = numbers if any(each.is_last for each in own) else None
        try:
            self._schedule.step(*first, target=target, number=numbers, return_outputs=False)
        except RuntimeError as error:
            if error.__cause__ is None:
                raise
            cause = error.__cause__
        else:
            return
        raise cause  # torch wraps what a stage raises in its own words


class _Body(nn.Module):
    """The module that torch's stage calls; its parameters are those of the stage."""

    def __init__(self, parameters: Callable[[], list[nn.Parameter]]) -> None:
        super().__init__()
        self._of_stage = parameters
        self.call: Callable[..., Tensor]

    def parameters(self, recurse: bool = True) -> Any:
        return iter(self._of_stage())

    def forward(self, *given: Tensor, number: Tensor) -> Tensor:
        return self.call(given[0], int(number))


class _Chunk(PipelineStage):
    """torch's stage, with buffers of its micro batches' shapes, and every sent byte counted."""

    compute: Compute
    shapes: Sequence[Shape]

    def __init__(
        self, stage: Stage, *, line: Line, parameters: Callable[[Stage], list[nn.Parameter]]
    ) -> None:
        # only what is given here is known beforehand, so nothing is computed to find shapes out
        like = torch.empty(1, dtype=line.dtype, device=line.device, requires_grad=True)
        body = _Body(lambda: parameters(stage))
        super().__init__(
            body,
            stage.number,
            stage.count,
            line.device,
            input_args=torch.zeros(1, dtype=torch.int64) if stage.is_first else like,
            output_args=like,
            group=line.group,
        )
        self._stage, self._line = stage, line
        body.call = self._forward

    def _forward(self, given: Tensor, number: int) -> Tensor:
        hidden = None if self._stage.is_first else given
        output = self.compute.forward(self._stage, hidden, number)
        if not self._stage.is_last and output.dtype != self._line.dtype:
            raise TypeError(
                f"stage {self._stage.number}: hidden states are {output.dtype}, expected "
                f"{self._line.dtype}"
            )
        return output

    def _renew(self, infos: Any, number: int) -> None:
        for info in infos:
            if not info.is_root_arg:
                info.buffer = torch.empty(
                    self.shapes[number], dtype=self._line.dtype, device=self._line.device
                )

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        self._renew(self.args_recv_info[fwd_chunk_id], fwd_chunk_id)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        self._renew(self.grad_recv_info[bwd_chunk_id], bwd_chunk_id)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id))

    def _counted(self, operations: Any) -> Any:
        for each in operations:
            self._line.traffic.sent_bytes["send"] += each.tensor.nbytes
        return operations

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        with self.compute.backward(self._stage, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._forget(bwd_chunk_id)
        if full_backward:
            self.compute.after_backward(self._stage, bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self.compute.weights(self._stage, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.compute.after_backward(self._stage, bwd_chunk_id)

    def _forget(self, number: int) -> None:
        for info in (*self.args_recv_info[number], *self.grad_recv_info.get(number, ())):
            info.buffer = None


def walk(
    stages: Stages,
    *,
    line: Line,
    shape: Shape,
    forward: Callable[[Stage, Tensor | None], Tensor],
) -> Tensor | None:
    """One micro batch through all stages without gradients; what the last gives, where that is.

    Collective along the pipeline; a rank goes on as soon as it has passed on its own.
    """
    given: Tensor | None = None
    for stage in stages.own:
        if not stage.is_first:
            before = stages.ranks[stage.number - 1]
            if before != stages.coordinate:
                given = torch.empty(shape, dtype=line.dtype, device=line.device)
                dist.recv(given, group=line.group, group_src=before)
        given = forward(stage, given)
        if stage.is_last:
            return given
        after = stages.ranks[stage.number + 1]
        if after != stages.coordinate:
            dist.send(given.contiguous(), group=line.group, group_dst=after)
            line.traffic.sent_bytes["send"] += given.nbytes
    return None


def shown_to_all(found: Tensor | None, *, stages: Stages, line: Line) -> Tensor:
    """What the rank with the last stage has `found`, float32, at every rank of the pipeline."""
    source = stages.speaks_at
    size = torch.zeros(2, dtype=torch.int64, device=line.device)
    if found is not None:
        size += torch.tensor(found.shape, device=line.device)
    from_source = partial(dist.broadcast, group_src=source)
    complete(from_source, size, group=line.group)
    whole = torch.empty(*size.tolist(), device=line.device) if found is None else found.contiguous()
    complete(from_source, whole, group=line.group)
    if stages.coordinate == source:
        line.traffic.sent_bytes["broadcast"] += whole.nbytes
    return whole
