"""Another engine behind our door: llama.cpp's own server, as processes of `shoal serve`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import APIStatusError, OpenAI
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.compress import gguf
from shoal.config.serve import serve_settings
from shoal.data.tokenize import train_tokenizer
from shoal.errors import ConfigError, UserError
from shoal.launch.other_engine import Children, command_for, gguf_file
from tiny import tales

SHIM = Path(__file__).parents[2] / "llama_server.py"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for `llama-server`."""
    pytest.importorskip("xllamacpp")
    file = tmp_path_factory.mktemp("engine") / "llama-server"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} {SHIM} "$@"\n')
    file.chmod(0o755)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GGUF file of a model with random weights."""
    words = train_tokenizer(
        [tales(seed=3, documents=200)], vocabulary_size=300, cache_key="gguf-files"
    )
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    made: Any = LlamaForCausalLM(config).eval()
    file = tmp_path_factory.mktemp("model") / "tiny.gguf"
    stored = gguf.encode(made, "f16", {})
    gguf.write(file, made, kind="f16", stored=stored, words=gguf.check(config, words), name="tiny")
    return file.parent


@contextmanager
def served(model: Path, program: Path, *words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`shoal serve` with the engine: its address, and the process."""
    start = "import sys; from shoal.cli.main import main; main(sys.argv[1:])"
    own = ("engine=llamacpp", f"program={program}", "port=0", "threads=1", "name=tiny")
    command = [sys.executable, "-c", start, "serve", str(model), *own, *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found is not None, line
            assert "not proved" in line
            yield found[0], process
        finally:
            process.terminate()
            process.wait(timeout=30)


def children_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes that it has started and that still run."""
    text = Path(f"/proc/{process.pid}/task")
    return [
        int(pid)
        for task in text.iterdir()
        for pid in (task / "children").read_text().split()
        if "llama_server" in Path(f"/proc/{pid}/cmdline").read_text()
    ]


def health(address: str) -> int:
    try:
        with urllib.request.urlopen(address.replace("/v1", "/health"), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_its_answers_pass_through_and_a_lost_server_is_started_again(
    model: Path, program: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    with served(model, program, "replicate=2", f"keys={keys}") as (address, process):
        client = OpenAI(base_url=address, api_key="a-key", max_retries=0)
        wanted = {"model": "tiny", "prompt": "The lamp keeper", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**wanted)
        assert whole.usage is not None and whole.usage.completion_tokens == 8
        pieces = client.completions.create(**wanted, stream=True)
        assert "".join(each.choices[0].text for each in pieces) == whole.choices[0].text
        with pytest.raises(APIStatusError, match="valid API key"):
            OpenAI(base_url=address, api_key="wrong", max_retries=0).models.list()
        request = urllib.request.Request(
            address.replace("/v1", "/slots"), headers={"Authorization": "Bearer a-key"}
        )
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request, timeout=5)
        first, second = children_of(process)
        os.kill(first, signal.SIGKILL)
        for _ in range(10):
            assert client.completions.create(**wanted).choices[0].text == whole.choices[0].text
        deadline = time.monotonic() + 60
        while len(set(children_of(process)) - {first}) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert set(children_of(process)) - {first, second}, "another in its place"
        assert health(address) == 200
        metrics = urllib.request.Request(
            address.replace("/v1", "/metrics"), headers={"Authorization": "Bearer a-key"}
        )
        with urllib.request.urlopen(metrics, timeout=5) as answer:
            counts = re.findall(
                r'passed_requests_total\{server="\d"\} (\d+)', answer.read().decode()
            )
        assert sum(map(int, counts)) >= 12
        process.terminate()
        assert process.wait(timeout=30) in (0, -signal.SIGTERM), "it ends in order"
    with served(model, program) as (_, process):
        (second,) = children_of(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{second}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{second}").exists(), "it does not outlive us"


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "llama-server"
    broken.write_text("#!/bin/sh\necho no such tensor >&2\nexit 3\n")
    broken.chmod(0o755)
    said: list[str] = []
    with Children(lambda port: [str(broken)], count=1, say=said.append) as servers:
        with pytest.raises(
            Exception, match=r"server 0 of the engine ended \(status 3\)(.|\n)*no such tensor"
        ):
            servers.wait_ready()
        assert servers.addresses() == {}
    assert "it is given up" in said[-1]


def test_what_is_wrong_is_said_before_anything_starts(
    model: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="engine llamacpp takes no weights"):
        serve_settings(["engine=llamacpp", "weights=int8"])
    with pytest.raises(ConfigError, match=r"takes no limits.answers"):
        serve_settings(["engine=vllm", "limits.answers=2"])
    with pytest.raises(ConfigError, match="program is of another engine"):
        serve_settings(["program=/bin/true"])
    monkeypatch.setenv("PATH", str(tmp_path))
    for engine, needs in (("vllm", "pip install vllm"), ("llamacpp", "llama-server")):
        with pytest.raises(UserError, match=needs):
            command_for(serve_settings([f"engine={engine}"]), model, replicas=1)
    own = serve_settings(["engine=llamacpp", f"program={program}", "arguments=[--ctx-size, '64']"])
    command = command_for(own, model, replicas=2)(1234)
    assert command[0] == str(program) and command[-2:] == ["--ctx-size", "64"]
    assert command[command.index("--port") + 1] == "1234"
    with pytest.raises(UserError, match="one GGUF file, and it has none"):
        gguf_file(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match=r"it has a\.gguf, b\.gguf"):
        gguf_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    (tmp_path / "model.safetensors").touch()
    vllm = serve_settings(["engine=vllm", f"program={program}"])
    assert command_for(vllm, tmp_path, replicas=1)(80)[:3] == [str(program), "serve", str(tmp_path)]
    with pytest.raises(UserError, match="vLLM decides that itself"):
        command_for(
            serve_settings(["engine=vllm", f"program={program}", "threads=2"]), tmp_path, replicas=1
        )
