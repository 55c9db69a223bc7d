"""Which tasks' rows may be cut along the sequence."""

from __future__ import annotations

from typing import Any

from shoal.tasks.causal_lm import CausalLM
from shoal.tasks.kinds import kind_of


def test_those_whose_loss_is_a_sum_over_tokens() -> None:
    able = ("causal-lm", "chat", "distillation")
    others = ("masked-lm", "preference", "sequence-classification", "embedding", "grpo")
    assert all(kind_of(kind).token_losses for kind in able)
    assert not any(kind_of(kind).token_losses for kind in others)


def test_another_loss_does_not_inherit_it() -> None:
    class Pooled(CausalLM):
        def output(self, *arguments: Any, **named: Any) -> Any:
            raise NotImplementedError

    class Renamed(CausalLM):
        target_name = "words"

    assert not Pooled.token_losses and Renamed.token_losses
