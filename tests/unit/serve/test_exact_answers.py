"""The engine beside the model's own forward, and each answer alone beside the same in company."""

from __future__ import annotations

import pytest
import torch

from shoal.serve.certificate import answers, certify
from shoal.serve.engine import Engine
from shoal.serve.request import Request, Sampling
from shoal.serve.runner import Runner
from unit.models.tiny_models import MIXTURES, SETTINGS, VOCABULARY, real_model

DECODERS = tuple(
    each for each in (*SETTINGS, *MIXTURES) if each not in ("bert", "roberta", "vit", "t5")
)


def runner_of(family: str, *, num_blocks: int = 40) -> Runner:
    return Runner(real_model(family), num_blocks=num_blocks, block_tokens=32)


@pytest.mark.quick(4)
@pytest.mark.parametrize("family", ("gemma2", "gpt2", "deepseek_v3", "mistral", *DECODERS))
def test_log_probabilities_are_those_of_the_models_own_forward(family: str) -> None:
    """Oracle: one forward of transformers' modules over the whole text, by torch's attention."""
    own = real_model(family)
    engine = Engine(runner_of(family), step_tokens=24)
    prompts = [tuple((7 * i + n) % VOCABULARY for i in range(n)) for n in (1, 9, 40)]
    settings = Sampling(max_tokens=8, temperature=0.0, logprobs=0)
    asked = [Request(id=str(len(p)), prompt=p, sampling=settings) for p in prompts]
    made = answers(engine, asked)
    for request in asked:
        tokens = [each.token for each in made[request.id]]
        whole = torch.tensor([[*request.prompt, *tokens]])
        with torch.no_grad():
            output = own(input_ids=whole, use_cache=False).logits[0].float()
        wanted = torch.log_softmax(output, dim=-1)[len(request.prompt) - 1 : -1]
        found = torch.tensor([each.logprob for each in made[request.id]])
        chosen = wanted[range(len(tokens)), tokens]
        # other orders of summation, in float32: some units in the last place of values near 4
        assert torch.allclose(found, chosen, atol=1e-5, rtol=0)
        assert torch.all(wanted.amax(dim=-1) - chosen < 1e-5), "not the likeliest"


@pytest.mark.quick(1)
@pytest.mark.parametrize("family", DECODERS)
def test_the_same_bits_alone_and_in_any_company(family: str) -> None:
    runner = runner_of(family)
    assert runner.exact, str(runner.report)
    found = certify(runner, name=family, num_requests=8, most_prompt=60, most_made=40)
    assert found.proven, str(found)
    by_name = {each.condition: each for each in found.found}
    assert by_name["preempted"].preemptions > 0
    assert by_name["prefixes found"].cached_tokens > 0
