"""A loop of somebody's own, with and without shoal: what tests of `shoal.join` run on workers."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

import shoal
from shoal.environment import become_worker
from shoal.observe.events import Report
from shoal.runtime import stop_process_group

IGNORED, WORDS, TAGS = -100, 23, 5


class Tagger(nn.Module):
    """No transformers in it: an embedding, blocks, a head, and a part that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 12)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(12, 2, 18, 0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(12, TAGS)
        self.unused = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(7))  # not divisible by two

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden) * self.scale.mean()


def rows(count: int = 27) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sentences of 6 words; many labels are no targets, so that parts have unequal numbers."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        ids = torch.randint(WORDS, (6,), generator=draw)
        labels = ids % TAGS
        labels[: number % 6] = IGNORED
        found.append((ids, labels))
    return found


def loss_of(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


def made(name: str) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """Everything as its owner makes it: 27 rows in batches of 13, 13 and 1."""
    torch.manual_seed(5)
    model = Tagger()
    kinds = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.3),
    }
    loader = DataLoader(rows(), batch_size=13, shuffle=True)  # type: ignore[arg-type]
    return model, kinds[name](), loader


def plain(
    optimizer: str = "adamw",
    *,
    epochs: int = 3,
    clip: float | None = None,
    reader: str = "loader",
) -> tuple[list[float], list[float], nn.Module]:
    """Without shoal: the losses, the norms of gradients, and the model at the end."""
    model, stepper, loader = made(optimizer)
    loader, losses, norms = READERS[reader](loader), [], []
    for _ in range(epochs):
        for ids, labels in loader:
            stepper.zero_grad()
            loss = loss_of(model, ids, labels)
            loss.backward()
            limit = clip if clip is not None else float("inf")
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), limit)))
            stepper.step()
            losses.append(loss.item())
    return losses, norms, model


