"""What all tests share: an environment of their own, one fork server, one bench for tiny runs."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator

# Before anything imports torch: a test run shares few cores with others, and must not spin.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["GOMP_SPINCOUNT"] = "0"
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LC_ALL"] = "C.UTF-8"  # messages are read in English, whoever runs the tests
# Workers of the pool may run functions of tests/*.py. benchmarks/ (planner_score is tested) comes
# last, so that no module there hides one of the tests'.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        os.path.dirname(__file__),
        *filter(None, [os.environ.get("PYTHONPATH")]),
        os.path.join(os.path.dirname(os.path.dirname(__file__)), "benchmarks"),
    ]
)

import hypothesis
import pytest

from shoal.launch.pool import WorkerPool
from tiny import Bench

sys.path.append(os.environ["PYTHONPATH"].split(os.pathsep)[-1])
sys.path.append(os.path.join(os.path.dirname(os.path.dirname(__file__)), "scripts"))

# A busy machine is no reason to fail: tests have a timeout of their own.
hypothesis.settings.register_profile("shoal", deadline=None)
hypothesis.settings.load_profile("shoal")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`quick(n)`: of a test's cases those behind the first n are slow."""
    seen = Counter[str]()
    for item in items:
        mark = item.get_closest_marker("quick")
        if mark is None:
            continue
        name = item.nodeid.partition("[")[0]
        seen[name] += item.get_closest_marker("slow") is None
        if seen[name] > mark.args[0]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test prepares goes into the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pool(_own_cache: None) -> Iterator[WorkerPool]:
    """The fork server of the session: a job costs what it computes, not what it imports."""
    with WorkerPool() as workers:
        yield workers


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> Bench:
    """Trains the tiny recipe; see tests/tiny.py."""
    return Bench(tmp_path_factory.mktemp("bench"), pool=pool)
