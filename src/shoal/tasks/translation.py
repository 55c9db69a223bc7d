"""Translation: an encoder reads a text, a decoder writes it in another language. Score: chrF.

Shapes: B rows, S tokens of the source, T tokens of the target, L tokens written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.fields import IGNORED, Field, Fields
from shoal.tasks.pictures import write_table
from shoal.tasks.scores import Examples
from shoal.tasks.task import (
    NO_TOOLS,
    Batch,
    Curve,
    Evaluated,
    Named,
    Output,
    Record,
    Sample,
    Scores,
    Task,
    Tools,
    Vector,
    real_rows,
    token_specimens,
    was,
)
from shoal.tasks.text_scores import CHRF_SUMS, Memory, bytes_to_text, chrf, chrf_sums, text_to_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy
    from shoal.tasks.task import Vocabulary

_SHOWN = 6  # examples in the picture


class Translation(Task):
    """Cross entropy of the target's tokens, each after the source and the target before it.

    Two more figures tell whether the source is read at all: the loss of the same targets beside
    sources of other samples, and chrF of what the model writes by itself.
    """

    kind = "translation"
    auto_class = "AutoModelForSeq2SeqLM"
    writes_text = True
    target_name = "target tokens"
    curve = Curve("nats per token", baseline="shuffled_loss", baseline_name="with other sources")
    own_data = "YOUR.jsonl"
    picture = "translations.html"

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._sources: dict[tuple[int, int], Any] = {}
        """Of each scored sample, by its ids, the source of another: `metrics_on` fills it."""
        self._memory: tuple[Memory, list[Sample]] | None = None

    @property
    def fields(self) -> Fields:
        """`input_ids`, `attention_mask` [S] of the source, `labels` [T] of the target with its end.

        For the scores: the `reference` as bytes of UTF-8.
        """
        return {
            "input_ids": Field("int64", (None,), sequence="source"),
            "attention_mask": Field("uint8", (None,), sequence="source"),
            "labels": Field("int64", (None,), fill=IGNORED, sequence="target"),
            "reference": Field("uint8", (None,), sequence="reference"),
        }

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"end", "pad", "start": ids}` of special tokens. Raises DataError without an end."""
        if tools.end_token_id is None:
            raise DataError(
                "translation: the tokenizer has no token that ends a text (eos_token), so a model "
                "could not learn when to stop\n    use a tokenizer that names one in "
                "tokenizer_config.json, or data.tokenizer.kind=train"
            )
        total = sum(1 for record in records if _pair(record))
        pad = tools.tokenizer.token_to_id(tools.special_texts.get("pad_token", ""))
        pad = tools.end_token_id if pad is None else pad
        self.settings = {"end": tools.end_token_id, "pad": pad, "start": pad}
        self.settings["longest"] = tools.sequence_tokens or 128
        self.notes = [f"{total:,} pairs of texts"]
        return self.settings

    def named_by(self, config: Mapping[str, Any], *, scored: bool) -> dict[str, Any]:
        """A model that was trained before has a start of its own."""
        start = config.get("decoder_start_token_id")
        return {**self.settings, "start": self.settings["start"] if start is None else start}

    def model_settings(self) -> dict[str, Any]:
        """Special tokens."""
        return {
            "eos_token_id": self.settings["end"],
            "pad_token_id": self.settings["pad"],
            "decoder_start_token_id": self.settings["start"],
        }

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"source": str, "target": str}`, each cut to `sequence_tokens`, its end token last.

        Raises DataError for a record without them, or with an empty one.
        """
        pairs = [_pair(record) for record in records]
        prefix = self.options.get("prefix") or ""
        tools.tokenizer.no_padding()
        tools.tokenizer.no_truncation()
        most, end = tools.sequence_tokens, self.settings["end"]
        sources, targets = (
            [_closed(each.ids, end=end, most=most) for each in tools.tokenizer.encode_batch(texts)]
            for texts in ([prefix + a for a, _ in pairs], [b for _, b in pairs])
        )
        return [
            {
                "input_ids": source,
                "attention_mask": np.ones(len(source), dtype=np.uint8),
                "labels": target,
                "reference": text_to_bytes(text),
            }
            for source, target, (_, text) in zip(sources, targets, pairs)
        ]

    def specimens(self, config: Any) -> list[Sample]:
        """Sources and targets of other lengths."""
        found = [sample["input_ids"] for sample in token_specimens(config)]
        return [
            {
                "input_ids": source,
                "attention_mask": np.ones(len(source), dtype=np.uint8),
                "labels": target,
                "reference": np.ones(3, dtype=np.uint8),
            }
            for source, target in zip(found, [*found[1:], found[0]])
        ]

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """transformers makes the decoder's inputs of the labels."""
        mask = batch["attention_mask"].long()
        return {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": batch["labels"]}

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states of the decoder [B, T, D].

        Predictions are float64 [B, 1 + L]: the loss of the row beside another sample's source, and
        the tokens that the model writes.
        """
        import torch

        from shoal.models.anatomy import head_parameters, hidden_of, logits_of
        from shoal.tasks.decoding import Writing, decoder_inputs, greedy, padded
        from shoal.tasks.losses import TokenCrossEntropy

        shown = {**batch, "attention_mask": batch["attention_mask"].long()}
        shown["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
        head, parameters = logits_of(model), head_parameters(model)
        fields = {"labels": batch["labels"]}

        def write(vocabulary: Vocabulary | None) -> Tensor:
            others = {**shown, **self._others(batch)}
            loss = TokenCrossEntropy(head, parameters)
            elsewhere = Output(hidden_of(model, others), fields, loss)
            losses = elsewhere.each(vocabulary=vocabulary).losses.double().sum(dim=1, keepdim=True)
            begin = torch.full_like(batch["input_ids"][:, :1], self.settings["start"])
            most = int(self.settings["longest"])
            tokens = greedy(
                model,
                {name: shown[name] for name in ("input_ids", "attention_mask")},
                begin=begin,
                end=int(self.settings["end"]),
                most=most,
                vocabulary=vocabulary,
            )
            return torch.cat([losses, padded(tokens, length=most).double()], dim=1)

        hidden = hidden_of(model, shown, step=step, fields=self.fields)
        return Output(hidden, fields, Writing(head, parameters, write))

    def _others(self, batch: Batch) -> dict[str, Tensor]:
        """Sources of other samples in place of a batch's own."""
        import torch

        ids = zip(batch["source_ids"].tolist(), batch["sample_ids"].tolist())
        found = [self._sources.get(each, np.zeros(1, dtype=np.int64)) for each in ids]
        rows = [torch.as_tensor(np.asarray(each), dtype=torch.int64) for each in found]
        pad = torch.nn.utils.rnn.pad_sequence
        device = batch["input_ids"].device
        tokens = pad(rows, batch_first=True).to(device)
        mask = pad([torch.ones_like(each) for each in rows], batch_first=True).to(device)
        return {"input_ids": tokens, "attention_mask": mask}

    def metrics(self) -> TranslationMetrics:
        """A fresh accumulator."""
        return TranslationMetrics(self)

    def metrics_on(self, data: Evaluated) -> TranslationMetrics:
        """The same; each scored sample gets the source of the one half of the list away."""
        if not self._sources:
            rows = list(data.rows())
            half = len(rows) // 2
            for row, other in zip(rows, rows[half:] + rows[:half]):
                key = int(row["source_ids"]), int(row["sample_ids"])
                self._sources[key] = other["input_ids"]
        return TranslationMetrics(self, data)

    def text(self, ids: Iterable[Any]) -> str:
        """Of tokens; those that are no text, and -100, are left out."""
        real = [int(each) for each in ids if each >= 0]
        return str(self.tokenizer.decode(real, skip_special_tokens=True))

    def remembered(self, source: str, data: Evaluated) -> str:
        """The translation that belongs to the nearest source of the training part."""
        if self._memory is None:
            rows = list(data.training_rows())
            texts = [self.text(row["input_ids"]) for row in rows]
            self._memory = Memory(texts), rows
        memory, rows = self._memory
        return bytes_to_text(rows[memory.nearest(source)]["reference"])

    def baseline(self, data: Evaluated) -> Named:
        """chrF of copying the source, and of a translation memory: the nearest known pair's."""
        copied = memory = np.zeros(CHRF_SUMS)
        for row in data.rows():
            source, reference = self.text(row["input_ids"]), bytes_to_text(row["reference"])
            copied = copied + chrf_sums(source, reference)
            memory = memory + chrf_sums(self.remembered(source, data), reference)
        return {"copy_chrf": chrf(copied), "memory_chrf": chrf(memory)}

    def words(self, before: Named | None, after: Named) -> list[str]:
        """How much the source helps; chrF beside copying and the memory, and which wins."""
        loss, other = after["evaluation_loss"], after["shuffled_loss"]
        model, memory = after["chrf"], after["memory_chrf"]
        winner = "the model" if model > memory else "the translation memory"
        return [
            f"loss {loss:.3f} nats per token, {other:.3f} with sources of other samples: the "
            f"source takes off {100 * (1 - loss / other):.1f} %",
            f"chrF: {was(before, 'chrf', 1)}{model:.1f} now; translation memory {memory:.1f}, "
            f"copying the source {after['copy_chrf']:.1f}: {winner} is better",
        ]

    def draw(self, shown: Mapping[str, Any], path: Path) -> None:
        """A table of examples."""
        names = ("source", "reference", "the model", "translation memory")
        write_table([names, *shown["rows"]], path=path)


class TranslationMetrics:
    """Sums: loss, its targets, loss beside other sources, and those of chrF [3 + CHRF_SUMS]."""

    needs_predictions = True

    def __init__(self, task: Translation, data: Evaluated | None = None) -> None:
        self._task, self._data = task, data
        self._sums = np.zeros(3 + CHRF_SUMS)
        self._kept = Examples(_SHOWN)

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count losses [B, T] and predictions [B, 1 + L] (see `Translation.output`)."""
        assert scores.predictions is not None, "translations are scored by what is written"
        said = np.asarray(scores.predictions)
        for row in np.flatnonzero(real_rows(batch)):
            labels = np.asarray(batch["labels"][row])
            loss = float(scores.losses[row].double().sum())
            written = self._task.text(said[row, 1:])
            reference = bytes_to_text(np.asarray(batch["reference"][row]))
            self._sums[:3] += [loss, float((labels != IGNORED).sum()), float(said[row, 0])]
            self._sums[3:] += chrf_sums(written, reference)
            if self._kept.wants(batch, int(row)):
                tokens = np.asarray(batch["input_ids"][row])
                source = self._task.text(tokens[np.asarray(batch["attention_mask"][row]) > 0])
                self._kept.keep(batch, int(row), [source, reference, written])

    def vector(self) -> Vector:
        """All sums (see the class)."""
        return self._sums.copy()

    def result(self, vector: Vector | None = None) -> Named:
        """Mean losses per target, and chrF."""
        sums = self._sums if vector is None else vector
        targets = float(sums[1]) or math.nan
        return {
            "evaluation_loss": float(sums[0]) / targets,
            "shuffled_loss": float(sums[2]) / targets,
            "chrf": chrf(sums[3:]),
            "evaluation_targets": float(sums[1]),
        }

    @property
    def examples(self) -> Sequence[Sequence[Any]]:
        """The first ones: source, reference, what was written."""
        return self._kept.found

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Rows of a table, what the memory has for each source last."""
        rows = [list(example) for _, _, example in examples[:_SHOWN]]
        data = self._data
        return {"rows": [[*row, self._task.remembered(row[0], data)] for row in rows if data]}


def _pair(record: Record) -> tuple[str, str]:
    both = record.get("source"), record.get("target")
    if not all(isinstance(text, str) and text.strip() for text in both):
        raise DataError(
            "translation: expected a record with text under 'source' and 'target', got "
            + ", ".join(f"{name}: {str(value)[:40]!r}" for name, value in record.items())
            + "\n    name columns source and target, and remove pairs of which one is empty"
        )
    return str(both[0]), str(both[1])


def _closed(ids: Sequence[int], *, end: int, most: int | None) -> list[int]:
    """With its end token, cut to `most` tokens with it."""
    bare = list(ids[:-1]) if ids and ids[-1] == end else list(ids)
    return [*bare[: None if most is None else most - 1], end]
