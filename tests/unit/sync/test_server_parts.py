"""A part of a parameter server: optimizers against torch's, weights, order, what is on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.config.optimizers import SGD, AdamW, OptimizerSection
from shoal.config.sync import Server
from shoal.sync.server.journal import Journal, read_events
from shoal.sync.server.messages import Region
from shoal.sync.server.part import Part, Settings

NUMEL = 96
REGIONS = (Region(0, 64, 0.0), Region(64, NUMEL, 0.0))


def draw(seed: int, numel: int = NUMEL) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def settings_of(
    trained: OptimizerSection | None = None, *, replicas: int = 2, **section: Any
) -> Settings:
    return Settings(Server.model_validate(section), trained or SGD(learning_rate=0.1), replicas)


def part_of(settings: Settings, *, regions: tuple[Region, ...] = REGIONS) -> Part:
    part = Part(settings, regions, torch.zeros(NUMEL))
    states = [torch.zeros(NUMEL) for _ in part.optimizer.states]
    part.fill([draw(0), *states], clocks={}, version=0, counts={}, facts={})
    for replica in range(settings.replicas):
        part.join(replica, life=replica)
    return part


def push(part: Part, replica: int, seed: int, *, weight: float = 1.0, rate: float = 1.0) -> int:
    version = part.consistency.version
    return part.push(replica, draw(seed), weight=weight, version=version, rate=rate)


ASYNCHRONOUS = {"kind": "asynchronous"}
SYNCHRONOUS = {"kind": "bounded", "staleness": 0}


@pytest.mark.parametrize(
    ("trained", "section"),
    [
        (SGD(learning_rate=0.1, weight_decay=0.1), {}),
        (SGD(learning_rate=0.1, weight_decay=0.1, momentum=0.9), {}),
        (AdamW(learning_rate=0.01), {}),
        (SGD(), {"kind": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": True}),
        (SGD(), {"kind": "adam", "learning_rate": 0.01}),
        (SGD(), {"kind": "delayed-nesterov", "learning_rate": 0.1, "momentum": 0.9}),
    ],
    ids=["sgd", "momentum", "adamw", "nesterov", "adam", "delayed nesterov of one push"],
)
def test_a_server_steps_as_torch_does(trained: OptimizerSection, section: dict[str, Any]) -> None:
    """One replica, a rate that changes: the same as torch.optim over two parameter tensors."""
    more = {"optimizer": section} if section else {}
    settings = settings_of(trained, replicas=1, consistency=SYNCHRONOUS, **more)
    used, decay = settings.optimizer, getattr(settings.optimizer, "weight_decay", 0.0)
    regions = (Region(0, 64, decay), Region(64, NUMEL, 0.0))
    part = part_of(settings, regions=regions)
    rows = [torch.nn.Parameter(draw(0)[r.start : r.stop].clone()) for r in regions]
    groups = [{"params": [p], "weight_decay": r.weight_decay} for p, r in zip(rows, regions)]
    theirs: torch.optim.Optimizer
    if used.kind in ("adamw", "adam"):
        betas = (used.beta1, used.beta2)
        theirs = torch.optim.AdamW(groups, lr=used.learning_rate, betas=betas, eps=used.epsilon)
    else:
        theirs = torch.optim.SGD(
            groups, lr=used.learning_rate, momentum=used.momentum, nesterov=bool(section)
        )
    for step in range(5):
        rate = 1.0 - 0.1 * step
        push(part, 0, 1 + step, rate=rate)
        for group in theirs.param_groups:
            group["lr"] = used.learning_rate * rate
        for parameter, region in zip(rows, regions):
            parameter.grad = draw(1 + step)[region.start : region.stop].clone()
        theirs.step()
    # a mantissa of 24 bits, five updates, the products in another order
    wanted = torch.cat([parameter.detach() for parameter in rows])
    torch.testing.assert_close(part.values, wanted, rtol=2e-6, atol=1e-6)


def test_delayed_nesterov_is_its_paper() -> None:
    """Algorithm 3 of arXiv 2401.09135 with c = 0, in float64; four replicas, so four pushes."""
    section = {"kind": "delayed-nesterov", "learning_rate": 0.5, "momentum": 0.8}
    part = part_of(settings_of(replicas=4, consistency=ASYNCHRONOUS, optimizer=section))
    theta, momentum, total = draw(0).double().numpy(), np.zeros(NUMEL), np.zeros(NUMEL)
    for count in range(12):
        push(part, count % 4, 1 + count)
        gradient = draw(1 + count).double().numpy()
        total += gradient
        moved = gradient / 4
        if (count + 1) % 4 == 0:
            momentum = 0.8 * momentum + total / 4
            total[:] = 0
            moved = 0.8 * momentum + moved
        theta -= 0.5 * moved
    np.testing.assert_allclose(part.values.numpy(), theta, rtol=1e-5, atol=1e-5)


def test_one_clock_is_the_mean_over_targets() -> None:
    part = part_of(settings_of(SGD(learning_rate=1.0), consistency=SYNCHRONOUS, replicas=3))
    assert push(part, 2, 7, weight=60) == 0 and push(part, 0, 5, weight=10) == 0
    assert torch.equal(part.values, draw(0)), "not all have come"
    push(part, 1, 6, weight=30)
    mean = 0.1 * draw(5).double() + 0.3 * draw(6).double() + 0.6 * draw(7).double()
    torch.testing.assert_close(part.values.double(), draw(0).double() - mean, rtol=1e-6, atol=1e-6)


def test_a_clock_is_the_same_bits_in_any_order_of_arrival() -> None:
    found = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        part = part_of(settings_of(consistency=SYNCHRONOUS, replicas=3))
        for replica in order:
            push(part, replica, replica, weight=1 + replica)
        found.append(part.values)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_push_with_nothing_in_it_moves_the_clock_only() -> None:
    part = part_of(settings_of(SGD(learning_rate=1.0), consistency=SYNCHRONOUS))
    part.push(0, None, weight=0.0, version=0, rate=1.0)
    push(part, 1, 4, weight=9)
    torch.testing.assert_close(part.values, draw(0) - draw(4))
    for replica in range(2):
        part.push(replica, None, weight=0.0, version=1, rate=1.0)
    assert part.consistency.version == 2
    torch.testing.assert_close(part.values, draw(0) - draw(4))


def test_stale_pushes_weigh_less_where_that_is_asked_for() -> None:
    """Zhang et al.: a push that four updates have overtaken moves a fourth as far."""
    for aware, factor in ((False, 1.0), (True, 0.25)):
        section = {"consistency": ASYNCHRONOUS, "staleness_aware": aware}
        part = part_of(settings_of(SGD(learning_rate=1.0), replicas=1, **section))
        for seed in range(1, 5):
            push(part, 0, seed)
        before = part.values.clone()
        assert part.push(0, draw(9), weight=1.0, version=0, rate=1.0) == 4
        torch.testing.assert_close(part.values, before - factor * draw(9), rtol=1e-6, atol=1e-6)


def test_delay_compensation_is_its_paper() -> None:
    """Equation 7 of arXiv 1609.08326: g + lambda g*g*(w - w_backup)."""
    section = {"consistency": ASYNCHRONOUS, "delay_compensation": 0.5}
    part = part_of(settings_of(SGD(learning_rate=1.0), **section))
    for replica in range(2):
        part.pull(replica)
    push(part, 0, 3)
    moved = part.values - draw(0)
    before, gradient = part.values.clone(), draw(4)
    push(part, 1, 4)
    wanted = before - 0.5 * (gradient + 0.5 * gradient * gradient * moved)
    torch.testing.assert_close(part.values, wanted, rtol=1e-6, atol=1e-6)


def test_a_filled_part_counts_on() -> None:
    """What `kept_clocks` and the states say is enough to go on elsewhere: as without a stop."""
    whole = part_of(settings_of(AdamW(learning_rate=0.01), consistency=SYNCHRONOUS))
    for clock in range(6):
        for replica in range(2):
            push(whole, replica, 10 * clock + replica)
        if clock == 2:
            clocks, version = whole.consistency.kept_clocks(), whole.consistency.version
            tensors = [whole.values.clone(), *(s.clone() for s in whole.optimizer.states.values())]
            counts = whole.optimizer.counts()
    part = part_of(settings_of(AdamW(learning_rate=0.01), consistency=SYNCHRONOUS))
    part.fill(tensors, clocks=clocks, version=version, counts=counts, facts={})
    for clock in range(3, 6):
        for replica in range(2):
            push(part, replica, 10 * clock + replica)
    assert torch.equal(part.values, whole.values)


# --- what is on the disk


def events() -> list[dict[str, Any]]:
    listed = [{"event": "push", "position": 0, "replica": n % 2, "seed": n} for n in range(9)]
    return [*listed[:5], {"event": "leave", "position": 0, "replica": 1}, *listed[5::2]]


def happen(part: Part, journal: Journal | None, event: dict[str, Any]) -> None:
    """One event with its promise on the disk first, as the server does it."""
    if event["event"] != "push":
        if journal is not None:
            journal.note(event)
        part.leave(event["replica"])
        return
    more = {"weight": 2.0, "version": part.consistency.version, "rate": 0.5, "facts": "{}"}
    known = {key: value for key, value in event.items() if key != "seed"}
    if journal is not None:
        journal.note({**known, **more}, draw(event["seed"]))
    part.push(event["replica"], draw(event["seed"]), **more)


@pytest.mark.parametrize("kind", [ASYNCHRONOUS, {"kind": "bounded", "staleness": 3}])
def test_a_log_that_is_cut_anywhere_gives_what_was_acknowledged(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    """Cut at every byte near every event: whole events count, what is left of one does not."""
    settings = settings_of(AdamW(learning_rate=0.01), consistency=kind, delay_compensation=0.1)
    part = part_of(settings)
    journal = Journal(tmp_path / "log")
    journal.snapshot({0: part})
    (path,) = (tmp_path / "log").glob("log-*.bin")
    sizes, states = [0], [part.values.clone()]
    for event in events():
        happen(part, journal, event)
        journal.sync()
        sizes.append(path.stat().st_size)
        states.append(part.values.clone())
    journal.close()
    whole = path.read_bytes()

    def make(numbers: Any) -> Part:
        return Part(settings, tuple(Region(*r) for r in numbers["regions"]), torch.zeros(NUMEL))

    near = {size + extra for size in sizes for extra in (-1, 0, 1, 30)}
    for length in sorted(near & set(range(len(whole) + 1))):
        path.write_bytes(whole[:length])
        again = Journal(tmp_path / "log")
        recovered = again.recover(make)[0]
        again.close()
        count = max(number for number, size in enumerate(sizes) if size <= length)
        assert torch.equal(recovered.values, states[count]), (length, count)
        assert path.stat().st_size == sizes[count], "the rest of an event is cut off"
    damaged = bytearray(whole)
    damaged[sizes[3] + 40] ^= 1
    path.write_bytes(damaged)
    assert len(list(read_events(path))) == 3, "a flipped bit ends what is believed"


def test_the_disk_is_bounded_and_a_snapshot_forgets_nothing(tmp_path: Path) -> None:
    settings = settings_of(SGD(momentum=0.9), consistency={"kind": "bounded", "staleness": 3})
    part, straight = part_of(settings), part_of(settings)
    journal = Journal(tmp_path, least_log_bytes=4000)
    journal.snapshot({0: part})
    largest = 0
    for number in range(40):
        event = {"event": "push", "position": 0, "replica": number % 2, "seed": number}
        happen(part, journal, event)
        happen(straight, None, event)
        journal.sync()
        if journal.is_due:
            journal.snapshot({0: part})
        largest = max(largest, sum(os.stat(each).st_size for each in tmp_path.iterdir()))
    journal.close()
    assert sorted(each.suffix for each in tmp_path.iterdir()) == [".bin", ".safetensors"]
    assert largest < 4000 + 500 + 8000
    again = Journal(tmp_path)
    recovered = again.recover(
        lambda n: Part(settings, tuple(Region(*r) for r in n["regions"]), torch.zeros(NUMEL))
    )[0]
    again.close()
    assert torch.equal(recovered.values, straight.values)
    assert recovered.consistency.state() == straight.consistency.state()
