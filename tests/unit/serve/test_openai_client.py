"""The server asked by OpenAI's own Python client, whose types are the oracle of the bodies."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import openai
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion
from served import NAME, Served

from shoal.serve.generate import end_tokens
from shoal.serve.reading import read_model

JSON = {"content-type": "application/json"}
TALK: list[Any] = [{"role": "user", "content": "The river hides the silver key."}]


def texts(answer: Completion) -> list[str]:
    return [each.text for each in answer.choices]


def test_the_model_is_listed_and_no_other_is_known(served: Served) -> None:
    client = served.client()
    assert [each.id for each in client.models.list()] == [NAME]
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="A")
    assert caught.value.code == "model_not_found" and NAME in str(caught.value)


def test_greedy_tokens_are_those_of_transformers(served: Served) -> None:
    model = read_model(served.folder, auto_class="AutoModelForCausalLM")
    client = served.client()
    answer = client.completions.create(
        model=NAME, prompt="The river", temperature=0, max_tokens=12, logprobs=1
    )
    url = f"{served.url}/tokenize"
    ids = httpx.post(url, json={"prompt": "The river"}).json()["tokens"]
    ends = end_tokens(served.folder, model.config)
    made = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )[0]
    told = httpx.post(f"{served.url}/detokenize", json={"tokens": made.tolist()}).json()["prompt"]
    assert "The river" + answer.choices[0].text == told.removesuffix("<|end|>")


def test_a_seed_gives_the_same_answer_and_streams_say_the_same(served: Served) -> None:
    client = served.client()
    how: Any = {"model": NAME, "messages": TALK, "max_tokens": 20, "seed": 5, "n": 3}
    first = client.chat.completions.create(**how)
    again = client.chat.completions.create(**how)
    assert isinstance(first, ChatCompletion)
    said = [each.message.content for each in first.choices]
    assert said == [each.message.content for each in again.choices]
    assert len(set(said)) == 3, "answers to one prompt differ by their index"
    pieces = ["", "", ""]
    finishes: list[Any] = [None] * 3
    usage = None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**how, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert pieces == said
    assert finishes == [each.finish_reason for each in first.choices]
    assert usage is not None and first.usage is not None
    assert usage.completion_tokens == first.usage.completion_tokens
    assert usage.prompt_tokens == first.usage.prompt_tokens


def test_without_a_seed_the_answer_names_the_one_that_repeats_it(served: Served) -> None:
    client = served.client()
    how: Any = {"model": NAME, "prompt": "My neighbour", "max_tokens": 16}
    first = client.completions.create(**how)
    assert first.system_fingerprint is not None
    seed = int(first.system_fingerprint.removeprefix("seed-"))
    assert texts(client.completions.create(**how, seed=seed)) == texts(first)


def test_prompts_come_as_texts_and_as_tokens(served: Served) -> None:
    client = served.client()
    prompts = ["Every child", "A small boat"]
    ids = [
        httpx.post(f"{served.url}/tokenize", json={"prompt": each}).json()["tokens"]
        for each in prompts
    ]
    how: Any = {"model": NAME, "max_tokens": 8, "temperature": 0}
    by_text = texts(client.completions.create(prompt=prompts, **how))
    assert texts(client.completions.create(prompt=ids, **how)) == by_text
    assert texts(client.completions.create(prompt=ids[1], **how)) == by_text[1:]


def test_scores_of_a_prompt_are_those_of_transformers(served: Served) -> None:
    """What lm-eval asks for: echo, logprobs, and one token more."""
    model = read_model(served.folder, auto_class="AutoModelForCausalLM")
    prompt = "An old clock paints a quiet street before sunrise."
    answer = served.client().completions.create(
        model=NAME, prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.tokens is not None
    ids = httpx.post(f"{served.url}/tokenize", json={"prompt": prompt}).json()["tokens"]
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    wanted = rows[range(len(ids) - 1), ids[1:]]
    assert found.token_logprobs[0] is None and len(found.tokens) == len(ids) + 1
    # float32 sums in another order
    assert torch.allclose(torch.tensor(found.token_logprobs[1:-1]), wanted, atol=1e-5, rtol=0)
    assert "".join(found.tokens[:-1]) == prompt
    assert answer.choices[0].text.startswith(prompt)


def test_a_stop_string_ends_an_answer_before_it(served: Served) -> None:
    client = served.client()
    how: Any = {"model": NAME, "prompt": "Our teacher", "max_tokens": 60, "seed": 11}
    whole = texts(client.completions.create(**how))[0]
    stop = whole[10:13]
    answer = client.completions.create(**how, stop=["never there", stop])
    assert texts(answer) == [whole[: whole.index(stop)]]
    assert answer.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**how, stop=stop, stream=True)
    assert "".join(each.choices[0].text for each in streamed) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("best_of", 2, "best_of is not supported"),
        ("temprature", 1, "did you mean 'temperature'"),
        ("temperature", 9, "less than or equal to 2"),
        ("n", 17, "n: 17 is more than 16"),
        ("max_tokens", 600, "the context is 512 tokens"),
        ("logit_bias", {"300": 1}, "is not a token"),
        ("stop", ["x"] * 9, "stop: 9 is more than 8"),
        ("prompt", [301], "token 301 is none of the model's 300"),
        ("stream_options", {"include_usage": True}, "goes with stream"),
    ],
)
def test_what_is_wrong_is_named(served: Served, field: str, value: Any, words: str) -> None:
    body = {"model": NAME, "prompt": "A", field: value}
    answer = httpx.post(f"{served.url}/v1/completions", json=body)
    told = answer.json()["error"]
    assert answer.status_code == 400 and words in told["message"]
    assert set(told) == {"message", "type", "param", "code"}
    assert told["param"] in (field, None if field == "stream_options" else field)


def test_bodies_that_are_none(served: Served) -> None:
    url = f"{served.url}/v1/completions"
    assert httpx.post(url, content=b"{", headers=JSON).json()["error"]["code"] == "invalid_json"
    large = httpx.post(url, content=b" " * (5 << 20))
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
    assert httpx.get(f"{served.url}/v2").status_code == 404
    assert httpx.get(url).json()["error"]["type"] == "invalid_request_error"


def test_a_client_that_goes_away_frees_its_blocks(served: Served) -> None:
    def used() -> int:
        states = [each for each in served.fleet.states().values() if each]
        return sum(each["running"] + each["waiting"] for each in states)

    client = served.client()
    stream = client.completions.create(
        model=NAME,
        prompt="The lamp keeper",
        max_tokens=500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert used() == 1
    stream.close()
    deadline = time.monotonic() + 20
    while used() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert used() == 0


def test_too_many_at_once_are_told_to_come_again(served: Served) -> None:
    router = served.fleet.router
    before = router._max_running
    router._max_running = 0
    answers: list[int] = []

    def ask() -> None:
        # so many tokens that the first is not done before the last has come
        body = {"model": NAME, "prompt": "A", "max_tokens": 400, "ignore_eos": True}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=240)
        answers.append(answer.status_code)
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"

    threads = [threading.Thread(target=ask) for _ in range(12)]
    try:
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        router._max_running = before
    assert sorted(set(answers)) == [200, 429] and answers.count(200) >= 8


def test_embeddings_in_both_encodings(served: Served) -> None:
    client = served.client()
    inputs = ["The clever fox", "A small boat repairs the long bridge"]
    plain = client.embeddings.create(model=NAME, input=inputs, encoding_format="float")
    coded = client.embeddings.create(model=NAME, input=inputs)  # base64, by the client's default
    model = read_model(served.folder, auto_class="AutoModelForCausalLM")
    for text, one, other in zip(inputs, plain.data, coded.data):
        ids = httpx.post(f"{served.url}/tokenize", json={"prompt": text}).json()["tokens"]
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        wanted = torch.nn.functional.normalize(hidden, dim=0)
        assert torch.allclose(torch.tensor(one.embedding), wanted, atol=1e-6)
        assert torch.allclose(torch.tensor(other.embedding), wanted, atol=1e-6)


def test_metrics_have_vllms_names(served: Served) -> None:
    served.client().completions.create(model=NAME, prompt="A", max_tokens=2, seed=1)
    text = httpx.get(f"{served.url}/metrics").text
    for name in (
        *("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:prompt_tokens_total"),
        *("vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_bucket"),
        *("vllm:request_success_total", "shoal:exact"),
    ):
        assert f"{name}{{" in text, name
    assert f'shoal:exact{{model_name="{NAME}"}} 1.0' in text
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert "products" in httpx.get(f"{served.url}/version").json()
