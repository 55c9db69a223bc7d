"""Three hosts that share nothing but an S3, which a fourth one serves: who is lost, who is cut off.

Each host has its own run folder and cache; only the store is common.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from hosts.lab import Lab, why_not
from hosts.test_agents_over_hosts import EXACT, Cluster
from hosts.test_own_disks_over_hosts import CACHE, Apart
from s3_server import asking, reaching, serving
from tiny import Bench

REASON = why_not() or (None if find_spec("moto") and find_spec("s3fs") else "no moto or s3fs")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(REASON), reason=str(REASON)),
]
PORT = 5000
WORDS = (
    *EXACT,
    "parallel.replicate={min: 1, max: 3}",
    "checkpoint.where=s3://bucket/run",
    "checkpoint.every_steps=20",
    "checkpoint.keep_best=false",
    "train.steps=240",
    "train.evaluate_every_steps=120",
)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with Lab(4, tmp_path / "lab") as lab:
        *hosts, serves = lab.hosts
        for name, value in reaching(serves.address, PORT).items():
            monkeypatch.setenv(name, value)
        with (tmp_path / "s3.log").open("w") as log:
            serves.start(*serving("0.0.0.0", PORT), stdout=log, stderr=log)
        asked = f"until </dev/tcp/{serves.address}/{PORT}; do sleep 0.2; done"
        serves.run("timeout", "60", "bash", "-c", asked)
        serves.run(*asking("make", "bucket"))
        folder = tmp_path / "cluster"
        folder.mkdir()
        lab.hosts = hosts
        made = Cluster(lab, folder, environments={host.name: CACHE for host in hosts})
        lab.hosts = [*hosts, serves]
        yield made


def names(cluster: Cluster) -> list[str]:
    """Of all objects of the run."""
    listed = json.loads(cluster.lab.hosts[-1].run(*asking("find", "bucket")))
    return [name.removeprefix("bucket/run/") for name in listed]


def test_the_coordinators_host_is_lost_and_another_begins_where_it_saved(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    """With all of its disk. Nobody but the store has a save, or a row of the run."""
    h1, h2, h3 = cluster.hosts[:3]
    training = Apart(cluster, bench, [h1, h2, h3], *WORDS, log=tmp_path / "first.log")
    training.until(lambda: len(training.events("saved")) > 2)
    h1.power_off()
    training.process.wait(timeout=20)
    assert not (h2.disk / "run/config.yaml").exists() and not list(h2.disk.glob("run/check*"))
    again = Apart(cluster, bench, [h2, h3], *WORDS, "--go-on", log=tmp_path / "again.log")
    again.end()
    whole = bench.run(*(word for word in WORDS if "where" not in word))
    assert again.run.weights == whole.weights
    assert 0 < len(again.run.losses) < 240
    assert again.run.losses == whole.losses[-len(again.run.losses) :]
    found = names(cluster)
    saves = {name.partition("/")[0] for name in found if "/" in name}
    assert saves == {"step-00000220.s2", "step-00000240.s2"}
    assert "start-00000002.saves.json" in found and "start-00000003.json" not in found


def test_of_two_sides_that_do_not_see_each_other_one_counts(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    """Both reach the store. Who has not begun last is told so, and its run ends without a save."""
    h1, h2, h3 = cluster.hosts[:3]
    first = Apart(cluster, bench, [h1, h2, h3], *WORDS, log=tmp_path / "first.log")
    first.until(lambda: len(first.events("saved")) > 1)
    cluster.lab.cut(h1, h2, h3)
    second = Apart(cluster, bench, [h2, h3], *WORDS, "--go-on", log=tmp_path / "second.log")
    second.end()
    assert first.process.wait(timeout=200) not in (0, 75)
    said = first.log.read_text()
    assert "goes on with the run in s3://bucket/run by now" in said, said[-3000:]
    assert "of h2 goes on" in said
    whole = bench.run(*(word for word in WORDS if "where" not in word))
    assert second.run.weights == whole.weights
    saves = {name.partition("/")[0] for name in names(cluster) if "/" in name}
    assert {"step-00000220.s2", "step-00000240.s2"} <= saves
    left = {each for each in saves if each.endswith(".s1")}
    assert not any(f"{each}/manifest.json" in names(cluster) for each in left), "not one counts"
