"""A slice of `make fuzz`: random mixes of all axes equal one worker; failures become small."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.launch.pool import WorkerPool


@pytest.fixture(scope="module")
def script() -> Any:
    return importlib.import_module("fuzz_layouts")


@pytest.fixture(scope="module")
def fuzzer(
    script: Any, pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    yield script.Fuzzer(tmp_path_factory.mktemp("fuzz"), pool=pool)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("count", "workers"), [(3, 4), pytest.param(24, 8, marks=pytest.mark.slow)]
)
def test_mixes_equal_one_worker(script: Any, fuzzer: Any, count: int, workers: int) -> None:
    chance, cases = random.Random(11), list[Any]()
    while len(cases) < count:
        case = fuzzer.draw(chance)
        if case.workers == workers and sum(v > 1 for v in case.degrees) > 1:
            cases.append(case)
    found = dict(zip(map(str, cases), fuzzer.wrong(cases), strict=True))
    assert {case: what for case, what in found.items() if what is not None} == {}


FAILED_ONCE: list[dict[str, Any]] = [
    # FSDP2's hooks of experts within a block that recomputes: other operations the second time
    {
        "family": "deepseek_v3",
        "micro": 1,
        "shard": 2,
        "context": 2,
        "expert": 2,
        "level": "optimizer",
        "recompute": "selective",
    },
    {
        "family": "deepseek_v2",
        "micro": 1,
        "pipeline": 2,
        "shard": 4,
        "expert": 2,
        "recompute": "selective",
    },
    # one token on each rank: what they join was no rows for a router
    {"family": "deepseek_v2", "micro": 2, "context": 2, "tensor": 4, "kind": "ulysses"},
]


@pytest.mark.quick(1)
@pytest.mark.timeout(200)
@pytest.mark.parametrize("fields", FAILED_ONCE, ids=range(len(FAILED_ONCE)))
def test_what_failed_once(script: Any, fuzzer: Any, fields: dict[str, Any]) -> None:
    assert fuzzer.wrong([script.Case(**fields)]) == [None]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_goes_on_in_another_layout_after_a_kill(script: Any, fuzzer: Any) -> None:
    case = script.Case("llama", micro=2, pipeline=2, tensor=2)
    later = script.Case("llama", micro=2, shard=2, context=2)
    assert fuzzer.life(case, later, random.Random(3)) is None


def test_a_failure_becomes_small(script: Any, fuzzer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has stages fails: what is left is two of them."""
    monkeypatch.setattr(
        fuzzer, "wrong", lambda cases: ["wrong" if c.pipeline > 1 else None for c in cases]
    )
    case = script.Case(
        "gemma2",
        packing=True,
        dropout="keyed",
        micro=1,
        pipeline=4,
        tensor=2,
        schedule="interleaved-1f1b",
        recompute="full",
    )
    small = fuzzer.smallest(case)
    assert fuzzer.legal(small)
    assert (small.pipeline, small.tensor, small.recompute) == (2, 1, "none")
    assert (small.family, small.schedule, small.packing) == ("llama", "1f1b", False)
