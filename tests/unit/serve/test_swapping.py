"""Another model while one is served: begun answers stay those of the first, and none fails."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from served import NAME, Served, serving, write_model
from transformers import AutoModelForCausalLM

from shoal.config.serve import Limits, serve_settings
from shoal.launch import serving as launched
from shoal.launch.pool import WorkerPool
from shoal.serve.http.guard import Guard


def ask(url: str, number: int, *, tokens: int = 60, model: str = NAME) -> str:
    body = {
        "model": model,
        "prompt": f"The river {number}",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=200)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return str(choice["text"]) + str(choice["logprobs"]["token_logprobs"])


def write_adapter(folder: Path, model: Path) -> Path:
    """An adapter with random values in peft's format."""
    chosen = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"])
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), chosen)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    made.save_pretrained(str(folder))
    return folder


def swap(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/admin/swap", json=body, timeout=200)


def together(
    served: Served, numbers: range, swapped: dict[str, Any] | None
) -> tuple[dict[int, str], httpx.Response | None]:
    """Answers to requests at once; when they have begun, a swap; what it said."""
    found: dict[int, str] = {}

    def one(number: int) -> None:
        found[number] = ask(served.url, number)

    def made() -> int:
        return sum(each.get("made_tokens", 0) for each in served.fleet.states().values())

    before = made()
    threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
    for each in threads:
        each.start()
    told = None
    if swapped is not None:
        while made() < before + 2 * len(numbers):
            time.sleep(0.005)
        told = swap(served.url, **swapped)
    for each in threads:
        each.join()
    return found, told


def test_a_swap_fails_no_request_and_changes_no_answer(pool: WorkerPool, tmp_path: Path) -> None:
    first = write_model(tmp_path / "first")
    second = write_model(tmp_path / "second", seed=4)
    adapter = write_adapter(tmp_path / "adapter", second)
    settings = serve_settings(["port=0", "threads=1", f"name={NAME}"])
    for served in serving(first, settings=settings, pool=pool):
        old = {number: ask(served.url, number) for number in range(4)}
        found, told = together(served, range(4), {"model": str(second)})
        assert found == old, "an answer that was begun is finished by the model that began it"
        assert told is not None and told.json()["model"] == str(second)
        new = {number: ask(served.url, number) for number in range(4)}
        assert not set(new.values()) & set(old.values())
        assert len(served.fleet.workers()) == 1 and served.fleet.restarts == 0

        assert swap(served.url, adapters={"mine": str(adapter)}).status_code == 200
        assert ask(served.url, 0) == new[0] != ask(served.url, 0, model="mine")

        broken = write_model(tmp_path / "broken")
        (broken / "model.safetensors").write_bytes(b"\xff" * 100)
        for body, words in (
            ({"model": str(broken)}, "header cannot be read"),
            ({"model": str(tmp_path / "none")}, "expected a model folder"),
            ({"adapters": {"other": str(tmp_path / "none")}}, "none"),
        ):
            refused = swap(served.url, **body)
            assert refused.status_code == 400 and words in refused.text, refused.text
        assert ask(served.url, 0) == new[0] and ask(served.url, 0, model="mine") != new[0]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_replicas_roll_one_after_another(pool: WorkerPool, tmp_path: Path) -> None:
    first = write_model(tmp_path / "first")
    second = write_model(tmp_path / "second", seed=4)
    settings = serve_settings(["port=0", "threads=1", "replicate=2", f"name={NAME}"])
    for served in serving(first, settings=settings, pool=pool):
        old = {number: ask(served.url, number) for number in range(8)}
        found, _ = together(served, range(8), {"model": str(second)})
        assert found == old
        assert len(served.fleet.workers()) == 2
        new, _ = together(served, range(8), None)
        assert not set(new.values()) & set(old.values())


def test_what_does_not_fit_is_refused_before_it_is_loaded(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / NAME)
    monkeypatch.setattr(launched, "free_memory_bytes", lambda: 100 << 20)
    with pytest.raises(launched.UserError, match=r"would take .* are free here"):
        launched.open_service(folder, settings=serve_settings([]))


@pytest.mark.parametrize(
    "client, headers, status",
    [
        ("10.0.0.1", [], 403),
        ("127.0.0.1", [(b"x-forwarded-for", b"10.0.0.1")], 403),
        ("127.0.0.1", [], 204),
    ],
)
def test_only_this_machine_may_swap(client: str, headers: list[Any], status: int) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/admin/swap",
        "headers": headers,
        "client": (client, 1),
    }
    asyncio.run(Guard(app, keys=[], limits=Limits())(scope, receive, send))
    assert sent[0]["status"] == status