def averaged(size: int, *, every: int, epochs: int) -> list[list[float]]:
    """`size` models, each stepping on its rows, averaged every so often by their targets."""
    whole, _, loader = made("sgd")
    models = [copy.deepcopy(whole) for _ in range(size)]
    steppers = [torch.optim.SGD(each.parameters(), lr=0.3) for each in models]
    weights, losses, step = [0] * size, [[] for _ in range(size)], 0
    for _ in range(epochs):
        for ids, labels in loader:
            for rank in range(size):
                own = slice(len(ids) * rank // size, len(ids) * (rank + 1) // size)
                steppers[rank].zero_grad()
                targets = int((labels[own] != IGNORED).sum())
                if targets:
                    loss = loss_of(models[rank], ids[own], labels[own])
                    loss.backward()
                    steppers[rank].step()
                    losses[rank].append(loss.item())
                else:
                    losses[rank].append(0.0)
                weights[rank] += targets
            step += 1
            if step % every == 0:
                _average(models, weights)
                weights = [0] * size
    return losses


@torch.no_grad()
def _average(models: list[nn.Module], weights: list[int]) -> None:
    for same in zip(*(each.parameters() for each in models)):
        mean = sum(p * w for p, w in zip(same, weights)) / sum(weights)
        for each in same:
            each.copy_(mean)


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a worker: the loop with shoal, as the payload wants it."""
    report, rank = Report(descriptor), payload["rank"]
    become_worker(rank, size=payload["size"], meeting=payload["meeting"])
    try:
        report.say("found", found=globals()[payload["loop"]](**payload["arguments"]))
    finally:
        stop_process_group()
    return 0


READERS: dict[str, Any] = {
    "loader": lambda loader: loader,
    "workers": lambda loader: DataLoader(
        loader.dataset, batch_size=13, shuffle=True, num_workers=2, prefetch_factor=3
    ),
    "iterable": lambda loader: DataLoader(Streamed(), batch_size=13),
    "list": lambda loader: [*DataLoader(Streamed(), batch_size=13)],
}
"""What gives batches: the first two shuffle, the others have one order."""


class Streamed(IterableDataset[Any]):
    """The rows in their order, without indices."""

    def __iter__(self) -> Any:
        return iter(rows())


def with_shoal(
    parallel: dict[str, Any] | None = None,
    sync: Any = None,
    *,
    optimizer: str = "adamw",
    epochs: int = 3,
    clip: float | None = None,
    parts: int = 1,
    reader: str = "loader",
    save: str | None = None,
    load: str | None = None,
) -> dict[str, Any]:
    """The loop of `plain`; each batch in `parts` backward passes. Saves at the end, loads first."""
    model, stepper, loader = made(optimizer)
    loader = READERS[reader](loader)
    fleet = shoal.join(parallel, sync)
    model, stepper = fleet.parallelize(model, stepper)
    steps, weights, begun = [], {}, {}
    if load is not None:
        begun = fleet.load(load)
        torch.manual_seed(begun["seed"])
    for _ in range(epochs):
        for ids, labels in fleet.batches(loader):
            stepper.zero_grad()
            for part in range(parts):
                own = slice(len(ids) * part // parts, len(ids) * (part + 1) // parts)
                if len(ids[own]):  # workers may differ in how many they have
                    targets = int((labels[own] != IGNORED).sum())
                    fleet.backward(loss_of(model, ids[own], labels[own]), targets=targets)
            steps.append(fleet.step(max_gradient_norm=clip))
    with torch.no_grad():
        ids, labels = (torch.stack(each) for each in zip(*rows()))
        share = fleet.share_of(len(ids))
        own = slice(share.start, share.stop)
        targets = int((labels[own] != IGNORED).sum())
        score = fleet.mean(loss_of(model, ids[own], labels[own]), targets=targets)
    if save is not None:
        fleet.save(save, more={"seed": 77})
    weights = {name: each.double().sum().item() for name, each in fleet.state_dict().items()}
    return {
        "rank": fleet.rank,
        "losses": [each.loss for each in steps],
        "norms": [each.gradient_norm for each in steps],
        "targets": [each.targets for each in steps],
        "score": score,
        "weights": weights,
        "steps": fleet.steps,
        "begun": begun,
        "storage": sum(each.numel() for each in fleet._state.named("parameter").values()),
    }


def reading_apart() -> dict[str, Any]:
    """Every worker makes its own order: must be noticed."""
    model, stepper, loader = made("sgd")
    fleet = shoal.join()
    fleet.parallelize(model, stepper)
    own = DataLoader(
        loader.dataset,
        batch_size=13,
        shuffle=True,
        generator=torch.Generator().manual_seed(fleet.rank),
    )
    return {"error": _error(lambda: _steps(fleet, model, own))}


def changed_by_hand() -> dict[str, Any]:
    """One worker's weights are changed by hand between two steps: must be noticed."""
    model, stepper, loader = made("sgd")
    fleet = shoal.join()
    fleet.parallelize(model, stepper)

    def work() -> None:
        _steps(fleet, model, loader)
        if fleet.rank:
            with torch.no_grad():
                model.head.bias[0] += 1e-7
        _steps(fleet, model, loader)

    return {"error": _error(work)}


def clipped_by_hand(parallel: dict[str, Any] | None) -> dict[str, Any]:
    """Gradients clipped before they are summed: must be refused."""
    model, stepper, loader = made("sgd")
    fleet = shoal.join(parallel)
    fleet.parallelize(model, stepper)

    def work() -> None:
        ids, labels = next(iter(fleet.batches(loader)))
        fleet.backward(loss_of(model, ids, labels), targets=1)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        fleet.step()

    return {"error": _error(work)}


def _steps(fleet: shoal.Fleet, model: nn.Module, loader: DataLoader[Any]) -> None:
    for ids, labels in fleet.batches(loader):
        fleet.backward(loss_of(model, ids, labels), targets=int((labels != IGNORED).sum()))
        fleet.step()


def _error(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def example(path: str, script: str, joined: str = "join()") -> dict[str, Any]:
    """`main` of an example: the mean loss of each epoch. `joined`: how it joins."""
    code: dict[str, Any] = {"__name__": "example"}
    text = Path(script).read_text("utf-8").replace("shoal.join()", f"shoal.{joined}")
    exec(compile(text, script, "exec"), code)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return {"means": code["main"](path)}
