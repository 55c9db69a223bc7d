"""Tiny model folders that `shoal serve` serves: an encoder, a classifier of one word, of items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
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
    made.normalizer = normalizers.Lowercase()
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


def _words_alone(model: Any) -> None:
    """Take out all that mixes tokens or tells places apart: a token's state is that of its word."""
    with torch.no_grad():
        bert = getattr(model, "bert", model)
        bert.embeddings.position_embeddings.weight.zero_()
        for layer in bert.encoder.layer:
            for each in (layer.attention.output.dense, layer.output.dense):
                each.weight.zero_()
                each.bias.zero_()


def write_encoder(folder: Path) -> Path:
    """A BERT with random words: texts with the same words are near each other."""
    torch.manual_seed(0)
    model = BertModel(_config(_tokenizer(folder), initializer_range=1.0)).eval()
    _words_alone(model)
    model.save_pretrained(folder)
    return folder


def write_classifier(folder: Path) -> Path:
    """A BERT with random words whose head was fitted: what begins with `awful` is negative."""
    tokenizer = _tokenizer(folder)
    torch.manual_seed(0)
    names = {0: "negative", 1: "neutral"}
    config = _config(tokenizer, id2label=names, initializer_range=0.5)
    model = BertForSequenceClassification(config).eval()
    _words_alone(model)
    with torch.no_grad():
        firsts = torch.tensor([[tokenizer.encode(word).ids[0]] for word in ("awful", "fine")])
        states = torch.cat([model.bert(firsts).pooler_output, torch.ones(2, 1)], dim=1)
        fitted = torch.linalg.lstsq(states, 10 * torch.eye(2)).solution
        model.classifier.weight.copy_(fitted[:-1].T)
        model.classifier.bias.copy_(fitted[-1])
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
