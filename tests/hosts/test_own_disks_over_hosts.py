"""Three hosts that share no storage: each saves on its own disk, and the data comes from a peer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from hosts.lab import Host, Lab, why_not
from hosts.test_agents_over_hosts import EXACT, Cluster, Training
from shoal.data.storage import contents_of
from shoal.environment import AGENT_PORT
from tiny import Bench, Run, shoal, write_corpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
CACHE = {"SHOAL_CACHE": "/srv/cache"}
WORDS = (
    *EXACT,
    "parallel.replicate={min: 1, max: 3}",
    "checkpoint.where=local",
    "checkpoint.every_steps=20",
    "checkpoint.keep_best=false",
    "train.steps=120",
    "train.evaluate_every_steps=60",
)


class Apart(Training):
    """A coordinator on the first of `hosts`, where its run folder is, as on each of them."""

    def __init__(
        self,
        cluster: Cluster,
        bench: Bench,
        hosts: Sequence[Host],
        *words: str,
        log: Path,
        out: Path | None = None,
    ) -> None:
        """`out`: a folder that all hosts see."""
        self.run, self.log = Run(out or hosts[0].disk / "run"), log
        listed = log.with_suffix(".hosts")
        listed.write_text("".join(f"{host.address}\n" for host in hosts))
        command = ("launch", "hosts", bench.recipe, "--hosts", listed, "--keys", cluster.keys)
        with log.open("w") as file:
            self.process = hosts[0].start(
                *shoal(*command, "--out", out or "/srv/run", *words),
                env=CACHE,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> None:
        assert self.process.wait(timeout=200) == 0, self.log.read_text()[-4000:]


@contextmanager
def three_apart(tmp_path: Path) -> Iterator[Cluster]:
    """Run folder and cache of each host are on its own disk."""
    with Lab(3, tmp_path / "lab") as lab:
        folder = tmp_path / "cluster"
        folder.mkdir()
        yield Cluster(lab, folder, environments={host.name: CACHE for host in lab.hosts})


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with three_apart(tmp_path) as made:
        yield made


def saves(host: Host) -> list[str]:
    return sorted(path.name for path in (host.disk / "run/checkpoints").glob("step-*"))


def workers_of(host: Host) -> list[str]:
    """Of its agent: its fork server's children. The coordinator has a fork server of its own."""
    found = host.run("pgrep", "-f", "agent --listen").split()[-1:]
    for _ in range(2):
        found = host.run("pgrep", "-P", ",".join(found)).split()
    return found


def kill_coordinator(host: Host) -> None:
    inside = int(host.run("pgrep", "-f", "launch hosts").split()[0])
    host.run("kill", "-9", str(inside))


