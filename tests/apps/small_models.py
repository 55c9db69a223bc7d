"""Tiny model folders that `shoal serve` serves: an encoder, a classifier of one word, of items."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

TEXTS = ["awful fine delayed flight bags lost border cells print page copies zebra slide"]


def _tokenizer(folder: Path) -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        TEXTS * 3, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
    )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return made


def _config(tokenizer: Tokenizer, **more: Any) -> BertConfig:
    return BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        **more,
    )


def write_encoder(folder: Path) -> Path:
    """A BERT with random weights."""
    torch.manual_seed(0)
    BertModel(_config(_tokenizer(folder))).eval().save_pretrained(folder)
    return folder


def write_classifier(folder: Path) -> Path:
    """A BERT with random weights whose head was fitted: a text with `awful` is negative."""
    tokenizer, draw = _tokenizer(folder), random.Random(0)
    torch.manual_seed(0)
    names = {0: "negative", 1: "neutral"}
    model = BertForSequenceClassification(_config(tokenizer, id2label=names)).eval()
    words, rows, labels = TEXTS[0].split()[2:], [], []
    for number in range(300):
        text = [("awful", "fine")[number % 2], *draw.sample(words, 4)]
        draw.shuffle(text)
        with torch.no_grad():
            ids = torch.tensor([tokenizer.encode(" ".join(text)).ids])
            rows.append(model.bert(ids).pooler_output[0])
        labels.append([1.0, 0.0] if number % 2 == 0 else [0.0, 1.0])
    inputs = torch.cat([torch.stack(rows), torch.ones(300, 1)], dim=1)
    fitted = torch.linalg.lstsq(inputs, torch.tensor(labels)).solution
    with torch.no_grad():
        model.classifier.weight.copy_(20 * fitted[:-1].T)
        model.classifier.bias.copy_(20 * fitted[-1])
    model.save_pretrained(folder)
    return folder


def write_items(folder: Path, items: Sequence[str]) -> Path:
    """A run of the recipe `recommend` as far as its files go, with random weights."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(items),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    GPTNeoXForCausalLM(config).eval().save_pretrained(folder / "model")
    listed = [{"item": item, "text": item} for item in items]
    (folder / "model" / "items.json").write_text(json.dumps(listed))
    return folder
