"""Codecs: how far a sum is from the true one, by other people's arithmetic, and what is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from replicas import LAYOUT, drawn, on_replicas
from shoal.comm.codec.compression import Compression
from shoal.comm.codec.kinds import create
from shoal.comm.group import Group
from shoal.config.sync import (
    Bfloat16,
    Brake,
    Float16,
    Int4,
    Int8,
    NoCodec,
    PowerSGD,
    Sign,
    TopK,
)

SECTIONS: dict[str, Any] = {
    "none": NoCodec(),
    "bf16": Bfloat16(),
    "fp16": Float16(),
    "int8": Int8(),
    "int8-stochastic": Int8(stochastic=True),
    "int4": Int4(),
    "sign": Sign(),
    "topk": TopK(fraction=0.05),
    "topk-blocks": TopK(fraction=0.05, block=256),
    "topk-sixteen": TopK(fraction=0.125, block=16),
    "powersgd": PowerSGD(),
}
LARGEST = {
    "none": 1e-6,
    "bf16": 0.01,
    "fp16": 0.001,
    "int8": 0.03,
    "int8-stochastic": 0.05,
    "int4": 0.4,
    "sign": 1.2,
    "topk": 0.9,
    "topk-blocks": 0.9,
    "topk-sixteen": 0.8,
    "powersgd": 1.0,
}
"""Of the distance from the true sum, over its length, for normal numbers."""


def summed(section: Any, size: int, *, rounds: int = 1, made: Any = drawn) -> list[Any]:
    """Each rank's sums, its state, and the compression, after sums of the same values."""

    def body(rank: int, group: Group) -> tuple[list[Tensor], list[Tensor], Compression]:
        compression = create(section, LAYOUT, like=made(rank))
        sums = []
        for key in range(rounds):
            values = made(rank)
            compression.sum_(group, values, key=key)
            compression.commit()
            sums.append(values)
        return sums, [vector.tensor for vector in compression.vectors()], compression

    return on_replicas(size, body)


def true_sum(size: int, *, made: Any = drawn) -> Tensor:
    """In float64, by numpy."""
    return torch.from_numpy(np.sum([made(rank).double().numpy() for rank in range(size)], axis=0))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SECTIONS)
def test_all_ranks_get_the_same_bits_near_the_true_sum(name: str, size: int) -> None:
    found = [sums[0] for sums, _, _ in summed(SECTIONS[name], size)]
    assert all(torch.equal(each, found[0]) for each in found)
    wanted = true_sum(size)
    assert float((found[0] - wanted).norm() / wanted.norm()) < LARGEST[name]


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "none"])
def test_with_error_feedback_nothing_is_lost(name: str) -> None:
    """What was summed and what is remembered are together all that was given, over any rounds."""
    section = SECTIONS[name].model_copy(update={"error_feedback": True})
    found = summed(section, 3, rounds=4)
    given = 4 * true_sum(3)
    kept = sum(state[0].double() for _, state, _ in found)
    got = sum(each.double() for each in found[0][0])
    assert float((kept + got - given).norm() / given.norm()) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SECTIONS)
def test_what_is_not_finite_is_not_lost(name: str, bad: float) -> None:
    """So that the step is skipped; and the memory does not keep it."""

    def made(rank: int) -> Tensor:
        values = drawn(rank)
        values[LAYOUT.offsets["model.layers.2.up.weight"] + 7] = bad if rank == 1 else 1.0
        return values

    if name not in ("none",):
        section = SECTIONS[name].model_copy(update={"error_feedback": True})
    else:
        section = SECTIONS[name]
    for (total,), state, _ in summed(section, 2, made=made):
        assert not bool(torch.isfinite(total).all())
        assert all(bool(torch.isfinite(each).all()) for each in state)


@pytest.mark.parametrize(("section", "levels", "block"), [(Int8(), 127, 256), (Int4(), 7, 128)])
def test_two_roundings_as_numpy_makes_them(section: Any, levels: int, block: int) -> None:
    """Each rank's block by block, added up in float32, and the total rounded once more."""

    def rounded(values: np.ndarray) -> np.ndarray:
        blocks = values.reshape(-1, block)
        scales = (np.abs(blocks).max(axis=1, keepdims=True) / np.float32(levels)).astype("f4")
        with np.errstate(invalid="ignore"):
            codes = np.nan_to_num(np.rint(blocks / scales))
        return (codes.astype("f4") * scales).reshape(-1)

    assert LAYOUT.numel % (2 * block) == 0, "else ranks have padding"
    plain = section.model_copy(update={"error_feedback": False})
    wanted = rounded(np.add(rounded(drawn(0).numpy()), rounded(drawn(1).numpy()), dtype="f4"))
    found = summed(plain, 2)[0][0][0].numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_the_two_largest_of_sixteen_as_numpy_chooses_them() -> None:
    """Rounded to 7 levels of the largest of 256, each rank's added to the other's."""

    def sent(values: np.ndarray) -> np.ndarray:
        rows = values.reshape(-1, 256)
        scales = (np.abs(rows).max(axis=1, keepdims=True) / np.float32(7)).astype("f4")
        sixteens = rows.reshape(-1, 16)
        kept = np.zeros_like(sixteens)
        places = np.argsort(-np.abs(sixteens), axis=1)[:, :2]
        np.put_along_axis(kept, places, np.take_along_axis(sixteens, places, 1), 1)
        with np.errstate(invalid="ignore"):  # a row of nothing
            codes = np.nan_to_num(np.rint(kept.reshape(-1, 256) / scales))
        return (codes * scales).reshape(-1)

    assert LAYOUT.numel % 256 == 0
    section = TopK(fraction=0.125, block=16, error_feedback=False)
    found = summed(section, 2)[0][0][0].numpy()
    wanted = sent(drawn(0).numpy()) + sent(drawn(1).numpy())
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_random_rounding_is_right_on_average_and_repeats_by_its_key() -> None:
    made = lambda rank: torch.full((LAYOUT.numel,), 0.3 + 0.1 * rank)  # noqa: E731

    def body(rank: int, group: Group) -> list[Tensor]:
        found = []
        for key in [*range(40), 0]:
            values = made(rank)
            values[::256] = 127.0  # sets the scale to 1 or 2
            create(Int8(stochastic=True), LAYOUT, like=values).sum_(group, values, key=key)
            found.append(values[1::256])
        return found

    sums = on_replicas(2, body)[0]
    mean = float(torch.stack(sums[:40]).mean())
    number = 40 * len(sums[0])
    assert abs(mean - 0.7) < 5 * 1.2 / number**0.5, "five standard errors"
    assert torch.equal(sums[0], sums[40]) and not torch.equal(sums[0], sums[1])


