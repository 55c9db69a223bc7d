"""Continue a prompt with a Hugging Face folder: one request, no server."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from shoal.errors import ModelError, UserError
from shoal.serve.reading import model_directory, read_model

_TOP_K = 40
"""Tokens that `shoal generate` and `shoal chat` draw from."""

Told = Callable[[int], None]


class Writer(Protocol):
    """What goes on with token ids."""

    config: Any

    def write(
        self,
        ids: Sequence[int],
        *,
        tokens: int,
        temperature: float,
        seed: int,
        ends: Sequence[int],
        told: Told = lambda token: None,
    ) -> list[int]:
        """Ids after `ids`: drawn of the 40 likeliest, or the likeliest at temperature 0."""


def continue_prompt(
    path: Path,
    *,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    say: Callable[[str], None] = lambda phase: None,
) -> str:
    """At most `tokens` further tokens of text, to the model's end token.

    Sampled with `seed`, or the likeliest at temperature 0; `say` hears of each phase. Raises the
    errors of reading the folder, and UserError for a prompt that the model has no room for.
    """
    folder = model_directory(path)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder}: it has no tokenizer, so it reads no text and cannot go on with a prompt\n"
            "    give the folder of a language model"
        )
    say("importing torch and transformers")
    from shoal.data.tokenize import load_tokenizer

    tokenizer = load_tokenizer(folder)
    say(f"reading {folder}")
    writer = writer_of(folder)
    ids = tokenizer.encode(prompt).ids
    tokens = min(tokens, room(writer.config, taken=len(ids)))
    ends = end_tokens(folder, writer.config)
    say("generating")
    made = writer.write(ids, tokens=tokens, temperature=temperature, seed=seed, ends=ends)
    return str(tokenizer.decode(made, skip_special_tokens=True))


def writer_of(folder: Path) -> Writer:
    """The engine on a folder, or for a family it cannot serve transformers' own loop.

    Raises the errors of reading the folder.
    """
    from shoal.serve.runner import load

    model = load(folder)
    if getattr(model, "shoal_own_attention", False) or not _is_causal(model):
        del model
        return ByTransformers(read_model(folder, auto_class="AutoModelForCausalLM"))
    return ByEngine(model)


def _is_causal(model: Any) -> bool:
    """Whether a language model is only a decoder."""
    return not model.config.is_encoder_decoder


class ByEngine:
    """Shoal's engine with one request at a time."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self._model = model
        self._runner: Any = None

    def write(
        self,
        ids: Sequence[int],
        *,
        tokens: int,
        temperature: float,
        seed: int,
        ends: Sequence[int],
        told: Told = lambda token: None,
    ) -> list[int]:
        """See `Writer`."""
        from shoal.serve.cache import Cache
        from shoal.serve.engine import Engine
        from shoal.serve.request import Request, Sampling
        from shoal.serve.runner import Runner
        from shoal.serve.scheduler import blocks_for

        if self._runner is None:
            self._runner = Runner(self._model, num_blocks=2, release=True, large_pages=False)
        size = self._runner.cache.block_tokens
        self._runner.cache = Cache(blocks_for(len(ids) + tokens, size) + 1, size)
        engine = Engine(self._runner)
        sampling = Sampling(
            max_tokens=tokens,
            temperature=temperature,
            top_k=_TOP_K,
            seed=seed,
            stop_tokens=tuple(ends),
        )
        engine.submit(Request(id="only", prompt=tuple(ids), sampling=sampling))
        made: list[int] = []
        while not engine.idle:
            for event in engine.step():
                for each in event.tokens:
                    made.append(each.token)
                    told(each.token)
        return made


class ByTransformers:
    """transformers' `generate`, for families whose attention is code of their own."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self._model = model

    def write(
        self,
        ids: Sequence[int],
        *,
        tokens: int,
        temperature: float,
        seed: int,
        ends: Sequence[int],
        told: Told = lambda token: None,
    ) -> list[int]:
        """See `Writer`."""
        import torch

        sampling = {"do_sample": True, "temperature": temperature, "top_k": _TOP_K}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            output = self._model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=tokens,
                eos_token_id=list(ends) or None,
                pad_token_id=ends[0] if ends else None,
                use_cache=True,
                streamer=_Streamer(told),
                **(sampling if temperature > 0 else {"do_sample": False}),
            )
        return [int(each) for each in output[0, len(ids) :]]


class _Streamer:
    """What transformers' `generate` hands each token to: the prompt first."""

    def __init__(self, told: Told) -> None:
        self._told, self._prompted = told, False

    def put(self, value: Any) -> None:
        """The prompt, then each token."""
        if self._prompted:
            for token in value.reshape(-1).tolist():
                self._told(token)
        self._prompted = True

    def end(self) -> None:
        """Nothing is kept back."""


def room(config: Any, *, taken: int) -> int:
    """Tokens that a prompt leaves of the model's positions. Raises UserError for none."""
    if not taken:
        raise UserError("the prompt is empty: give some text to go on from")
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and taken >= positions:
        raise UserError(
            f"the prompt has {taken} tokens, and the model's positions end at {positions}; "
            "give a shorter one"
        )
    return positions - taken if isinstance(positions, int) else 1 << 30


def end_tokens(folder: Path, config: Any) -> list[int]:
    """Ids at which an answer ends: as generation_config.json says, else config.json."""
    found = getattr(config, "eos_token_id", None)
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            stated = json.loads(file.read_text(encoding="utf-8"))
            found = stated.get("eos_token_id", found)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"{file}: not the settings of a model: {error}") from None
    listed = found if isinstance(found, list) else [found]
    size = getattr(config, "vocab_size", 0)
    return [each for each in listed if type(each) is int and 0 <= each < size]
