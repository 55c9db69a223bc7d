"""Number formats: where float16 may train, and the scale that its loss needs."""

from __future__ import annotations

import pytest
import torch

from shoal.errors import UserError
from shoal.parallel.precision import LossScale, check_compute, compute_context
from shoal.tasks.losses import chunked_loss


def test_float16_is_for_gpus() -> None:
    with pytest.raises(UserError, match=r"float16 needs a GPU, got a CPU"):
        check_compute("float16", device=torch.device("cpu"))
    assert check_compute("float16", device=torch.device("cuda")) == torch.float16


def test_products_are_small_and_weights_are_not() -> None:
    layer = torch.nn.Linear(4, 4)
    with compute_context(torch.bfloat16, device=torch.device("cpu")):
        output = layer(torch.ones(2, 4))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert (layer.weight.dtype, layer.weight.grad.dtype) == (torch.float32, torch.float32)


def test_the_scale_halves_on_overflow_and_doubles_when_all_is_well() -> None:
    scale = LossScale(1024.0, patience=3)
    for _ in range(2):
        scale.update(overflowed=False)
    scale.update(overflowed=True)
    assert (scale.value, scale.steps) == (512.0, 0)
    for _ in range(3):
        scale.update(overflowed=False)
    assert (scale.value, scale.steps) == (1024.0, 0)
    other = LossScale()
    other.restore(scale.state())
    assert (other.value, other.steps) == (1024.0, 0)
    smallest = LossScale(1.0)
    smallest.update(overflowed=True)
    assert smallest.value == 1.0
    assert LossScale.of(torch.bfloat16) is None and LossScale.of(torch.float16) is not None
    with pytest.raises(ValueError, match="expected a power of two of at least 1, got 1000"):
        LossScale(1000.0)


def test_gradients_of_float16_survive_at_scale() -> None:
    """Probabilities over 32,768 entries are about 3e-5; divided by 4,096 targets they are below
    the smallest float16, and come back when the loss is made at its scale."""
    torch.manual_seed(0)
    head = torch.randn(32768, 8, dtype=torch.float16) * 0.02
    hidden = torch.randn(16, 8, dtype=torch.float16)
    labels = torch.arange(16)
    factor = 65536.0 / 4096

    def gradient(dtype: torch.dtype, **settings: float) -> torch.Tensor:
        leaf, weight = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
        loss = chunked_loss(
            leaf, labels, lambda h: h @ weight.t(), head_parameters=[weight], **settings
        )
        (loss * (factor / 65536 if not settings else factor)).backward()
        return weight.grad.float() / (1.0 if not settings else 65536.0)

    wanted = gradient(torch.float64)
    lost = (gradient(torch.float16) == 0).float().mean()
    kept = gradient(torch.float16, expected_scale=factor)
    assert lost > 0.5 and (kept == 0).float().mean() < 0.01
    # the logits themselves have 11 bits: 2^-11 of the largest, over eight products
    assert (kept - wanted).abs().max() < 4e-3 * wanted.abs().max()
