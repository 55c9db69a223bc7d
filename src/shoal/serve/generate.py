"""Continue a prompt with a Hugging Face folder: one request, no server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.errors import ModelError, nearest


def model_directory(path: Path) -> Path:
    """The model folder that `path` is, or holds (a run). Raises ModelError."""
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
            return folder
    names = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    hint = nearest(path.name, names) if not path.exists() else "a run gets one at its end"
    raise ModelError(f"{path}: expected a model folder (config.json and safetensors); {hint}")


def continue_prompt(path: Path, *, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """At most `tokens` further tokens of text; sampled with `seed`, or the likeliest at 0."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_directory(path)
    if not (folder / "tokenizer_config.json").is_file():
        raise ModelError(
            f"{folder}: it has no tokenizer, so it reads no text and cannot go on with a prompt\n"
            "    give the folder of a language model"
        )
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 40}
    output = model.generate(
        **inputs,
        max_new_tokens=tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    start = inputs["input_ids"].shape[1]
    return str(tokenizer.decode(output[0, start:], skip_special_tokens=True))
