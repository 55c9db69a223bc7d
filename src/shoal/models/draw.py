"""Draws initial values by position from a record of how each tensor begins.

Every element depends on (seed, canonical name, element position) only, so any box of a tensor
equals the slice of the whole bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.boxes import Box
from shoal.errors import ModelError
from shoal.models.random_bits import Floats, key_of, normal_quantile, uniform

_CHUNK = 1 << 15
"""Elements drawn at once: the temporaries stay in the second-level cache."""

_THREADS_CHUNK = 1 << 17
"""The same where several threads draw, who would else wait for the interpreter's lock."""
_WORTH_THREADS = 1 << 20
"""Elements from which several threads draw."""

_SQRT_HALF = 0.7071067811865476


@dataclass(frozen=True)
class Operation:
    """One recorded step: normal(mean, std), uniform(low, high), fill(value), values, mul_, ..."""

    kind: str
    arguments: tuple[float, ...] = ()
    region: Box | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class InitRecord:
    """How each parameter and buffer of one model begins; by canonical name."""

    shapes: Mapping[str, tuple[int, ...]]
    programs: Mapping[str, tuple[Operation, ...]]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def program(self, name: str) -> tuple[Operation, ...]:
        """The steps for one name. Raises ModelError when the model never initialises it."""
        program = self.programs.get(name, ())
        if not program:
            raise ModelError(
                f"{name}: the model's own _init_weights does not initialise it, so its first value "
                "is unknown\n    start from pretrained weights, or use another family"
            )
        return program

    def draw(self, name: str, *, seed: int, box: Box | None = None) -> Tensor:
        """Initial value of one parameter, or of a box of it; float32 (buffers: their own type).

        The whole is cut, never drawn again: `draw(box)` equals `draw()[box]` bit for bit. Raises
        ModelError for a box outside of it, and for a name that nothing initialises.
        """
        program, shape = self.program(name), self.shapes[name]
        wanted = Box.whole(shape) if box is None else box
        if not wanted.fits(shape):
            raise ModelError(f"{name}: box {wanted.offsets}+{wanted.sizes} is outside {shape}")
        dtype = self.dtypes.get(name, torch.float32)
        if program[-1].kind == "values" and program[-1].region is None:
            values = program[-1].values
            assert values is not None, f"{name}: recorded without its values"
            return values[wanted.slices].to(dtype).clone()
        result = np.empty(
            wanted.numel,
            dtype=np.float64 if dtype == torch.float64 else np.float32,
        )
        if program[0].kind == "fill" and len(program) == 1:
            result.fill(program[0].arguments[0])
        else:
            self._fill(result, program, key=key_of(seed, name), shape=shape, box=wanted)
        return torch.from_numpy(result).to(dtype).reshape(wanted.sizes)

    def _fill(
        self,
        result: NDArray[Any],
        program: Sequence[Operation],
        *,
        key: int,
        shape: tuple[int, ...],
        box: Box,
    ) -> None:
        """Draw the elements of a box, by as many threads as this worker computes with."""

        def draw(part: tuple[slice, NDArray[np.uint64]]) -> None:
            span, positions = part
            result[span] = _run(program, positions, key=key, shape=shape)

        threads = torch.get_num_threads() if box.numel > _WORTH_THREADS else 1
        if threads == 1:
            for part in _positions(shape, box, chunk=_CHUNK):
                draw(part)
            return
        with ThreadPoolExecutor(threads) as pool:  # numpy computes without the interpreter's lock
            parts = _positions(shape, box, chunk=_THREADS_CHUNK)
            while some := list(itertools.islice(parts, 64 * threads)):
                list(pool.map(draw, some, chunksize=1))


def _positions(
    shape: tuple[int, ...], box: Box, *, chunk: int
) -> Iterator[tuple[slice, NDArray[np.uint64]]]:
    """Flat positions of a box in the whole, in row-major order, chunk by chunk."""
    offsets, sizes = box.offsets, box.sizes
    run, starts = 1, np.zeros(1, dtype=np.uint64)
    strides = [int(np.prod(shape[d + 1 :], dtype=np.int64)) for d in range(len(shape))]
    last = len(shape)
    # dims that the box covers wholly at the end are one run of consecutive elements
    while last > 0 and sizes[last - 1] == shape[last - 1]:
        last -= 1
        run *= shape[last]
    if last > 0:
        last -= 1
        run *= sizes[last]
    for d in range(last):
        steps = (np.arange(sizes[d], dtype=np.uint64) + np.uint64(offsets[d])) * np.uint64(
            strides[d]
        )
        starts = (starts[:, None] + steps[None, :]).reshape(-1)
    if last < len(shape):
        starts = starts + np.uint64(offsets[last] * strides[last])
    done = 0
    rows = max(1, chunk // max(run, 1))
    for first in range(0, len(starts), rows):
        for begin in range(0, run, chunk):
            width = np.arange(begin, min(begin + chunk, run), dtype=np.uint64)
            block = (starts[first : first + rows, None] + width[None, :]).reshape(-1)
            yield slice(done, done + len(block)), block
            done += len(block)


def _run(
    program: Sequence[Operation], positions: NDArray[np.uint64], *, key: int, shape: tuple[int, ...]
) -> Floats:
    """Execute a program for some positions; float64."""
    current: Floats = np.zeros(len(positions), dtype=np.float64)
    for index, step in enumerate(program):
        if step.region is None:
            current = _apply(step, current, positions, key=key + index)
            continue
        inside = np.flatnonzero(_inside(positions, shape, step.region))
        if inside.size:
            current[inside] = _apply(step, current[inside], positions[inside], key=key + index)
    return current


def _inside(
    positions: NDArray[np.uint64], shape: tuple[int, ...], region: Box
) -> NDArray[np.bool_]:
    rest, result = positions, np.ones(len(positions), dtype=bool)
    for whole, start, size in zip(
        reversed(shape), reversed(region.offsets), reversed(region.sizes)
    ):
        place = rest % np.uint64(whole)
        rest = rest // np.uint64(whole)
        result &= (place >= start) & (place < start + size)
    return result


def _apply(step: Operation, current: Floats, positions: NDArray[np.uint64], *, key: int) -> Floats:
    kind, arguments = step.kind, step.arguments
    if kind == "normal":
        drawn = normal_quantile(uniform(positions.copy(), key=key))
        drawn *= arguments[1]
        drawn += arguments[0]
        return drawn
    if kind == "uniform":
        drawn = uniform(positions.copy(), key=key)
        drawn *= arguments[1] - arguments[0]
        drawn += arguments[0]
        return drawn
    if kind == "fill":
        return np.full_like(current, arguments[0])
    if kind == "mul_":
        return current * arguments[0]
    if kind == "div_":
        return current / arguments[0]
    if kind == "add_":
        return current + arguments[0]
    if kind == "sub_":
        return current - arguments[0]
    if kind == "clamp_":
        return np.clip(current, arguments[0], arguments[1])
    if kind == "erfinv_":
        # a uniform number on (-1, 1) becomes normal: how torch draws a truncated normal
        return normal_quantile((current + 1.0) * 0.5) * _SQRT_HALF
    raise ModelError(f"initialisation step {kind!r} of a slice is not supported")
