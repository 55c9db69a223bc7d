"""Scores of texts are those of sacrebleu and jiwer; spectrograms are those of transformers."""

from __future__ import annotations

import math
import random
from collections import Counter

import jiwer
import numpy as np
import pytest
import sacrebleu
import torch
from transformers import T5Config, T5ForConditionalGeneration, WhisperFeatureExtractor

from shoal.tasks.decoding import greedy
from shoal.tasks.mel import RATE, resampled, spectrogram
from shoal.tasks.speech_recognition import heard
from shoal.tasks.text_scores import CHRF_SUMS, Memory, chrf, chrf_sums, plain_words, word_errors
from tiny import tales

CHINESE = ["在「导航」中仍然可以看到隐藏区域的名称。", "选择格式 - 行。", "好", ""]


def worsened(text: str, draw: random.Random) -> str:
    words = [word for word in text.split() if draw.random() > 0.2]
    return " ".join(draw.choice((word, word[1:], "other")) for word in words)


def test_chrf_is_that_of_sacrebleu() -> None:
    draw = random.Random(0)
    references = [*tales(seed=1, documents=60), *CHINESE]
    written = [worsened(text, draw) for text in references[:-4]] + [
        "在导航中",
        "选择 - 列",
        "",
        "x",
    ]
    sums = sum((chrf_sums(a, b) for a, b in zip(written, references)), np.zeros(CHRF_SUMS))
    assert chrf(sums) == pytest.approx(sacrebleu.corpus_chrf(written, [references]).score, abs=1e-6)
    assert chrf(np.zeros(CHRF_SUMS)) == 0.0
    same = sum((chrf_sums(text, text) for text in references), np.zeros(CHRF_SUMS))
    assert chrf(same) == pytest.approx(100)


def test_word_errors_are_those_of_jiwer() -> None:
    draw = random.Random(0)
    references = [text for text in tales(seed=2, documents=60) if text]
    written = [worsened(text, draw) for text in references]
    errors = sum(word_errors(a.split(), b.split()) for a, b in zip(written, references))
    words = sum(len(text.split()) for text in references)
    assert errors / words == pytest.approx(jiwer.wer(references, written))
    assert plain_words("I'm sorry: 24, O’Neill!") == ["i'm", "sorry", "24", "o'neill"]


def test_the_nearest_text_has_the_largest_cosine() -> None:
    texts = [text for text in tales(seed=3, documents=80) if " " in text]
    memory = Memory(texts)

    def grams(text: str) -> Counter[str]:
        text = f" {text.lower()} \0\0\0"
        return Counter(text[at : at + 3] for at in range(len(text) - 2))

    seen = Counter(gram for text in texts for gram in grams(text))

    def vector(text: str) -> dict[str, float]:
        rare = {g: math.log((1 + len(texts)) / (1 + seen[g])) + 1 for g in grams(text)}
        return {gram: count * rare[gram] for gram, count in grams(text).items()}

    def cosine(a: dict[str, float], b: dict[str, float]) -> float:
        norms = [math.sqrt(sum(each**2 for each in side.values())) for side in (a, b)]
        return sum(value * b.get(gram, 0) for gram, value in a.items()) / math.prod(norms)

    for query in ("The clever fox counts apples", "a letter", "Nobody repairs the bridge"):
        scores = [cosine(vector(query), vector(text)) for text in texts]
        assert scores[memory.nearest(query)] == pytest.approx(max(scores))
    assert texts[memory.nearest(texts[5])] == texts[5]


@pytest.mark.parametrize("seconds", [30, 2])
@pytest.mark.parametrize("count", [200, 5000, 16001, 31000])
def test_spectrograms_are_those_of_transformers(count: int, seconds: int) -> None:
    """float32 there, float64 here: the log of a small power amplifies rounding to 1e-5 at most."""
    draw = np.random.default_rng(count)
    sound = (draw.normal(size=count) * np.sin(np.arange(count) / 300) / 5).astype(np.float32)
    extractor = WhisperFeatureExtractor(chunk_length=seconds)
    wanted = extractor(sound, sampling_rate=RATE, return_tensors="pt").input_features
    own = torch.from_numpy(spectrogram(sound, mels=80))[None]
    assert own.shape[-1] <= count // 160 + 3
    assert torch.allclose(heard(own, 100 * seconds), wanted, atol=2e-5)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 12345])
def test_another_rate_holds_the_same_tone(rate: int) -> None:
    """But for its first and last tenth of a second, where the tone begins and ends at once."""
    tone = lambda rate: np.sin(2 * np.pi * 440 * np.arange(rate) / rate)  # noqa: E731
    found = resampled(tone(rate).astype(np.float32), rate=rate)
    assert len(found) == RATE
    assert np.allclose(found[1600:-1600], tone(RATE)[1600:-1600], atol=1e-4)


def test_what_is_written_is_what_transformers_generates() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    ids, mask = torch.randint(2, 40, (6, 9)), torch.ones(6, 9, dtype=torch.long)
    mask[0, 5:] = mask[3, 2:] = 0
    begin = torch.zeros(6, 1, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = greedy(model, inputs, begin=begin, end=1, most=12)
    wanted = model.generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=1)[:, 1:]
    behind = (wanted == 1).cumsum(dim=1) > 0
    wanted = wanted.masked_fill(behind, -100)
    length = min(found.shape[1], wanted.shape[1])
    assert torch.equal(found[:, :length], wanted[:, :length]) and length > 2
    assert bool((found[:, length:] == -100).all() and (wanted[:, length:] == -100).all())
