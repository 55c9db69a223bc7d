"""Weights on a grid: against numpy, compressed-tensors' own packing, and GPTQ's definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from shoal.compress.awq import Fold, scales_of
from shoal.compress.inputs import by_token
from shoal.compress.second_order import gptq
from shoal.compress.walk import Seen
from shoal.errors import ModelError, UserError
from shoal.models import packed
from shoal.models.grid import Grid, nearest

ROWS, INPUTS = 6, 32


def a_weight() -> torch.Tensor:
    return torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(0))


def a_hessian() -> torch.Tensor:
    """Of inputs that are not independent."""
    draw = np.random.default_rng(1)
    mixed = draw.normal(size=(200, INPUTS)) @ draw.normal(size=(INPUTS, INPUTS))
    return torch.from_numpy(mixed.T @ mixed)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 8)])
def test_the_nearest_points(bits: int, group: int | None) -> None:
    weight = a_weight()
    found = nearest(weight, Grid(bits, group))
    most = 2 ** (bits - 1) - 1
    parts = weight.double().numpy().reshape(ROWS, -1, group or INPUTS)
    scales = np.abs(parts).max(axis=2, keepdims=True) / most
    wanted = np.rint(parts / scales).reshape(ROWS, INPUTS)
    assert np.array_equal(found.codes.numpy(), wanted)
    error = (found.weight().double().numpy() - weight.numpy()).reshape(parts.shape)
    assert (np.abs(error) <= scales / 2 * (1 + 1e-5)).all()


def test_a_group_that_divides_nothing() -> None:
    with pytest.raises(UserError, match=r"--group 5 does not divide the 32 inputs.*such as 4"):
        nearest(a_weight(), Grid(4, 5))


@pytest.mark.parametrize(("bits", "inputs"), [(4, 32), (8, 32), (4, 30)])
def test_packing_is_theirs(bits: int, inputs: int) -> None:
    most = 2 ** (bits - 1)
    draw = torch.Generator().manual_seed(2)
    codes = torch.randint(-most, most, (5, inputs), generator=draw).to(torch.int8)
    words = packed.pack(codes, bits=bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    theirs = unpack_from_int32(words, bits, torch.Size(codes.shape))
    assert torch.equal(packed.unpack(words, bits=bits, inputs=inputs), theirs)


def _by_definition(weight: np.ndarray, hessian: np.ndarray, most: int) -> np.ndarray:
    """Optimal brain surgeon, column by column, with an inverse taken anew each time (GPTQ's
    equations 2 and 3): no factorisation, no blocks. Those of the largest inputs come first."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    weight, hessian = weight[:, order], hessian[np.ix_(order, order)]
    work, damped = weight.copy(), hessian.copy()
    damped[np.diag_indices_from(damped)] += 0.01 * np.diag(hessian).mean()
    scales = np.abs(weight).max(axis=1) / most
    codes = np.empty_like(weight)
    back = np.argsort(order)
    for column in range(weight.shape[1]):
        inverse = np.linalg.inv(damped[column:, column:])
        codes[:, column] = np.clip(np.rint(work[:, column] / scales), -most, most)
        error = (work[:, column] - codes[:, column] * scales) / inverse[0, 0]
        work[:, column:] -= np.outer(error, inverse[0])
    return codes[:, back]


def test_gptq_is_its_definition() -> None:
    weight, hessian = a_weight(), a_hessian()
    found = gptq(weight, hessian, Grid(4))
    wanted = _by_definition(weight.double().numpy(), hessian.numpy(), 7)
    assert (found.codes.numpy() != wanted).mean() < 0.01, "a tie may fall to the other side"

    def loss(made: torch.Tensor) -> float:
        error = (made - weight).double()
        return float(((error @ hessian) * error).sum())

    for group in (None, 8):
        grid = Grid(4, group)
        assert loss(gptq(weight, hessian, grid).weight()) < 0.7 * loss(
            nearest(weight, grid).weight()
        )


def test_zeros_stay_zeros() -> None:
    weight = a_weight()
    weight[:, ::3] = 0.0
    found = gptq(weight, a_hessian(), Grid(4, 8)).weight()
    assert (found[:, ::3] == 0).all() and float((found == 0).float().mean()) < 0.6


def test_inputs_that_never_come() -> None:
    hessian = a_hessian()
    hessian[3], hessian[:, 3] = 0.0, 0.0
    found = gptq(a_weight(), hessian, Grid(8))
    assert torch.isfinite(found.weight()).all()


def test_other_ways_to_quantise_are_named() -> None:
    said = packed.settings(bits=4, group=32, ignore=["lm_head"])
    assert packed.scheme_of(said, where="here") == packed.Scheme(4)
    with pytest.raises(ModelError, match=r"(?s)here: .*float-quantized.*known: compressed-tensors"):
        packed.scheme_of({**said, "format": "float-quantized"}, where="here")
    dynamic = packed.settings(bits=8, group=None, ignore=[], dynamic=True)
    assert packed.scheme_of(dynamic, where="here") == packed.Scheme(8, dynamic=True)
    (group,) = dynamic["config_groups"].values()
    for changed in (
        {**group, "input_activations": None},
        {**group, "input_activations": {**group["input_activations"], "strategy": "tensor"}},
        {**group, "weights": {**group["weights"], "num_bits": 4}},
    ):
        with pytest.raises(ModelError, match="quantised in a way that is not known here"):
            packed.scheme_of({**dynamic, "config_groups": {"group_0": changed}}, where="here")


def test_inputs_are_rounded_as_compressed_tensors_does() -> None:
    rows = 3 * torch.randn(4, 7, INPUTS, generator=torch.Generator().manual_seed(3))
    rows[0, 0] = 0.0
    said = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    asked = QuantizationArgs(**said)
    scales, zeros = compute_dynamic_scales_and_zp(rows, asked, torch.nn.Linear(INPUTS, 4))
    assert torch.equal(by_token(rows), fake_quantize(rows, scales, zeros, asked))


@pytest.mark.parametrize("group", [None, 8])
def test_awq_takes_the_best_exponent(group: int | None) -> None:
    """Against the paper's search in float64 on the outputs themselves (equations 4 and 5)."""
    draw = np.random.default_rng(4)
    inputs = draw.normal(size=(300, INPUTS)) * np.exp(draw.normal(size=INPUTS))
    weight = a_weight().double().numpy()
    model = torch.nn.Sequential(torch.nn.LayerNorm(INPUTS), torch.nn.Linear(INPUTS, ROWS))
    model.requires_grad_(False)
    model[1].weight.data = a_weight()
    seen = {"1": Seen.of(torch.from_numpy(inputs).float(), hessian=True)}
    fold = Fold(("1",), "0", "norm")
    found = scales_of(model, fold, seen, Grid(4, group)).double().numpy()
    losses, tried = [], []
    for step in range(20):
        scales = np.abs(inputs).mean(0) ** (step / 20)
        scales = scales / np.sqrt(scales.max() * scales.min())
        parts = (weight * scales).reshape(ROWS, -1, group or INPUTS)
        steps = np.abs(parts).max(2, keepdims=True) / 7
        rounded = (np.rint(parts / steps) * steps).reshape(ROWS, INPUTS) / scales
        losses.append(((inputs @ (rounded - weight).T) ** 2).sum())
        tried.append(scales)
    best = int(np.argmin(losses))
    assert best > 0 and losses[best] < 0.9 * losses[0]
    np.testing.assert_allclose(found, tried[best], rtol=1e-4)
