import pytest
import torch
from tiny_models import SETTINGS, meta_model, real_model
from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.models.anatomy import canonical_parameters
from shoal.models.huggingface import fingerprint
from shoal.models.init import record
from shoal.models.piecewise import reading
from shoal.models.stored import Held


class Noting(Held):
    """Weights that note the largest piece asked for."""

    largest = 0

    def tensor(self, name: str, *, box=None) -> Tensor:
        found = super().tensor(name, box=box)
        Noting.largest = max(Noting.largest, found.numel())
        return found


def _weights(model: nn.Module) -> Noting:
    Noting.largest = 0
    return Noting({name: each.detach() for name, each in canonical_parameters(model).items()})


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("limit_bytes", [1 << 30, 20 * 3200], ids=["whole", "pieces"])
def test_a_model_without_its_weights_gives_its_logits(family: str, limit_bytes: int) -> None:
    whole, model = real_model(family), meta_model(family)
    with reading(model, _weights(whole), record=record(model), limit_bytes=limit_bytes):
        found = fingerprint(model)
    # products in parts: their sums are in another order, a few last places of float32
    assert found == pytest.approx(fingerprint(whole), rel=1e-4, abs=1e-5)
    assert 0 < Noting.largest <= limit_bytes // 20
    assert all(each.is_meta for each in model.parameters()), "nothing stays"


def test_experts_are_used_all_at_once() -> None:
    """transformers multiplies all experts of a block in one operation: 4 x (96 x 32) numbers."""
    whole, model = real_model("mixtral"), meta_model("mixtral")
    enough = 20 * 4 * 96 * 32
    with reading(model, _weights(whole), record=record(model), limit_bytes=enough):
        found = fingerprint(model)
    assert found == pytest.approx(fingerprint(whole), rel=1e-4, abs=1e-5)
    with (
        pytest.raises(ModelError, match=rf"gate_up_proj(?s:.)*use --memory-limit {enough}B"),
        reading(model, _weights(whole), record=record(model), limit_bytes=enough - 20),
    ):
        fingerprint(model)


def test_weights_that_are_too_large_are_named() -> None:
    whole, model = real_model("llama"), meta_model("llama")
    with (
        pytest.raises(
            ModelError, match=r"norm.weight: its 128 B are used.*(?s:.)*memory-limit 640B"
        ),
        reading(model, _weights(whole), record=record(model), limit_bytes=64),
    ):
        fingerprint(model)


def test_a_model_that_hides_its_weights_is_refused() -> None:
    """A weight that is no parameter of the model: nothing says where its values are."""
    whole, model = real_model("llama"), meta_model("llama")
    hidden = torch.ones(32, device="meta")
    model.model.norm.forward = lambda x: x * hidden
    with (
        pytest.raises(ModelError, match=r"cannot be run without its weights(?s:.)*without --mem"),
        reading(model, _weights(whole), record=record(model), limit_bytes=1 << 30),
    ):
        fingerprint(model)
