"""`shoal.join` and the fleet on one worker: what is refused, and in which words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import own_loops
import shoal
from shoal.cli.main import main
from shoal.errors import ConfigError, DataError, ModelError, RunError, UserError
from shoal.fleet.batches import _rows
from shoal.fleet.join import _layout, own_sections
from shoal.fleet.script import run_script
from shoal.launch import pool as pools
from shoal.launch.pool import WorkerPool
from shoal.layout import Layout, Share


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def joined(model: nn.Module, optimizer: torch.optim.Optimizer) -> shoal.Fleet:
    fleet = shoal.join()
    assert (fleet.rank, fleet.size, fleet.is_first) == (0, 1, True)
    fleet.parallelize(model, optimizer)
    return fleet


@pytest.mark.parametrize(
    ("parallel", "sync", "messages"),
    [
        ({"tensor": 2, "pipeline": 2}, None, ["parallel.tensor: a loop of your own has the axes"]),
        ({"replicate": 2}, None, ["takes 2 workers, and there is 1", "shoal run --workers 2"]),
        ({"replicate": {"min": 1, "max": 2}}, None, ["goes on with the replicas it began with"]),
        ({"shard": {"degree": 1, "level": "optimizer"}}, None, ["use the level gradients"]),
        ({"compile": True}, None, ["call torch.compile yourself"]),
        ({"recompute": "full"}, None, ["gradient_checkpointing_enable"]),
        ({"shrad": 2}, None, ["parallel.shrad: unknown key", "shard"]),
        (None, "local-sdg", ["sync.kind: expected one of every-step, local-sgd"]),
        (None, {"kind": "local-sgd", "every_steps": 0}, ["sync.every_steps: expected at least 1"]),
    ],
)
def test_what_does_not_go_with_a_loop_of_ones_own(
    parallel: Any, sync: Any, messages: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        shoal.join(parallel, sync)
    assert all(each in str(caught.value) for each in messages), caught.value


def test_the_layout_is_what_the_workers_make() -> None:
    sections = own_sections({"shard": 2}, None)
    assert _layout(sections.parallel, size=6, started=True) == Layout(replicate=3, shard=2)
    with pytest.raises(ConfigError, match="1 x shard 2 takes 2 workers, and there are 3"):
        _layout(own_sections({"shard": 2, "replicate": 1}, None).parallel, size=3, started=True)


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def frozen() -> nn.Module:
    model = nn.Linear(3, 2)
    for each in model.parameters():
        each.requires_grad_(False)
    return model


def two_dtypes() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).bfloat16())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (batch_norm(), "1 normalises over the rows of a batch.*GroupNorm or LayerNorm"),
        (frozen(), "no parameter to train"),
        (two_dtypes(), "one dtype, got torch.bfloat16 and torch.float32"),
        (nn.Linear(3, 2, device="meta"), "weight has no values"),
    ],
)
def test_models_that_cannot_be_divided(model: nn.Module, message: str) -> None:
    fleet = shoal.join()
    with pytest.raises(ModelError, match=f"(?s){message}"):
        fleet.parallelize(model, torch.optim.SGD([torch.zeros(1)], lr=1.0))


def test_optimizers_that_are_not_the_models() -> None:
    model, _ = small()
    with pytest.raises(UserError, match="parameters that the model has not"):
        shoal.join().parallelize(model, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    model, optimizer = small()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(UserError, match="has stepped already"):
        shoal.join().parallelize(model, optimizer)


def test_calls_that_would_be_silently_wrong() -> None:
    model, optimizer = small()
    fleet = shoal.join()
    with pytest.raises(UserError, match=r"call model, optimizer = fleet.parallelize"):
        fleet.step()
    fleet.parallelize(model, optimizer)
    with pytest.raises(UserError, match="call it once"):
        fleet.parallelize(model, optimizer)
    loss = model(torch.ones(2, 3)).sum()
    with pytest.raises(UserError, match=r"targets=\.\.\."):
        fleet.backward(loss)
    with pytest.raises(UserError, match=r"one number, the mean over targets; got \[2\]"):
        fleet.backward(model(torch.ones(2, 3)).sum(dim=1), targets=2)
    loss.backward()
    with pytest.raises(UserError, match=r"call fleet.step\(\)"):
        optimizer.step()
    with pytest.raises(UserError, match=r"no fleet.backward\(loss\)"):
        fleet.step()


def test_gradients_that_are_not_finite_are_not_applied() -> None:
    model, optimizer = small()
    fleet = joined(model, optimizer)
    before = model.weight.detach().clone()
    fleet.backward(model(torch.full((1, 3), math.inf)).sum(), targets=1)
    stepped = fleet.step()
    assert not stepped.applied and not math.isfinite(stepped.gradient_norm)
    assert torch.equal(model.weight, before) and fleet.steps == 1
    fleet.backward(model(torch.ones(1, 3)).sum(), targets=1)
    assert fleet.step().applied and not torch.equal(model.weight, before)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    """As torch leaves it: no weight decay, no moments."""
    model = own_loops.Tagger()
    before = model.unused.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    fleet = joined(model, optimizer)
    fleet.backward(model(torch.ones(2, 3, dtype=torch.long)).mean(), targets=1)
    fleet.step()
    assert torch.equal(model.unused.weight, before)
    assert model.unused.weight not in optimizer.state


def test_a_schedule_of_torch_goes_on_after_a_save(tmp_path: Path) -> None:
    def loop(steps: int, *, load: bool) -> list[float]:
        torch.manual_seed(0)
        model, optimizer = small()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        fleet, losses = joined(model, optimizer), []
        if load:
            schedule.load_state_dict(fleet.load(tmp_path)["schedule"])
        for _ in range(steps):
            loss = model(torch.ones(4, 3)).square().mean()
            fleet.backward(loss, targets=4)
            losses.append(fleet.step().loss)
            schedule.step()
        state = {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"}
        fleet.save(tmp_path, more={"schedule": {**state, "lr_lambdas": [None]}})
        return losses

    straight = loop(6, load=False)
    for each in tmp_path.iterdir():
        each.rename(each.with_name(f"not-{each.name}"))
    assert loop(3, load=False) + loop(3, load=True) == straight


def test_a_folder_without_a_save_is_a_beginning(tmp_path: Path) -> None:
    assert joined(*small()).load(tmp_path / "none") is None


def test_saves_of_others_are_refused(tmp_path: Path) -> None:
    fleet = joined(*small())
    fleet.backward(fleet._model(torch.ones(1, 3)).sum(), targets=1)  # type: ignore[misc]
    fleet.step()
    fleet.save(tmp_path)
    other = nn.Linear(4, 2)
    theirs = joined(other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(RunError, match=r"another model: weight has the shape \(2, 3\)"):
        theirs.load(tmp_path)
    with pytest.raises(RunError, match=r"fleet\.load reads it there"):
        shoal.merge(tmp_path / "step-00000001", tmp_path / "merged")


def test_state_that_no_other_layout_could_have(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    fleet = joined(model, torch.optim.Adafactor(model.parameters()))
    fleet.backward(model(torch.ones(1, 8)).sum(), targets=1)
    fleet.step()
    with pytest.raises(RunError, match="Adafactor keeps 'row_var'"):
        fleet.save(tmp_path)
    assert not list(tmp_path.iterdir())


# --- batches


def test_batches_of_anything_are_cut_by_rows() -> None:
    fleet = joined(*small())
    text = {"x": torch.arange(6).view(3, 2), "names": ["a", "b", "c"], "labels": torch.ones(3)}
    (found,) = fleet.batches([text])
    assert found["names"] == ["a", "b", "c"] and torch.equal(found["x"], text["x"])
    half = _rows(text, Share(1, 2), of=3)
    assert half["names"] == ["b"] and half["x"].tolist() == [[2, 3]] and len(half["labels"]) == 1
    pair = _rows((torch.arange(3), [torch.ones(3, 2), "kept"]), Share(0, 2), of=3)
    assert pair[0].tolist() == [0, 1] and pair[1][0].shape == (2, 2) and pair[1][1] == "kept"
    loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=2)
    assert len(fleet.batches(loader)) == 3
    assert [batch[0].tolist() for batch in fleet.batches(loader)] == [[0, 1], [2, 3], [4]]


def test_what_gives_no_batches() -> None:
    fleet = joined(*small())
    with pytest.raises(DataError, match=r"(?s)got TensorDataset.*batch_size=16"):
        fleet.batches(TensorDataset(torch.arange(5)))
    with pytest.raises(DataError, match="rows in the first dim, got dict"):
        next(iter(fleet.batches([{"text": ["a", "b"]}])))


# --- shoal run

SCRIPT = """
import sys
import torch
import shoal
fleet = shoal.join()
if sys.argv[1:] == ["exit"]:
    sys.exit(7)
