"""`shoal.join`: a loop that is not shoal's gives, on several workers, what it gives on one."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import own_loops
from shoal.launch.pool import WorkerPool
from tiny import largest_difference
from workers import run_workers

ROOT = Path(__file__).resolve().parents[2]
SAME = 1e-5
"""Relative, float32: sums over workers are added in another order."""
_numbers = itertools.count()


@pytest.fixture
def fleet(pool: WorkerPool, tmp_path: Path) -> Any:
    """`fleet(size, loop, **arguments)`: what each worker found, by rank."""

    def call(size: int, loop: str, **arguments: Any) -> list[dict[str, Any]]:
        meeting = (tmp_path / f"meeting-{next(_numbers)}").as_uri()
        payload = {"loop": loop, "arguments": arguments, "size": size, "meeting": meeting}
        found = run_workers(pool, "own_loops:run", payload, size=size)
        return sorted(found, key=lambda each: each.get("rank", 0))

    return call


def whole(model: torch.nn.Module) -> dict[str, float]:
    return {name: each.double().sum().item() for name, each in model.state_dict().items()}


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (2, None),
        (2, {"shard": 2}),
        (2, {"shard": {"degree": 2, "level": "gradients"}}),
        pytest.param(4, {"replicate": 2, "shard": 2}, marks=pytest.mark.slow),
    ],
    ids=["replicate", "shard", "gradients", "both"],
)
def test_a_plain_module_has_the_losses_of_one_process(
    fleet: Any, size: int, parallel: dict[str, Any] | None
) -> None:
    """Batches of 13, 13 and 1 rows with unequal targets, AdamW, against torch alone."""
    losses, norms, model = own_loops.plain(clip=0.5)
    found = fleet(size, "with_shoal", parallel=parallel, clip=0.5)
    for each in found:
        assert largest_difference(each["losses"], losses) < SAME
        assert largest_difference(each["norms"], norms) < SAME
        # the bias of keys has no gradient but rounding, which AdamW makes as large as any other
        wanted = {n: w for n, w in whole(model).items() if "in_proj_bias" not in n}
        assert {n: each["weights"][n] for n in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert found[0]["losses"] == found[-1]["losses"]
    assert found[0]["score"] == found[1]["score"]
    ids, labels = (torch.stack(each) for each in zip(*own_loops.rows()))
    with torch.no_grad():
        score = own_loops.loss_of(model, ids, labels).item()
    assert found[0]["score"] == pytest.approx(score, rel=SAME)
    elements = sum(each.numel() for each in model.parameters())
    shards = (parallel or {}).get("shard", 1)
    degree = shards if isinstance(shards, int) else shards["degree"]
    assert found[0]["storage"] <= elements / degree + 200, "each has its part only"


@pytest.mark.parametrize("reader", ["workers", "iterable", "list"])
def test_whatever_gives_the_batches(fleet: Any, reader: str) -> None:
    """Loaders with processes of their own, or without indices: each reads its rows."""
    losses, _, _ = own_loops.plain(reader=reader, epochs=1)
    for each in fleet(2, "with_shoal", reader=reader, epochs=1):
        assert largest_difference(each["losses"], losses) < SAME


def test_several_backwards_make_one_step(fleet: Any) -> None:
    losses, norms, _ = own_loops.plain()
    for each in fleet(2, "with_shoal", parts=7):  # 6 rows have 6 of them, 7 rows 7
        assert largest_difference(each["losses"], losses) < SAME
        assert largest_difference(each["norms"], norms) < SAME


def test_local_sgd_is_models_that_are_averaged(fleet: Any) -> None:
    """Against two models in plain torch, averaged by their targets every two steps."""
    wanted = own_loops.averaged(2, every=2, epochs=4)
    sync = {"kind": "local-sgd", "every_steps": 2}
    found = fleet(2, "with_shoal", sync=sync, optimizer="sgd", epochs=4)
    for each, losses in zip(found, wanted):
        assert [bool(loss) for loss in each["losses"]] == [bool(loss) for loss in losses]
        pairs = [pair for pair in zip(each["losses"], losses) if pair[1]]
        assert largest_difference(*zip(*pairs)) < SAME
    assert found[0]["weights"] == found[1]["weights"]


def test_a_save_goes_on_in_another_layout(fleet: Any, tmp_path: Path) -> None:
    """Two shards save; one worker, and two replicas, go on as the two shards do."""
    save = str(tmp_path / "saves")
    fleet(2, "with_shoal", parallel={"shard": 2}, epochs=2, save=save)
    straight = fleet(2, "with_shoal", parallel={"shard": 2}, epochs=2, load=save)[0]
    assert straight["begun"] == {"seed": 77} and straight["steps"] == 12
    for size in (1, 2):
        other = fleet(size, "with_shoal", epochs=2, load=save)[0]
        assert largest_difference(other["losses"], straight["losses"]) < SAME


def test_a_save_between_two_averages_keeps_each_replica(fleet: Any, tmp_path: Path) -> None:
    """Resumed in the same layout, each replica goes on from its own weights and moments."""
    save, sync = str(tmp_path / "saves"), {"kind": "local-sgd", "every_steps": 4}
    fleet(2, "with_shoal", sync=sync, epochs=1, save=save)  # 3 steps: within a round
    straight = fleet(2, "with_shoal", sync=sync, epochs=2, load=save)
    again = fleet(2, "with_shoal", sync=sync, epochs=2, load=save)
    assert [each["losses"] for each in again] == [each["losses"] for each in straight]
    assert straight[0]["losses"][0] != straight[1]["losses"][0]


@pytest.mark.parametrize(
    ("loop", "arguments", "message"),
    [
        ("reading_apart", {}, r"WorkerError: step 1: the workers read different batches; .* seed"),
        (
            "changed_by_hand",
            {},
            r"WorkerError: step 4: replicas hold different weights: parameter head.bias \(worker 1",
        ),
        ("clipped_by_hand", {"parallel": None}, r"UserError: .*changed since fleet.backward"),
        ("clipped_by_hand", {"parallel": {"shard": 2}}, r"UserError: .*fleet.step\(max_grad"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(
    fleet: Any, loop: str, arguments: dict[str, Any], message: str
) -> None:
    for each in fleet(2, loop, **arguments):
        assert re.search(message, each["error"], re.DOTALL), each["error"]


EXAMPLE = ROOT / "examples" / "own_loop.py"


def without_shoal(text: str) -> tuple[str, int]:
    """The script as it was before, and the number of lines that shoal has changed."""
    lines, changed = [], 0
    for line in text.splitlines():
        before, mark, was = line.partition("  # shoal")
        changed += bool(mark)
        if was.startswith(", instead of: "):
            indent = before[: len(before) - len(before.lstrip())]
            lines.append(indent + was.removeprefix(", instead of: "))
        elif not mark:
            lines.append(line)
    return "\n".join(lines), changed


def test_the_textbooks_loop_changes_six_lines_and_no_loss(fleet: Any, tmp_path: Path) -> None:
    """BERT token classification by transformers: two workers against the script without shoal."""
    sentences = [
        "\n".join(f"word{(n * k) % 17} {'B-X' if (n * k) % 17 > 8 else 'O'}" for k in range(2, 9))
        for n in range(1, 41)
    ]
    data, plain = tmp_path / "data.conll", tmp_path / "plain.py"
    data.write_text("\n\n".join(sentences), encoding="utf-8")
    text, changed = without_shoal(EXAMPLE.read_text(encoding="utf-8"))
    assert changed <= 6 and "shoal" not in text.partition('"""\n\n')[2]
    plain.write_text(text, encoding="utf-8")
    wanted = fleet(1, "example", path=str(data), script=str(plain))[0]["means"]
    assert wanted[-1] < wanted[0]
    for joined in ("join()", "join({'shard': 2})"):
        for each in fleet(2, "example", path=str(data), script=str(EXAMPLE), joined=joined):
            assert largest_difference(each["means"], wanted) < SAME
