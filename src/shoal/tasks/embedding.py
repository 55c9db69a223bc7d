"""Fine-tuning an encoder so that questions lie near the texts that answer them.

A sample is a question, its text and, where the data has it, a text that looks like the answer and
is none. A vector is the mean of the last layer's states over a text's tokens, with norm 1 (Reimers
and Gurevych, arXiv 1908.10084). The loss of a pair (InfoNCE, arXiv 1807.03748, both ways round as
in arXiv 2103.00020) is the cross entropy of the text among all texts of the step for its question,
and of the question among all questions for its text, by cosine over temperature.

All samples of a step are compared, whoever computes them: vectors are computed once without
gradients and summed over ranks; the loss's derivative by each vector is then known, and the second
forward of a micro batch needs no other sample (GradCache, arXiv 2101.06983, algorithm 1).
Shapes: B rows, T tokens, K = 3 texts of a row (question, text, negative), D hidden size, G rows of
a step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from shoal.errors import DataError
from shoal.fields import TOKENS, Field, Fields
from shoal.tasks.embedding_scores import Index, RetrievalMetrics, draw_retrieval
from shoal.tasks.task import (
    NO_TOOLS,
    Batch,
    Curve,
    Evaluated,
    Metrics,
    Named,
    Output,
    Record,
    Sample,
    Scores,
    Task,
    Tools,
    Vocabulary,
    token_specimens,
    was,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

QUERY, TEXT, NEGATIVE = 0, 1, 2
"""Documents of a row; one that a row lacks has the id 0."""

QUERY_FIELDS = ("query", "question", "anchor")
"""Where the question of a text is looked for, in this order."""

_TEXTS = 3
_HALF = 31  # bits of an id in each of its two numbers: files hold 32, with a sign
_CHARACTERS = 16  # of a token at most, but for few texts
_TITLE_COUNTS = 3  # times that BM25 counts a title's words


class Embedding(Task):
    """Vectors of texts, learned from pairs of a question and the text that answers it."""

    kind = "embedding"
    auto_class = "AutoModel"
    compares = True
    target_name = "pairs"
    curve = Curve("nats per pair")
    picture = "retrieval.png"

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._loss = Contrast(
            float(self.options.get("temperature", 0.05)), bool(self.options.get("symmetric", True))
        )
        self._index: Index | None = None

    @property
    def fields(self) -> Fields:
        """Rows of up to K documents, and an id of each (two numbers).

        For the scores: `words`, hashes of the text's words, and `asked` of those of the question.
        """
        return {
            **{name: field for name, field in TOKENS.items() if name != "labels"},
            "ids": Field("int64", (_TEXTS, 2)),
            "words": Field("int64", (None,), fill=-1, sequence="words"),
            "asked": Field("int64", (None,), fill=-1, sequence="asked"),
        }

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"negatives": bool}`. Raises DataError for data without pairs, or with a single text."""
        texts, pairs, negatives = set[int](), 0, False
        for record in records:
            texts.add(_id(_text(record)))
            pairs += _query(record) is not None
            negatives |= bool(record.get("negative"))
        if not pairs or len(texts) < 2:
            what = f"none of {len(texts):,} texts has a question" if texts else "no texts"
            raise DataError(
                "embedding: expected pairs of a question and its text, of two texts at least; got "
                f"{f'{pairs:,} questions of one and the same text' if pairs else what}\n    give "
                f"the column `text` another called {', '.join(QUERY_FIELDS)} beside it "
                "(data.text_field names the text, where it is called otherwise)"
            )
        self.settings = {"negatives": negatives}
        self.notes = [f"{pairs:,} pairs, {len(texts):,} texts"]
        return self.settings

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"query", "text"}`, with `title` and `negative` where there are any -> a row.

        A question is cut to `query_tokens`, texts share the rest of a row. A record without a
        question is a text to be found. Raises DataError for empty ones.
        """
        most, asked = tools.sequence_tokens or 1 << 20, self.options.get("query_tokens", 32)
        left = (most - asked) // (2 if self.settings.get("negatives") else 1)
        if left < 8:
            raise DataError(
                f"embedding: rows of {most} tokens leave {max(0, left)} to a text beside questions "
                f"of up to {asked}\n    set data.sequence_tokens higher, or task.query_tokens lower"
            )
        prefix = self.options.get("text_prefix", "")
        columns: tuple[tuple[str, int, list[str | None]], ...] = (
            (self.options.get("query_prefix", ""), asked, [_query(each) for each in records]),
            (prefix, left, [_text(each) for each in records]),
            (prefix, left, [_negative(each) for each in records]),
        )
        samples: list[Sample] = [
            {"input_ids": [], "position_ids": [], "document_ids": [], "ids": []} for _ in records
        ]
        for number, (before, limit, texts) in enumerate(columns):
            rows = _tokens(tools.tokenizer, texts, before=before, limit=limit)
            for sample, text in zip(samples, texts):
                ids = rows[text]
                sample["input_ids"] += ids
                sample["position_ids"] += range(len(ids))
                sample["document_ids"] += [number] * len(ids)
                whole = 0 if text is None else _id(text)
                sample["ids"].append([whole >> _HALF, whole % (1 << _HALF)])
        known: dict[tuple[str, str], list[int]] = {}
        for sample, record in zip(samples, records):
            key = _text(record), str(record.get("title") or "")
            if key not in known:
                known[key] = words_of(key[0]) + words_of(key[1]) * (_TITLE_COUNTS - 1)
            sample["words"], sample["asked"] = known[key], words_of(_query(record) or "")
        return samples

    def count(self, batch: Batch) -> int:
        """Pairs of a batch."""
        return int(_are_pairs(_ids(batch)).sum())

    def examined(self) -> Task:
        """transformers has no such loss: its model, and the loss of single texts in pairs."""
        return _Paired(self.settings, options=self.options)

    def seen(self, model: nn.Module, batch: Batch, *, step: int) -> dict[str, Tensor]:
        """`vectors` [B, K, D] float32, and `ids` [B, K] of the texts."""
        return {"vectors": self._vectors(model, batch, step=step), "ids": _ids(batch)}

    def compared(self, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`losses` [G], and their sum's derivative by every vector, `slopes` [G, K, D]."""
        return self._loss.slopes(seen["vectors"], seen["ids"])

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Vectors [B, K, D]; a batch that was compared with nothing is its own step."""
        given = {name: batch[name] for name in ("losses", "slopes") if name in batch}
        vectors = self._vectors(model, batch, step=step)
        return Output(vectors, {"ids": _ids(batch), **given}, self._loss)

    def _vectors(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        from shoal.models.anatomy import hidden_of

        rows = {name: each for name, each in batch.items() if name not in ("words", "asked")}
        return pooled(hidden_of(model, rows, step=step), batch["document_ids"], texts=_TEXTS)

    def metrics(self) -> Metrics:
        """Only on data: what is found depends on what there is."""
        raise NotImplementedError(f"{self.kind}: is scored on an index (metrics_on)")

    def metrics_on(self, data: Evaluated) -> RetrievalMetrics:
        """Each question is searched in all texts of its own source."""
        assert self.model_config is not None, "a worker has a model"
        width = int(self.model_config.hidden_size)
        return RetrievalMetrics(self._index_of(data), width=width, temperature=self._loss.heat)

    def _index_of(self, data: Evaluated) -> Index:
        if self._index is None:
            self._index = Index.of(data, identity=_ids)
        return self._index

    def baseline(self, data: Evaluated) -> Named:
        """What BM25 alone finds."""
        return self._index_of(data).found_by_words()

    def words(self, before: Named | None, after: Named) -> list[str]:
        """Right texts found, and how many questions can be answered where some have no answer."""
        names = [name.partition("/")[2] for name in after if name.startswith("recall_1/")]
        lines = []
        for name in names or [""]:
            end = f"/{name}" if name else ""
            lines.append(
                f"{name or 'questions'}: right text first {was(before, f'recall_1{end}', 3)}"
                f"{after[f'recall_1{end}']:.3f} now (encoder alone "
                f"{was(before, f'encoder_recall_1{end}', 3)}"
                f"{after[f'encoder_recall_1{end}']:.3f} now, BM25 alone "
                f"{after[f'bm25_recall_1{end}']:.3f}); among five "
                f"{was(before, f'recall_5{end}', 3)}{after[f'recall_5{end}']:.3f} now, BM25 alone "
                f"{after[f'bm25_recall_5{end}']:.3f}"
            )
        lines.append(
            "with every fifth of the right texts missing, and 9 of 10 answers to be right: "
            f"{was(before, 'coverage', 3)}{after['coverage']:.3f} of the questions that have one "
            f"are answered now, BM25 alone {after['bm25_coverage']:.3f}"
        )
        return lines

    def draw(self, shown: Mapping[str, Any], path: Path) -> None:
        """Of the questions, how many have the right text among the first k."""
        draw_retrieval(shown, path)


class _Paired(Embedding):
    """Single texts, neighbours in a batch being question and text: as transformers can be asked."""

    packs = True

    @property
    def fields(self) -> Fields:
        """Rows of tokens."""
        return {name: field for name, field in TOKENS.items() if name != "labels"}

    def specimens(self, config: Any) -> list[Sample]:
        """Texts of unequal length."""
        return token_specimens(config)

    def count(self, batch: Batch) -> int:
        """Two rows make a pair; one that is left over is none."""
        return len(batch["input_ids"]) // 2

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """As a user of sentence embeddings calls an encoder."""
        call = super().user_call({**batch, "labels": batch["input_ids"]})
        return {name: call[name] for name in ("input_ids", "attention_mask")}

    def user_losses(self, made: Any, batch: Batch, *, evaluated: bool = False) -> tuple[float, int]:
        """Mean over real tokens, norm 1, cross entropy both ways, as one writes it in torch."""
        import torch
        from torch.nn.functional import cross_entropy, normalize

        mask = (batch["document_ids"] >= 0).double()[:, :, None]
        states = made.last_hidden_state.double()
        vectors = normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        pairs = len(vectors) // 2
        scores = vectors[: 2 * pairs : 2] @ vectors[1 : 2 * pairs : 2].T / self._loss.heat
        found = cross_entropy(scores, torch.arange(pairs), reduction="sum")
        if self._loss.symmetric:
            back = cross_entropy(scores.T, torch.arange(pairs), reduction="sum")
            found = (found + back) / 2
        return float(found), pairs

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """States [B, T, D], so that each is compared; the loss of neighbours."""
        import torch

        from shoal.models.anatomy import hidden_of
        from shoal.tasks.losses import Summed

        def losses(hidden: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
            single = pooled(hidden, fields["document_ids"], texts=1)[:, 0]
            pairs = len(single) // 2
            vectors = single[: 2 * pairs].unflatten(0, (pairs, 2))
            ids = torch.arange(1, 2 * pairs + 1).view(pairs, 2)
            return self._loss.losses(vectors, ids)

        fields = {"document_ids": batch["document_ids"]}
        return Output(hidden_of(model, dict(batch), step=step), fields, Summed(losses))


def pooled(hidden: Tensor, documents: Tensor, *, texts: int) -> Tensor:
    """Means of states [B, T, D] over the tokens of each document 0 .. `texts`-1, with norm 1.

    [B, texts, D], float32 or wider; zeros for a document that a row lacks.
    """
    import torch
    from torch.nn.functional import normalize

    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    numbers = torch.arange(texts, device=documents.device)
    belongs = (documents[:, None, :] == numbers[:, None]).to(wide.dtype)
    return normalize((belongs @ wide) / belongs.sum(-1, keepdim=True).clamp(min=1), dim=-1)


@dataclass(frozen=True)
class Contrast:
    """The loss of pairs among all that are compared.

    Other texts that are known to answer a question (in any row with the same question) are no
    negatives of it, nor are the questions of the same text negatives of each other.
    """

    heat: float
    """What cosines are divided by: the temperature."""
    symmetric: bool

    def losses(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """The loss of each row [G] of vectors [G, K, D] with ids [G, K]; 0 of what is no pair."""
        import torch
        from torch.nn.functional import cross_entropy

        rows, own = len(ids), torch.arange(len(ids), device=ids.device)
        texts, of_texts = vectors[:, TEXT:].transpose(0, 1).flatten(0, 1), ids[:, TEXT:].T.flatten()
        real = _are_pairs(ids)
        # what answers a question: the text of any row that asks the same; [G, rows of texts]
        asks_same = (ids[:, QUERY, None] == ids[None, :, QUERY]) & real
        answers = asks_same.float() @ (ids[:, TEXT, None] == of_texts).float() > 0
        others = torch.arange(len(of_texts), device=ids.device) != own[:, None]
        barred = (answers | (of_texts == 0)) & others
        scores = vectors[:, QUERY] @ texts.T / self.heat
        found = cross_entropy(scores.masked_fill(barred, -torch.inf), own, reduction="none")
        if self.symmetric:
            barred = (answers[:, :rows].T | (ids[:, QUERY] == 0)) & others[:, :rows]
            back = scores[:, :rows].T.masked_fill(barred, -torch.inf)
            found = (found + cross_entropy(back, own, reduction="none")) / 2
        return found.where(real, 0.0)

    def slopes(self, vectors: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """`losses` [G], and `slopes` [G, K, D]: the derivative of their sum by each vector."""
        import torch

        with torch.enable_grad():
            free = vectors.detach().requires_grad_()
            losses = self.losses(free, ids)
            (slopes,) = torch.autograd.grad(losses.sum(), free)
        return {"losses": losses.detach(), "slopes": slopes}

    def total(self, output: Output, *, vocabulary: Vocabulary | None, scale: float) -> Tensor:
        """The sum over the rows' own losses, with the gradient of all losses by their vectors.

        A vector stands in the losses of other rows too; summed over all rows of a step those terms
        are counted once, where the vector is computed.
        """
        vectors, given = output.hidden, output.fields
        found = given if "slopes" in given else self.slopes(vectors, given["ids"])
        line = (vectors * found["slopes"]).sum()
        return line + (found["losses"].sum() - line.detach())

    def each(self, output: Output, *, vocabulary: Vocabulary | None, predict: bool) -> Scores:
        """No losses, which depend on all that there is to find: the vectors [B, K, D]."""
        return Scores(output.hidden.new_zeros(len(output.hidden)), output.hidden)


def _tokens(
    tokenizer: Any, texts: Iterable[str | None], *, before: str, limit: int
) -> dict[str | None, list[int]]:
    """Ids of each distinct text, cut to `limit` and with its special tokens; of none none."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    distinct = list(dict.fromkeys(text for text in texts if text is not None))
    most = limit * _CHARACTERS  # a text may be much longer than what is read of it
    found = tokenizer.encode_batch([(before + text)[:most] for text in distinct])
    ids: dict[str | None, list[int]] = {None: []}
    for text, one in zip(distinct, found):
        short = len(one.ids) < limit and len(before + text) > most
        ids[text] = list((tokenizer.encode(before + text) if short else one).ids)
    tokenizer.no_truncation()
    return ids


def words_of(text: str) -> list[int]:
    """Words without regard to case as numbers of 31 bits; of Chinese each two characters."""
    found: list[str] = []
    for word in re.findall(r"[\u3400-\u9fff]+|[^\W\u3400-\u9fff]+", text.casefold()):
        pairs = "\u3400" <= word[0] <= "\u9fff" and len(word) > 1
        found += [word[n : n + 2] for n in range(len(word) - 1)] if pairs else [word]
    return [xxhash.xxh3_64_intdigest(word.encode("utf-8", "replace")) >> 33 for word in found]


def _id(text: str) -> int:
    """62 bits that stand for a text; never 0."""
    return (xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) >> 2) or 1


def _ids(batch: Mapping[str, Any]) -> Any:
    """The ids of a row's texts, [B, K] of the two numbers that are stored."""
    ids = batch["ids"]
    if isinstance(ids, np.ndarray):  # as it lies in files
        ids = ids.astype(np.int64)
    return ids[..., 0] * (1 << _HALF) + ids[..., 1]


def _are_pairs(ids: Any) -> Any:
    return (ids[:, QUERY] != 0) & (ids[:, TEXT] != 0)


def _text(record: Record) -> str:
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        got = f"got keys {sorted(record)}" if not isinstance(text, str) else "it is empty"
        raise DataError(
            f"embedding: expected a text under 'text', {got}\n    name the column that holds the "
            "texts to be found (data.text_field), and remove lines without one"
        )
    title = str(record.get("title") or "")
    return text if text.startswith(title) else f"{title}\n{text}"


def _query(record: Record) -> str | None:
    """The question of a record; None where it has only a text."""
    name = next((name for name in QUERY_FIELDS if record.get(name) is not None), None)
    return None if name is None else _filled(record, name)


def _negative(record: Record) -> str | None:
    return None if record.get("negative") is None else _filled(record, "negative")


def _filled(record: Record, name: str) -> str:
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"embedding: expected a text under {name!r}, got {value!r} beside the text that begins "
            f"{str(record.get('text'))[:40]!r}\n    mend or remove that line; leave {name!r} out "
            "(null) where there is none"
        )
    return value