if sys.argv[1:] == ["user"]:
    raise shoal.UserError("a mistake of mine")
if sys.argv[1:] == ["kill"] and fleet.rank:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1:] == ["one"] and fleet.rank:
    raise KeyError("lost it")
model = torch.nn.Linear(2, 2)
fleet.parallelize(model, torch.optim.SGD(model.parameters(), lr=0.1))
"""


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    yield path


def test_a_script_runs_to_its_end(script: Path, pool: WorkerPool) -> None:
    assert run_script(script, workers=2, pool=pool) == 0
    assert run_script(script, ["exit"], workers=2, pool=pool) == 7


def test_the_command_gives_options_on_to_the_script(
    tmp_path: Path, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that it does not know itself; in the folder that one is in."""
    monkeypatch.setattr(pools, "WorkerPool", lambda: nullcontext(pool))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "said.py").write_text(
        "import sys, shoal\nfleet = shoal.join()\n"
        "open(f'said-{fleet.rank}', 'w').write(f'{fleet.size} {sys.argv[1:]}')\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["run", "said.py", "--rate", "3", "data", "--workers", "3"])
    assert not ended.value.code
    found = [(tmp_path / f"said-{rank}").read_text() for rank in range(3)]
    assert found == ["3 ['--rate', '3', 'data']"] * 3


def test_the_first_to_fail_is_named_with_its_own_lines(script: Path, pool: WorkerPool) -> None:
    with pytest.raises(shoal.WorkerError) as caught:
        run_script(script, ["one"], workers=2, pool=pool)
    text = str(caught.value)
    assert text.startswith("worker 1: KeyError: 'lost it'\nTraceback")
    assert 'mine.py", line 14' in text and "runpy" not in text


def test_a_users_mistake_has_no_traceback(script: Path, pool: WorkerPool) -> None:
    with pytest.raises(UserError) as caught:
        run_script(script, ["user"], workers=2, pool=pool)
    assert str(caught.value) == "a mistake of mine"


def test_a_worker_that_is_killed_is_named(script: Path, pool: WorkerPool) -> None:
    with pytest.raises(shoal.WorkerError, match="worker 1 was ended by SIGKILL; nothing restarts"):
        run_script(script, ["kill"], workers=2, pool=pool)


def test_a_script_that_is_not_there(pool: WorkerPool) -> None:
    with pytest.raises(RunError, match=r"none\.py: no such script"):
        run_script("none.py", workers=1, pool=pool)
