"""Continue a prompt with a Hugging Face folder: one request, no server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import ModelError, UserError
from shoal.serve.reading import model_directory, read_model


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
    model = read_model(folder, auto_class="AutoModelForCausalLM")
    ids = tokenizer.encode(prompt).ids
    tokens = min(tokens, room(model.config, taken=len(ids)))
    ends = end_tokens(folder, model.config)
    say("generating")
    made = generated(model, ids=ids, tokens=tokens, temperature=temperature, seed=seed, ends=ends)
    return str(tokenizer.decode(made, skip_special_tokens=True))


def generated(
    model: Any,
    *,
    ids: list[int],
    tokens: int,
    temperature: float,
    seed: int,
    ends: list[int],
    streamer: Any = None,
) -> list[int]:
    """Ids after `ids`: sampled of the 40 likeliest, or the likeliest at temperature 0."""
    import torch

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 40}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else None,
            use_cache=True,
            streamer=streamer,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
    return [int(each) for each in output[0, len(ids) :]]


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
