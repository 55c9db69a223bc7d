"""Adapters chosen by request, beside peft's own model with the same adapter."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from shoal.errors import ModelError
from shoal.serve.certificate import answers
from shoal.serve.engine import Engine
from shoal.serve.request import Request, Sampling
from shoal.serve.runner import Runner
from unit.models.tiny_models import VOCABULARY, real_model


def write_adapter(folder: Path, *, seed: int, targets: list[str]) -> peft.PeftModel:
    """An adapter with random values in peft's format, and peft's model with it."""
    chosen = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets)
    made = peft.get_peft_model(real_model("llama"), chosen)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    made.save_pretrained(str(folder))
    return made.eval()  # type: ignore[no-any-return]


def test_each_request_gets_its_adapter_and_the_same_bits_in_company(tmp_path: Path) -> None:
    theirs = {
        "a": write_adapter(tmp_path / "a", seed=1, targets=["q_proj", "v_proj"]),
        "b": write_adapter(tmp_path / "b", seed=2, targets=["down_proj", "gate_proj"]),
        None: real_model("llama"),
    }
    folders = {name: str(tmp_path / name) for name in theirs if name is not None}
    runner = Runner(real_model("llama"), num_blocks=40, block_tokens=32, adapters=folders)
    prompt = tuple(7 * n % VOCABULARY for n in range(50))
    asked = [
        Request(
            id=f"{name}-{length}",
            prompt=prompt[:length],
            sampling=Sampling(max_tokens=6, temperature=0.0, logprobs=0),
            adapter=name,
        )
        for length in (50, 3)
        for name in theirs
    ]
    made = answers(Engine(runner), asked)
    for request in asked:
        alone = answers(Engine(runner), [request])
        assert alone[request.id] == made[request.id]
        tokens = [each.token for each in made[request.id]]
        whole = torch.tensor([[*request.prompt, *tokens]])
        with torch.no_grad():
            logits = theirs[request.adapter](input_ids=whole, use_cache=False).logits[0]
        rows = torch.log_softmax(logits, dim=-1)[len(request.prompt) - 1 : -1]
        found = torch.tensor([each.logprob for each in made[request.id]])
        # float32 sums in another order
        assert torch.allclose(found, rows[range(len(tokens)), tokens], atol=1e-5, rtol=0)
    firsts = {made[f"{name}-50"][0].logprob for name in theirs}
    assert len(firsts) == 3, "a prefix of one adapter is none of another's"


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", seed=1, targets=["q_proj"])
    with pytest.raises(ModelError, match="does not fit a layer of"):
        Runner(
            real_model("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=8),
            num_blocks=4,
            adapters={"a": str(tmp_path / "a")},
        )
