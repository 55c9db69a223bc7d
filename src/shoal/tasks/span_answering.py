"""Finding the answer to a question in a text: its first and its last token (SQuAD).

Shapes: B rows, T tokens, C bytes of a text.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.fields import IGNORED, TOKENS, Field, Fields
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

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

LONGEST_ANSWER = 30
"""Tokens of an answer at most, as in the examples of BERT and transformers."""

_BETWEEN = "\x1f"
"""Between answers in a row of bytes."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")


class SpanAnswering(Task):
    """Two targets per question: where its answer begins in the text, and where it ends.

    A row is question and text as the tokenizer joins a pair, the text cut to fit. A question whose
    answer was cut off has no target, and counts as missed. One without an answer has the row's
    first token as both targets, as in SQuAD 2.0.
    """

    kind = "span-answering"
    auto_class = "AutoModelForQuestionAnswering"
    runs_once = True
    target_name = "ends of answers"
    curve = Curve("nats per end", baseline="uniform_loss", baseline_name="any token")
    own_data = "YOUR.json"

    @property
    def fields(self) -> Fields:
        """A row of tokens; `labels` [2], the first and the last token of the answer.

        For the scores: `context` [C], the text as bytes of UTF-8; `places` [2, T], where each of
        its tokens begins and ends there (both 0: a token of the question, or special); `answers`,
        all right answers. `token_type_ids` [T] where the tokenizer tells question and text apart.
        """
        typed = {"token_type_ids": Field("int64", (None,), sequence="tokens")}
        return {
            **{name: field for name, field in TOKENS.items() if name != "labels"},
            **(typed if self.settings.get("typed") else {}),
            "places": Field("int32", (2, None), sequence="tokens"),
            "labels": Field("int64", (2,), fill=IGNORED),
            "context": Field("uint8", (None,), sequence="context"),
            "answers": Field("uint8", (None,), sequence="answers"),
        }

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"typed": bool, "open": bool}`: kinds of tokens, and whether answers may be missing."""
        pair = tools.tokenizer.encode("a", "b")
        missing = total = 0
        for record in records:
            total += 1
            missing += not _answers(record)[0]
        self.settings = {"typed": any(pair.type_ids), "open": missing > 0}
        none = f", {missing:,} of them without an answer" if missing else ""
        self.notes = [f"{total:,} questions{none}"]
        return self.settings

    def model_settings(self) -> dict[str, Any]:
        """Two outputs for each token."""
        return {"num_labels": 2}

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"question": str, "text": str, "answers": {"text": [...], "answer_start": [...]}}`.

        Raises DataError for an answer that does not stand where it is said to.
        """
        tokenizer = tools.tokenizer
        tokenizer.no_padding()
        if tools.sequence_tokens is not None:
            tokenizer.enable_truncation(tools.sequence_tokens, strategy="only_second")
        samples = []
        for record in records:
            question, context = _text(record, "question"), _text(record, "text")
            try:
                encoding = tokenizer.encode(question, context)
            except Exception as error:  # the Rust side raises plain Exception
                raise DataError(
                    f"span-answering: the question {question[:60]!r} alone fills a row of "
                    f"{tools.sequence_tokens} tokens ({error})\n    set data.sequence_tokens higher"
                ) from error
            samples.append(self._sample(record, context=context, encoding=encoding))
        tokenizer.no_truncation()
        return samples

    def _sample(self, record: Record, *, context: str, encoding: Any) -> Sample:
        texts, starts = _answers(record)
        for text, start in zip(texts, starts):
            if context[start : start + len(text)] != text:
                raise DataError(
                    f"span-answering: the answer {text[:40]!r} does not stand at character {start} "
                    f"of its text, which has {context[start : start + 40]!r} there\n    count "
                    "characters from 0, in the text as it is"
                )
        of_text = [number == 1 for number in encoding.sequence_ids]
        edges = np.array([e if own else (0, 0) for e, own in zip(encoding.offsets, of_text)])
        if texts:
            first, last = _tokens(edges, start=starts[0], stop=starts[0] + len(texts[0]))
        else:
            first = last = 0
        # characters become bytes: what is stored is UTF-8
        lengths = np.cumsum([0, *(len(each.encode("utf-8", "replace")) for each in context)])
        typed = {"token_type_ids": list(encoding.type_ids)} if self.settings["typed"] else {}
        return {
            "input_ids": list(encoding.ids),
            **typed,
            "places": lengths[edges].T,
            "labels": [first, last],
            "context": _bytes(context),
            "answers": _bytes(_BETWEEN.join(texts) or _BETWEEN),
        }

    def specimens(self, config: Any) -> list[Sample]:
        """Rows without padding, which transformers counts among the places of an answer."""
        samples = token_specimens(config)
        length = min(8, *(len(sample["input_ids"]) for sample in samples))
        for number, sample in enumerate(samples):
            sample["input_ids"] = sample["input_ids"][:length]
            sample["labels"] = [number % length, (number + 2) % length]
            sample["places"] = np.stack([np.arange(length), np.arange(length) + 1])
            sample["context"] = sample["answers"] = _bytes("a" * length)
            if self.settings.get("typed"):
                sample["token_type_ids"] = np.arange(length) // (length - length // 2)
        return samples

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """The two targets under transformers' names."""
        call = super().user_call(batch)
        first, last = call.pop("labels").unbind(dim=1)
        typed = {"token_type_ids": batch["token_type_ids"]} if "token_type_ids" in batch else {}
        return {**call, **typed, "start_positions": first, "end_positions": last}

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Logits of both ends [B, T, 2] and where they are [B, 2]."""
        from shoal.models.anatomy import hidden_of, logits_of
        from shoal.tasks.losses import Summed

        head, nullable = logits_of(model), bool(self.settings.get("open"))
        return Output(
            hidden=hidden_of(model, dict(batch), step=step, fields=self.fields),
            fields={
                "labels": batch["labels"],
                "is_real": batch["document_ids"] >= 0,
                "is_text": batch["places"][:, 1] > batch["places"][:, 0],
            },
            loss=Summed(
                lambda hidden, fields: _losses(head(hidden), fields),
                guess=lambda hidden, fields: best_spans(
                    head(hidden), is_text=fields["is_text"], nullable=nullable
                ),
            ),
        )

    def metrics(self) -> SpanMetrics:
        """A fresh accumulator."""
        return SpanMetrics()

    def baseline(self, data: Evaluated) -> Named:
        """`uniform_loss`: nats of any token of the row; `first_f1`: the text's first words."""
        losses, f1 = [], []
        for row in data.rows():
            losses += [math.log(len(row["input_ids"]))] * int(row["labels"][0] != IGNORED)
            words = _string(row["context"]).split()[:_FIRST_WORDS]
            f1.append(best(word_f1, " ".join(words), answers_of(row["answers"])))
        return {
            "uniform_loss": float(np.mean(losses or [math.nan])),
            "first_f1": float(np.mean(f1)),
        }

    def words(self, before: Named | None, after: Named) -> list[str]:
        """Exact match and F1 before and after, beside answering with the text's first words."""
        return [
            f"answers: F1 {was(before, 'f1', 3)}{after['f1']:.3f} now, exact match "
            f"{was(before, 'exact_match', 3)}{after['exact_match']:.3f} now; the first "
            f"{_FIRST_WORDS} words of the text for every answer: F1 {after['first_f1']:.3f}"
        ]


_FIRST_WORDS = 3


class SpanMetrics:
    """Sums over questions: loss, targets, exact matches, F1, questions."""

    needs_predictions = True

    def __init__(self) -> None:
        self._sums = np.zeros(5)

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count losses [B, 2] and the answers that predictions [B, 2] stand for."""
        assert scores.predictions is not None, "answers are scored by the predictions"
        rows = real_rows(batch)
        labels = np.asarray(batch["labels"])[rows]
        targets = float((labels != IGNORED).sum())
        self._sums[:2] += [float(np.asarray(scores.losses.double())[rows].sum()), targets]
        for row in np.flatnonzero(rows):
            first, last = (int(each) for each in scores.predictions[row])
            places, context = np.asarray(batch["places"][row]), np.asarray(batch["context"][row])
            said = _string(context[places[0, first] : places[1, last]])
            right = answers_of(np.asarray(batch["answers"][row]))
            self._sums[2:] += [best(is_same, said, right), best(word_f1, said, right), 1]

    def vector(self) -> Vector:
        """All sums (see the class)."""
        return self._sums.copy()

    def result(self, vector: Vector | None = None) -> Named:
        """The mean loss per target; exact match and F1 as SQuAD has them, 0 to 1."""
        loss, targets, exact, f1, questions = (
            float(each) for each in (self._sums if vector is None else vector)
        )
        return {
            "evaluation_loss": loss / targets if targets else math.nan,
            "exact_match": exact / questions if questions else math.nan,
            "f1": f1 / questions if questions else math.nan,
            "evaluation_targets": targets,
        }


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and doubled blanks: SQuAD's own evaluation."""
    text = "".join(each for each in text.lower() if each not in set(string.punctuation))
    return " ".join(_ARTICLES.sub(" ", text).split())


def is_same(said: str, right: str) -> float:
    """1 for the same answer, else 0."""
    return float(normalized(said) == normalized(right))


def word_f1(said: str, right: str) -> float:
    """F1 over words; of no answer 1 where there is none, else 0."""
    mine, theirs = normalized(said).split(), normalized(right).split()
    if not mine or not theirs:
        return float(mine == theirs)
    common = (Counter(mine) & Counter(theirs)).total()
    return 2 * common / (len(mine) + len(theirs))


def best(score: Any, said: str, right: Sequence[str]) -> float:
    """The best score over all right answers."""
    return max(score(said, each) for each in right)


def best_spans(logits: Tensor, *, is_text: Tensor, nullable: bool) -> Tensor:
    """The likeliest first and last token [B, 2] of logits [B, T, 2], both in the text [B, T].

    At most `LONGEST_ANSWER` tokens. `nullable`: token 0 for both where that is likelier.
    """
    import torch

    starts, ends = logits.float().masked_fill(~is_text[..., None], -torch.inf).unbind(dim=-1)
    size = starts.shape[1]
    allowed = torch.ones(size, size, dtype=torch.bool, device=logits.device)
    allowed = allowed.triu() & ~allowed.triu(LONGEST_ANSWER)
    both = (starts[:, :, None] + ends[:, None, :]).masked_fill(~allowed, -torch.inf)
    found, index = both.flatten(1).max(dim=1)
    spans = torch.stack([index // size, index % size], dim=1)
    nothing = found == -torch.inf
    if nullable:
        nothing |= logits[:, 0].float().sum(dim=-1) > found
    return spans.masked_fill(nothing[:, None], 0)


def _losses(logits: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy over the tokens of each row, of first and last token: [B, 2]."""
    import torch
    from torch.nn.functional import cross_entropy

    seen = fields["is_real"]
    if not bool(seen.any(dim=1).all()):  # rows that only fill a batch: any finite number will do
        seen = seen | ~seen.any(dim=1, keepdim=True)
    logits = logits.masked_fill(~seen[..., None], -torch.inf)
    return cross_entropy(logits, fields["labels"], ignore_index=IGNORED, reduction="none")


def _tokens(edges: Any, *, start: int, stop: int) -> tuple[int, int]:
    """The tokens that hold the characters `start` to `stop`; no target where one was cut off."""
    holds = np.flatnonzero((edges[:, 1] > start) & (edges[:, 0] < stop) & (edges[:, 1] > 0))
    if not len(holds) or edges[holds[-1], 1] < stop:
        return IGNORED, IGNORED
    return int(holds[0]), int(holds[-1])


def _bytes(text: str) -> Any:
    return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)


def _string(values: Any) -> str:
    return bytes(np.asarray(values)).rstrip(b"\0").decode("utf-8", "replace")


def answers_of(values: Any) -> list[str]:
    """The right answers in a row of bytes; [""] where there is none."""
    return [each for each in _string(values).split(_BETWEEN) if each] or [""]


def _text(record: Record, name: str) -> str:
    text = record.get(name)
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"span-answering: expected text under {name!r}, got "
            f"{'nothing' if text is None else repr(text)[:40]} in a record with "
            f"{', '.join(sorted(record))}\n    records have `question`, `context` and `answers`, "
            "as those of SQuAD"
        )
    return text


def _answers(record: Record) -> tuple[list[str], list[int]]:
    """The right answers, and the character where each begins."""
    given = record.get("answers")
    if isinstance(given, list):  # SQuAD's file: an object for each answer
        given = {
            "text": [each.get("text") for each in given if isinstance(each, dict)],
            "answer_start": [each.get("answer_start") for each in given if isinstance(each, dict)],
        }
    texts, starts = (
        (given.get("text"), given.get("answer_start")) if isinstance(given, dict) else (None, None)
    )
    right = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    if not right or not all(
        isinstance(text, str) and text and type(start) is int and start >= 0
        for text, start in zip(texts or (), starts or ())
    ):
        raise DataError(
            "span-answering: expected `answers` with lists `text` and `answer_start` of equal "
            f"length, got {repr(given)[:80]} for the question "
            f"{str(record.get('question'))[:40]!r}\n    a question without an answer has two empty "
            "lists"
        )
    return list(texts or ()), list(starts or ())
