"""Orthogonalised momentum: the polynomial on the singular values, and torch's own in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shoal.engine.muon import Muon, orthogonalised

SHAPES = [(6, 8), (8, 6), (24, 24), (1, 5), (40, 3)]


def matrix(shape: tuple[int, int], *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def by_singular_values(given: Tensor) -> Tensor:
    """Newton-Schulz changes nothing but the singular values: five times 3.4445 s - 4.775 s^3 +
    2.0315 s^5, from those of the matrix over its Frobenius norm."""
    left, values, right = torch.linalg.svd(given.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    given = matrix(shape)
    wanted = by_singular_values(given)
    exact = orthogonalised(given, dtype=torch.float64)
    # the slope at 0 is 3.4445^5 = 485: that many roundings of 1e-16
    torch.testing.assert_close(exact, wanted, rtol=0, atol=1e-12)
    single = orthogonalised(given.float(), dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wanted, rtol=0, atol=1e-4)
    values = torch.linalg.svdvals(exact)
    assert float(values.min()) > 0.3 and float(values.max()) < 1.3


def test_a_matrix_of_zeros_stays() -> None:
    assert not orthogonalised(torch.zeros(4, 3), dtype=torch.float32).any()


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The parameters after four steps on gradients of their own."""
    for step in range(4):
        for number, each in enumerate(parameters):
            each.grad = matrix(tuple(each.shape), seed=100 + 10 * step + number).to(each.dtype)
        optimizer.step()
    return [each.detach() for each in parameters]


def both(*, dtype: torch.dtype, state: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Ours (which orthogonalises in `dtype`) and torch's, from the same start."""
    ours, theirs = ([nn.Parameter(matrix(shape).to(state)) for shape in SHAPES] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    made = Muon([{"params": ours}], **settings, dtype=dtype)
    for each in ours:
        made.state[each] = {"momentum_buffer": torch.zeros_like(each)}
    torchs = torch.optim.Muon(theirs, **settings)
    return [stepped(made, ours), stepped(torchs, theirs)]


def test_in_bfloat16_it_has_the_bits_of_torch() -> None:
    ours, theirs = both(dtype=torch.bfloat16)
    assert all(map(torch.equal, ours, theirs))


def test_in_float32_it_is_torchs_without_the_rounding() -> None:
    """Four updates of 0.02, whose elements torch rounds by 2^-9 at each of ten products."""
    ours, theirs = both(dtype=torch.float32)
    for one, other in zip(ours, theirs, strict=True):
        assert 1e-7 < float((one - other).abs().max()) < 4e-3
    exact, _ = both(dtype=torch.float64, state=torch.float64)
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=4e-6)
