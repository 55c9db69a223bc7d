"""The task of docs/contribute/new-task.md learns; its loss is transformers' and plain torch's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from shoal.data.batch import micro_batches
from shoal.data.prepare import SourceSpec, prepare
from shoal.data.stream import Evaluation, Stream
from shoal.layout import Share
from shoal.models.anatomy import anatomy_of, check_logits
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.tasks import kinds
from shoal.tasks.task import Task, Tools

PAGE = Path(__file__).parents[3] / "docs" / "contribute" / "new-task.md"
WORDS = ("bad", "poor", "fair", "good", "great")


def code_of_page() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return block


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Task:
    """The page's task, made by its kind as the trainer makes it."""
    names: dict[str, Any] = {}
    exec(compile(code_of_page(), str(PAGE), "exec"), names)
    monkeypatch.setitem(kinds.KINDS, "text-score", names["TextScore"])
    return kinds.create("text-score")


def test_the_example_is_the_page() -> None:
    text = (PAGE.parents[2] / "examples" / "own_task.py").read_text(encoding="utf-8")
    assert text.partition('"""\n\n')[2] == code_of_page()


def test_the_page_holds_its_promise_of_length() -> None:
    lines = [line for line in code_of_page().splitlines() if line.strip()]
    imports = [line for line in lines if line.startswith(("import", "from"))]
    assert len(lines) - len(imports) <= 40


def test_it_learns_with_the_loss_of_transformers(task: Task, tmp_path: Path) -> None:
    rows = [
        {"text": " ".join([WORDS[n % 5]] * (1 + n % 7)), "score": float(n % 5)} for n in range(60)
    ]
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(WORDS, start=1)}, unk_token="bad")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    prepared = prepare(
        sources=[SourceSpec(source=str(path))],
        encode=lambda records: task.encode(records, tools=Tools(tokenizer)),
        encode_key="words",
        fields=task.fields,
        sequence_tokens=16,
        packing=False,
        validation_fraction=0.2,
        out=tmp_path / "prepared",
    )
    config = read_config(
        architecture="llama",
        settings={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "intermediate_size": 16, **task.model_settings()},
        vocabulary_size=6,
    )  # fmt: skip
    model = build_meta(config, auto_class=task.auto_class)
    materialise(model, record=record(model), seed=0)
    anatomy = anatomy_of(model)
    assert check_logits(model, anatomy).whole_logits, "pooled by its own code"
    stream = Stream(prepared, seed=0, global_batch_samples=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for step in range(40):
        arrays = stream.at(step, Share(0, 16))
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        targets, total = task.count(batch), 0.0
        optimizer.zero_grad()
        for micro, _ in micro_batches(batch, task.fields, rows=4):
            loss = task.output(model, anatomy, micro, step=step).total()
            (loss / targets).backward()
            total += float(loss.detach())
        losses.append(total / targets)
        if step == 0:
            assert losses[0] == pytest.approx(_by_transformers(model, batch), rel=1e-5)
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    metrics = task.metrics()
    evaluation = Evaluation(prepared, batch_samples=5)
    assert 8 < len(evaluation) <= 12 and len(evaluation) % 5, "some rows only fill a batch"
    with torch.no_grad():
        for number in range(evaluation.num_batches(1)):
            arrays = evaluation.at(number, part=0, parts=1)
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            metrics.add(batch=batch, scores=task.output(model, anatomy, batch).each())
    result = metrics.result()
    assert result["evaluation_targets"] == len(evaluation)
    wanted = sum(_by_transformers(model, _one(row)) for row in evaluation.rows())
    wanted /= len(evaluation)
    assert result["evaluation_loss"] == pytest.approx(wanted, rel=1e-4)
    assert task.words(None, result)[0].startswith("mean squared error: ")


def _one(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(array)[None] for name, array in row.items()}


def _by_transformers(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Mean squared error of its own forward with its own attention, a row at a time, unpadded."""
    model.set_attn_implementation("eager")
    total = 0.0
    with torch.no_grad():
        for row in range(len(batch["labels"])):
            length = int((batch["document_ids"][row] >= 0).sum())
            ids = batch["input_ids"][row : row + 1, :length].long()
            logits = model(input_ids=ids).logits.reshape(1)
            total += float(torch.nn.functional.mse_loss(logits, batch["labels"][row : row + 1]))
    model.set_attn_implementation("shoal")
    return total / len(batch["labels"])
