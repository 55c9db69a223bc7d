"""Mistakes of whoever serves: found before anything is loaded, one message each."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
from served import NAME, serving, write_model

from shoal.config.serve import serve_settings
from shoal.errors import ConfigError, ModelError, UserError
from shoal.launch.pool import WorkerPool
from shoal.launch.serving import listen, open_service


@pytest.mark.parametrize(
    "given, words",
    [
        (["replicas=2"], "serve.replicas: unknown key"),
        (["replicas=2", "port=none"], "2 problems"),
        (["limits.stop_string=2"], "did you mean 'stop_strings'"),
        (["block_tokens=40"], "multiple of 32"),
        (["host=0.0.0.0"], "give `keys`"),
        (["replicate"], "expected key=value"),
        (["weights=int8", "precision=bfloat16"], "int8 goes with precision: float32"),
    ],
)
def test_settings_that_are_wrong_are_named(given: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        serve_settings(given)


def test_a_section_and_overrides_meet() -> None:
    found = serve_settings(["serve.port=1", "limits.answers=3"], tree={"port": 5, "threads": 2})
    assert (found.port, found.threads, found.limits.answers) == (1, 2, 3)


def test_a_folder_without_a_tokenizer_and_a_port_in_use(tmp_path: Path) -> None:
    folder = write_model(tmp_path / NAME)
    settings = serve_settings([])
    (folder / "tokenizer.json").rename(tmp_path / "away")
    with pytest.raises(ModelError, match="has no tokenizer"):
        open_service(folder, settings=settings)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be had"):
            listen(serve_settings([f"port={port}"]))


def test_keys_are_asked_for_and_a_model_without_template_says_so(
    pool: WorkerPool, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / NAME, template=None)
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret-1\nsecret-2\n")
    settings = serve_settings(["port=0", "threads=1", f"keys={keys}", "limits.body_bytes=2000"])
    for served in serving(folder, settings=settings, pool=pool):
        url = f"{served.url}/v1/models"
        for header in ({}, {"authorization": "Bearer secret"}):
            answer = httpx.get(url, headers=header)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        right = {"authorization": "Bearer secret-2"}
        assert httpx.get(url, headers=right).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200
        body = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}]}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=right)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "no_chat_template"

        def endless() -> object:
            for _ in range(10):
                yield b" " * 1000

        sent = httpx.post(f"{served.url}/v1/completions", content=endless(), headers=right)
        assert sent.status_code == 413


def test_a_replica_that_cannot_start_says_why(pool: WorkerPool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / NAME)
    settings = serve_settings(["port=0", "cache_bytes=100"])
    with pytest.raises(ModelError, match="give at least"):
        for _ in serving(folder, settings=settings, pool=pool):
            pass
    with pytest.raises(UserError, match="has no key"):
        (tmp_path / "empty").write_text("# nothing\n")
        open_service(folder, settings=serve_settings([f"keys={tmp_path / 'empty'}"]))
