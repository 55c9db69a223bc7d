"""A tiny model folder that speaks, and a server of a folder for as long as a test needs it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import uvicorn

from shoal.config.serve import ServeSection
from shoal.data.tokenize import train_tokenizer
from shoal.launch.pool import WorkerPool
from shoal.launch.serving import Fleet, listen, open_service
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.tasks.templates import PLAIN
from tiny import tales

NAME = "tiny"


def write_model(folder: Path, *, template: str | None = PLAIN, seed: int = 3) -> Path:
    """A llama of two layers with random weights, and a tokenizer of 300 tokens."""
    texts = tales(seed=1, documents=60)
    tokenizer = train_tokenizer([texts], vocabulary_size=300, cache_key="served")
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
    }
    config = read_config(architecture="llama", settings=settings, vocabulary_size=300)
    model = build_meta(config, auto_class="AutoModelForCausalLM")
    materialise(model, record=record(model), seed=seed).save_pretrained(folder)  # type: ignore[operator]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tokenizer / file).read_bytes())
    if template is not None:
        about = json.loads((folder / "tokenizer_config.json").read_text())
        about["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    fleet: Fleet
    folder: Path

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


def serving(folder: Path, *, settings: ServeSection, pool: WorkerPool) -> Iterator[Served]:
    """Serve `folder` until the caller goes on."""
    folder, _, make = open_service(folder, settings=settings)
    with listen(settings) as listening, Fleet(folder, settings, pool, say=print) as fleet:
        fleet.wait_ready()
        server = uvicorn.Server(
            uvicorn.Config(make(fleet), log_level="warning", access_log=False, lifespan="off")
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", fleet, folder)
        finally:
            server.should_exit = True
            thread.join(timeout=20)
