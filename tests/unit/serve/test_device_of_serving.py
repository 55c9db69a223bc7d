"""Serving on a device that is not the CPU: every tensor is made there (checked without one)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from served import NAME, write_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from shoal.config.serve import serve_settings
from shoal.errors import UserError
from shoal.launch.certifying import certify_folder
from shoal.launch.serving import open_service
from shoal.serve.cache import Span
from shoal.serve.int8 import cannot_multiply
from shoal.serve.part import Part
from shoal.serve.replica import _room
from shoal.serve.runner import Runner, log_probabilities, made_on
from unit.models.tiny_models import real_model

CUDA = torch.device("cuda", 0)
THERE = torch.device("meta")
"""Tensors without values."""


_ANSWERS = tuple(
    getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "item", "is_nonzero")
)
"""How a tensor's value is asked for, the last two in inference mode."""


class _OneDevice(TorchDispatchMode):
    """An operation of tensors on two devices is an error, as CUDA's are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, _ = tree_flatten((args, kwargs or {}))
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        devices = {each.device for each in tensors if each.dim()}  # a single number may differ
        if len(devices) > 1 and func is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{func}: not on the same device: {devices}")
        if func in _ANSWERS:  # "is no row packed?"
            return True
        return func(*args, **(kwargs or {}))


def moved(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Part]:
    """A model that was looked at while it had values, and what was seen."""
    model, part = real_model(family), Part()
    part.cut(model)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # not known of THERE
    return model.to(THERE), part


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_every_tensor_of_a_step_is_made_on_the_models_device(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, part = moved(family, monkeypatch)
    with _OneDevice():
        runner = Runner(model, num_blocks=9, block_tokens=32, exact=False, part=part)
        spans = [Span(0, 5, (1,)), Span(40, 1, (2, 3)), Span(3, 1, (4,))]
        for _ in range(2):
            hidden = runner.hidden([1, 2, 3, 4, 5, 6, 7], spans, [4, 5, 6], adapters=[None] * 3)
        logits = log_probabilities(runner.logits(hidden))
    assert hidden.device == THERE and logits.device == THERE
    assert all(each.device == THERE for each in runner.cache.keys.values())


def test_the_check_sees_a_tensor_on_the_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would show nothing."""
    model, part = moved("llama", monkeypatch)
    with _OneDevice():
        runner = Runner(model, num_blocks=9, block_tokens=32, exact=False, part=part)
        runner.device = torch.device("cpu")
        with pytest.raises(RuntimeError, match="not on the same device"):
            runner.hidden([1, 2], [Span(0, 2, (1,))], [1], adapters=[None])


def test_on_the_cpu_nothing_is_said_of_devices() -> None:
    with made_on(torch.device("cpu")):
        assert torch.zeros(1).is_cpu


def test_products_of_8_bits_are_for_cpus() -> None:
    assert "which are for CPUs, and this is cuda" in (cannot_multiply(CUDA) or "")


def test_a_model_that_the_device_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / NAME)
    payload = {"folder": str(folder), "precision": "float32", "tensor": 1, "cache_bytes": None}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 34))
    with pytest.raises(UserError, match=r"it would take .* of cuda:0, which has 1.0 MiB free"):
        _room(payload, CUDA)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 36, 1 << 36))
    assert 1 << 34 < _room(payload, CUDA) < 1 << 35
    with pytest.raises(UserError, match="one replica on several devices is not built"):
        _room({**payload, "tensor": 2}, CUDA)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    folder = write_model(tmp_path / NAME)
    settings = serve_settings(["device=cuda"])
    with pytest.raises(UserError, match=r"serve\.device: expected a CUDA device, found none"):
        open_service(folder, settings=settings)
    with pytest.raises(UserError, match=r"use serve\.device=cpu"):
        certify_folder(folder, settings=settings, num_requests=1, say=lambda line: None)
