"""BERT learns to tag words, in a loop of your own; the six lines marked `# shoal` make it parallel.

    shoal run examples/own_loop.py FILE.conll --workers 2

FILE has a word and its tag on each line, and an empty line after each sentence. What you had
before stands behind each marked line; the losses are the same on any number of workers.
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForTokenClassification

import shoal  # shoal


def read(path):
    """Sentences as lists of (word, tag)."""
    with open(path, encoding="utf-8") as file:
        parts = file.read().strip().split("\n\n")
    return [[tuple(line.split()[:2]) for line in part.splitlines()] for part in parts]


def padded(rows, fill):
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def main(path, epochs=3):
    sentences = read(path)
    words = sorted({word for sentence in sentences for word, _ in sentence})
    tags = sorted({tag for sentence in sentences for _, tag in sentence})
    word_ids = {word: number for number, word in enumerate(words, start=1)}  # 0 is padding

    def collate(sentences):
        ids = padded([[word_ids[word] for word, _ in each] for each in sentences], 0)
        labels = padded([[tags.index(tag) for _, tag in each] for each in sentences], -100)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=len(tags),
        hidden_dropout_prob=0.0,  # torch's dropout differs from layout to layout
        attention_probs_dropout_prob=0.0,
    )
    model = BertForTokenClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(sentences, batch_size=16, shuffle=True, collate_fn=collate)
    means = []
    fleet = shoal.join()  # shoal
    model, optimizer = fleet.parallelize(model, optimizer)  # shoal
    for epoch in range(epochs):
        losses = []
        for batch in fleet.batches(loader):  # shoal, instead of: for batch in loader:
            optimizer.zero_grad()
            loss = model(**batch).loss
            fleet.backward(loss)  # shoal, instead of: loss.backward()
            loss = fleet.step().loss  # shoal, instead of: optimizer.step()
            losses.append(float(loss))
        means.append(sum(losses) / len(losses))
        print(f"epoch {epoch + 1}: mean loss {means[-1]:.6f}")
    return means


if __name__ == "__main__":
    main(*sys.argv[1:2])