def test_a_host_is_lost_for_good_and_the_others_go_on(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    """Between two saves; then the coordinator goes too, and starts again on the two."""
    h1, h2, h3 = cluster.hosts
    training = Apart(cluster, bench, cluster.hosts, *WORDS, log=tmp_path / "first.log")
    training.until(lambda: training.events("saved"))
    assert {each["host"].split()[0] for each in training.events("fetched")} == {"h2", "h3"}
    h3.power_off()
    training.until(lambda: len(training.events("saved")) > 2)
    kill_coordinator(h1)
    training.process.wait(timeout=10)
    print(saves(h1), saves(h2), saves(h3))
    assert saves(h1)[-1] == saves(h2)[-1] > saves(h3)[-1]
    again = Apart(cluster, bench, [h1, h2], *WORDS, "--go-on", log=tmp_path / "again.log")
    again.end()
    one_machine = bench.run(*WORDS)
    assert again.run.losses == one_machine.losses
    assert again.run.weights == one_machine.weights
    assert saves(h1) == saves(h2)
    assert [row["step"] for row in again.run.rows if "loss" in row] == list(range(1, 121))


def test_all_workers_die_and_the_last_save_is_put_in_place(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    """While the coordinator runs: one host has lost its saves meanwhile, and gets them again."""
    h1, h2, _ = cluster.hosts
    words = (*WORDS, "parallel.replicate=2")
    training = Apart(cluster, bench, [h1, h2], *words, log=tmp_path / "run.log")
    training.until(lambda: training.events("saved"))
    shutil.rmtree(h2.disk / "run/checkpoints")
    workers = [(host, workers_of(host)) for host in (h1, h2)]
    for host, pids in workers:
        host.run("kill", "-9", *pids)
    training.end()
    assert len(training.events("restarted")) == 1
    (handed,) = training.events("save-handed-on")
    assert "to h2" in handed["text"]
    one_machine = bench.run(*words)
    assert training.run.losses == one_machine.losses
    assert training.run.weights == one_machine.weights
    assert saves(h1) == saves(h2)


def test_the_holders_of_the_last_save_are_lost(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    """The third host has it torn: it goes back one save, says so, and hands that one on."""
    h1, h2, h3 = cluster.hosts
    training = Apart(cluster, bench, cluster.hosts, *WORDS, log=tmp_path / "first.log")
    training.until(lambda: len(training.events("saved")) > 1)
    training.stop()
    before, last = saves(h3)[-2:]
    for host in (h1, h2):
        shutil.rmtree(host.disk / "run")
    torn = h3.disk / "run/checkpoints" / last / "rank-00000.safetensors"
    flip(torn, -1)
    again = Apart(cluster, bench, [h3, h1], *WORDS, "--go-on", log=tmp_path / "again.log")
    again.end()
    (lost,) = again.events("save-lost")
    assert f"step {int(last[5:])} was on" in lost["text"] and "going back" in lost["text"]
    (handed,) = again.events("save-handed-on")
    assert handed["step"] == int(before[5:]) and "to h1" in handed["text"]
    (resumed,) = again.events("resumed")
    assert resumed["step"] == int(before[5:])
    one_machine = bench.run(*WORDS)
    assert again.run.losses == one_machine.losses[int(before[5:]) :]
    assert again.run.weights == one_machine.weights


FETCH = """
import json, sys
from pathlib import Path
from shoal.comm.keys import Keys
from shoal.data.storage import contents_of
from shoal.launch.peers import bring_folder
from shoal.launch.secret import read_secret

keys, folder, contents, *sources = sys.argv[1:]
found = bring_folder(
    Path(folder), json.loads(contents), sources=sources, keys=Keys.of(read_secret(Path(keys)))
)
assert contents_of(Path(folder)) == json.loads(contents)
print(json.dumps([found.num_bytes, found.refused]))
"""


def test_hosts_may_share_the_run_and_not_the_cache(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    words, out = ("parallel.replicate=2", "train.steps=8"), tmp_path / "run"
    training = Apart(cluster, bench, cluster.hosts[:2], *words, log=tmp_path / "log", out=out)
    training.end()
    found = training.events("fetched")
    assert {each["host"].split()[0] for each in found} == {"h2"} and len(found) == 3
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["fetched_bytes"].values()) == [sum(each["bytes"] for each in found)]
    one_machine = bench.run(*words)
    assert training.run.digits == one_machine.digits
    assert training.run.weights == one_machine.weights


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_data_that_is_not_what_was_written_is_left(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    """One byte of it is another on h2, where no digest of blocks looks."""
    h1, h2, h3 = cluster.hosts
    source = write_corpus(tmp_path / "long.jsonl", documents=4000)
    words = (f"data.source={source}", "train.steps=4", "checkpoint.where=local")
    two, three = (
        ("parallel.replicate=2",),
        ("parallel.replicate=3", "train.global_batch_samples=12"),
    )
    Apart(cluster, bench, [h1, h2], *words, *two, log=tmp_path / "first.log").end()
    (tokens,) = (h2.disk / "cache/prepared").glob("source-*/train.input_ids")
    right = tokens.read_bytes()
    assert len(right) > 100_000, "so that blocks leave gaps"
    flip(tokens, 6000)
    for host in (h1, h2):
        shutil.rmtree(host.disk / "run")
    hosts = [h1, h3, h2]
    training = Apart(cluster, bench, hosts, *words, *three, log=tmp_path / "second.log")
    training.end()
    assert tokens.read_bytes() == right, "h2 was given it anew"
    counted = {"h2": 0, "h3": 0}
    for each in training.events("fetched"):
        counted[each["host"].split()[0]] += each["bytes"]
    assert counted["h3"] > counted["h2"] > len(right)
    summary = json.loads((h1.disk / "run/summary.json").read_text())
    found = {name.split()[0]: count for name, count in summary["fetched_bytes"].items()}
    assert found == counted
    assert training.run.losses == bench.run(*words, *three).losses

    folder = Path("/srv/cache/prepared", tokens.parent.name)
    contents = contents_of(tokens.parent)
    flip(tokens, 6000)
    shutil.rmtree(h3.disk / "cache/prepared" / folder.name)
    sources = [f"tcp://{host.address}:{AGENT_PORT}" for host in (h2, h1)]
    fetch = (sys.executable, "-c", FETCH, cluster.keys, folder, json.dumps(contents), *sources)
    num_bytes, refused = json.loads(h3.run(*fetch, env=CACHE))
    assert len(refused) == 1 and "train.input_ids of 10.77.0.2" in refused[0], refused
    assert "its bytes are not those that were written" in refused[0]
    assert num_bytes > sum(contents["files"].values())
    elsewhere = (*fetch[:4], "/srv/secret", *fetch[5:])
    with pytest.raises(AssertionError, match="is not for other hosts"):
        h3.run(*elsewhere, env={"SHOAL_CACHE": "/srv"})
