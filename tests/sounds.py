"""Recordings made of tones, a small Whisper that reads them, and a table of their words."""

from __future__ import annotations

import json
import random
import wave
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import WhisperConfig, WhisperForConditionalGeneration

TONES = {"one": 300, "two": 500, "three": 800, "four": 1200, "five": 1700}


def write_wave(
    path: Path, whole: np.ndarray, *, rate: int, width: int = 2, channels: int = 1
) -> None:
    """`whole` in the numbers that a file of `width` bytes holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        unsigned = whole + (128 if width == 1 else 0)
        raw = unsigned.astype("<i4").view("u1").reshape(-1, 4)[:, :width]
        file.writeframes(raw.tobytes())


def write_recordings(folder: Path, *, count: int = 60) -> Path:
    """A table of recordings of one to four tones; every third has half the rate."""
    draw, noise, rows = random.Random(0), np.random.default_rng(0), []
    for number in range(count):
        words = [draw.choice(list(TONES)) for _ in range(draw.randint(1, 4))]
        rate = 8000 if number % 3 == 0 else 16000
        time = np.arange(int(rate * draw.uniform(0.1, 0.2))) / rate
        sound = np.concatenate([np.sin(2 * np.pi * TONES[word] * time) for word in words])
        sound = sound + noise.normal(0, 0.05, len(sound))
        write_wave(folder / f"clips/{number}.wav", (8000 * sound).astype(int), rate=rate)
        rows.append({"audio": f"clips/{number}.wav", "text": " ".join(words), "speaker": "sine"})
    path = folder / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_whisper(folder: Path, *, seed: int = 0) -> Path:
    """A Whisper of two layers, for 2 s of sound, with a tokenizer of its form."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f" {word}" for word in TONES], trainer)
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens(special)
    end, start, quiet = (int(tokenizer.token_to_id(each)) for each in special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[1]} {special[2]} $A {special[0]}",
        special_tokens=list(zip(special, (end, start, quiet))),
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": special[0], "pad_token": special[0]}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    torch.manual_seed(seed)
    sides = ("encoder", "decoder")
    config = WhisperConfig(
        vocab_size=quiet + 1,
        d_model=32,
        num_mel_bins=80,
        max_source_positions=100,
        max_target_positions=448,
        decoder_start_token_id=start,
        **{f"{side}_layers": 2 for side in sides},
        **{f"{side}_attention_heads": 2 for side in sides},
        **{f"{side}_ffn_dim": 64 for side in sides},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder
