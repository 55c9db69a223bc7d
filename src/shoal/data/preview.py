"""Samples as a model will see them, in lines for people: tokens, targets, documents of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from shoal.data.batch import INDEX, Array
from shoal.data.prepare import open_prepared
from shoal.data.stream import Stream
from shoal.fields import IGNORED
from shoal.layout import Share

Style = Callable[[str], str]


def previews(
    directory: Path | str,
    *,
    count: int,
    seed: int,
    tokenizer: Any,
    shifted: bool,
    labels: Mapping[int, str],
    plain: Style,
    mark: Style,
    drawn: Callable[[Any], Any] = lambda batch: batch,
) -> Iterator[str]:
    """Lines on the first `count` samples that a run with this seed reads of prepared data.

    `tokenizer` turns ids into text (None: the data has none), `shifted`: the label of a token
    is the token after it, `labels` names classes, `drawn`: the task's, for a batch. Tokens are
    parted by `|`; a run of targets is passed through `mark`, all else through `plain`.
    """
    prepared = open_prepared(directory)
    batch = drawn(Stream(prepared, seed=seed, global_batch_samples=count).at(0, Share(0, count)))
    for number in range(count):
        sample = {name: array[number] for name, array in batch.items() if name not in INDEX}
        source = prepared.sources[int(batch["source_ids"][number])].name
        yield plain(f"sample {number + 1} of {source}")
        is_row = tokenizer is not None and "document_ids" in sample
        if not is_row and tokenizer is not None:
            for name in (each for each in ("input_ids", "labels") if each in sample):
                ids = [int(each) for each in sample[name] if each >= 0]
                text = plain if name == "input_ids" else mark
                yield text(f"{name}: {tokenizer.decode(ids, skip_special_tokens=False)}")
        elif is_row:
            names = {} if shifted else labels
            yield from _row(
                sample, shift=shifted, tokenizer=tokenizer, labels=names, styles=(plain, mark)
            )
        for name, value in sample.items():
            if np.ndim(value) == 0 or not is_row:
                yield plain(f"  {name}: {_value(value, labels if name == 'labels' else {})}")


def _value(value: Array, labels: Mapping[int, str]) -> str:
    if np.ndim(value) == 0:
        return str(labels.get(int(value), value))
    ends = f", from {value.min()} to {value.max()}" if value.size else ""
    return f"{value.dtype} {list(value.shape)}{ends}"


def _row(
    sample: Mapping[str, Array],
    *,
    shift: bool,
    tokenizer: Any,
    labels: Mapping[int, str],
    styles: tuple[Style, Style],
) -> Iterator[str]:
    """A line on each document of a row, and its tokens; `shift`: a label is the next token."""
    ids, documents = sample["input_ids"], sample["document_ids"]
    none = np.full_like(ids, IGNORED)
    targets = sample.get("labels", none)
    targets = targets if np.ndim(targets) else none
    if shift:  # the last label is the token that the next row begins with
        ids, documents = np.append(ids, targets[-1]), np.append(documents, documents[-1])
        targets = np.append(IGNORED, targets)
    for document in dict.fromkeys(documents[documents >= 0].tolist()):
        places = np.flatnonzero((documents == document) & (ids >= 0))
        learned = [place for place in places if targets[place] != IGNORED]
        yield f"  document {document}: {len(places)} tokens, {len(learned)} targets"
        parts = []
        for is_target, run in groupby(places, key=lambda place: bool(targets[place] != IGNORED)):
            texts = []
            for place in run:
                text = tokenizer.decode([int(ids[place])], skip_special_tokens=False)
                label = labels.get(int(targets[place])) if is_target else None
                texts.append(text if label is None else f"{text}/{label}")
            parts.append(styles[is_target]("|".join(texts).replace("\n", "\\n")))
        yield "    " + "|".join(parts)