def test_the_largest_cross_as_numpy_chooses_them() -> None:
    count = -(-LAYOUT.numel // 20)
    wanted = np.zeros(LAYOUT.numel, dtype="f4")
    for rank in range(2):
        values = drawn(rank).numpy()
        largest = np.argsort(-np.abs(values))[:count]
        wanted[largest] += values[largest]
    section = TopK(fraction=0.05, error_feedback=False)
    np.testing.assert_array_equal(summed(section, 2)[0][0][0].numpy(), wanted)


def test_the_largest_of_each_block_cross_as_numpy_chooses_them() -> None:
    """13 of 256 values, a byte for each place and two for a value of 8 bits' precision."""
    wanted, block = np.zeros(LAYOUT.numel, dtype="f4"), 256
    for rank in range(2):
        rows = drawn(rank).numpy().reshape(-1, block)
        largest = np.argsort(-np.abs(rows), axis=1)[:, :13]
        rounded = drawn(rank).bfloat16().float().numpy().reshape(-1, block)
        chosen = np.zeros_like(rows)
        np.put_along_axis(chosen, largest, np.take_along_axis(rounded, largest, 1), 1)
        wanted += chosen.reshape(-1)
    section = TopK(fraction=0.05, block=block, error_feedback=False)
    np.testing.assert_array_equal(summed(section, 2)[0][0][0].numpy(), wanted)


def test_a_codec_may_begin_after_some_rounds() -> None:
    section = TopK(fraction=0.05, after_rounds=2)
    for sums, _, compression in summed(section, 2, rounds=3):
        assert torch.equal(sums[0], drawn(0) + drawn(1)) and torch.equal(sums[1], sums[0])
        assert int((sums[2] != 0).sum()) <= 2 * 0.051 * LAYOUT.numel
        assert not compression.is_exact


def test_power_iterations_as_numpy_makes_them() -> None:
    """Two rounds: the second begins with the Q of the first. Signs of a basis cancel in P Q'."""
    name = "model.layers.1.up.weight"
    matrix = LAYOUT.view(true_sum(2), name).numpy()
    wanted, start = None, LAYOUT.offsets[name]
    sums, (kept,), _ = summed(PowerSGD(error_feedback=False), 2, rounds=1)[0]
    q = kept[start : start + 24 * 4].view(24, 4).double().numpy()
    basis = np.linalg.qr(matrix @ q)[0]
    wanted = basis @ (matrix.T @ basis).T
    again = summed(PowerSGD(error_feedback=False), 2, rounds=2)[0][0]
    np.testing.assert_array_equal(again[0].numpy(), sums[0].numpy())
    np.testing.assert_allclose(LAYOUT.view(again[1], name).numpy(), wanted, rtol=0, atol=2e-4)
    assert np.linalg.matrix_rank(LAYOUT.view(again[1], name).numpy()) == 4
    vector = "model.norm.weight"
    exact = LAYOUT.view(drawn(0) + drawn(1), vector)
    assert torch.equal(LAYOUT.view(again[1], vector), exact), "what is no matrix crosses as it is"


def test_a_low_rank_sum_comes_out_whole() -> None:
    def made(rank: int) -> Tensor:
        values, draws = torch.zeros(LAYOUT.numel), torch.Generator().manual_seed(9 + rank)
        for name, shape in LAYOUT.shapes.items():
            if len(shape) == 2:
                thin = [torch.randn(n, 2, generator=draws) for n in shape]
                LAYOUT.view(values, name).copy_(thin[0] @ thin[1].T)
        return values

    found = summed(PowerSGD(rank=4, error_feedback=False), 2, made=made)[0][0][0]
    wanted = true_sum(2, made=made)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_the_brake_takes_out_what_no_longer_points_the_right_way() -> None:
    """One value in a thousand has a small cosine: the third sum is exact, and pays the debt."""
    section = TopK(fraction=0.001, brake=Brake(every_rounds=2, cosine=0.5))
    for sums, (memory,), compression in summed(section, 2, rounds=4):
        ((name, fields),) = compression.notes()
        assert name == "codec-off" and 0 < fields["cosine"] < 0.5
        assert "sent as they are from now on" in fields["text"]
        assert compression.is_exact and compression.facts() == {"rounds": 4, "off": True}
        assert float(memory.abs().max()) == 0
        torch.testing.assert_close(sum(sums), 4 * true_sum(2).float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sums[3], true_sum(2).float(), rtol=1e-5, atol=1e-5)
    kept = summed(Int8(brake=Brake(every_rounds=2, cosine=0.9)), 2, rounds=4)[0][2]
    assert not kept.notes() and not kept.is_exact, "the same brake lets a good codec be"


def test_a_sum_that_is_not_used_leaves_no_trace() -> None:
    """A step that is given up is computed again: memory and warm start must not have moved."""
    for section in (Int4(), TopK(), PowerSGD()):

        def body(rank: int, group: Group, section: Any = section) -> None:
            compression = create(section, LAYOUT, like=drawn(rank))
            before = [vector.tensor.clone() for vector in compression.vectors()]
            first, second = drawn(rank), drawn(rank)
            compression.sum_(group, first, key=1)
            after = [vector.tensor for vector in compression.vectors()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            compression.sum_(group, second, key=1)
            assert torch.equal(first, second)

        on_replicas(2, body)
