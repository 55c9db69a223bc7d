"""Runs that save to a store of objects: refused where they cannot, the same bits where they can."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from shoal.checkpoint.objects import Objects, StoreError
from shoal.checkpoint.remote import ObjectStore
from shoal.cli import api
from shoal.config.load import load_recipe, resolve
from shoal.engine.job import Instruments
from shoal.errors import CheckpointError, ConfigError, RunError
from shoal.launch import local, torchrun
from shoal.launch.object_store import asked, problem_of, reader_of
from shoal.launch.over_hosts import OverHosts
from shoal.launch.score import score
from shoal.observe.console import Console
from shoal.prove.compare import Choice, compare
from shoal.prove.rehearse import Fault, rehearse
from tiny import Bench, Run

LENGTH = ("train.steps=12", "train.evaluate_every_steps=6", "checkpoint.every_steps=4")


def listed(url: str) -> ObjectStore:
    return ObjectStore(Objects(url))


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("memory://a/b", "seen by one process only"),
        ("sftp://host/a", "cannot create an object only if there is none"),
        ("simplecache::s3://a/b", "cannot create an object only if there is none"),
        ("gs://a/b", "cannot create an object only if there is none"),
    ],
)
def test_what_could_count_twice_is_refused(bench: Bench, where: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"checkpoint\.where: .*{words}"):
        bench.train(f"checkpoint.where={where}")
    with pytest.raises(ConfigError, match=rf"checkpoint\.where: .*{words}"):
        recipe = resolve(bench.recipe, [f"checkpoint.where={where}"])
        torchrun._check_size(recipe, size=1)


def test_a_protocol_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.launch.object_store.find_spec", lambda name: None)
    found = problem_of("s3://bucket/a")
    assert found is not None and (found.what, found.hint) == (
        "s3:// needs s3fs",
        "pip install s3fs",
    )
    assert problem_of("file:///a") is None and problem_of("shared") is None


def test_a_store_that_is_away_for_a_moment_is_asked_again() -> None:
    """When workers begin again, nobody has made a mistake; what is refused is not asked again."""
    calls: list[int] = []

    def call(*, away: bool) -> str:
        calls.append(1)
        if len(calls) < 2:
            raise StoreError("no", away=away)
        return "yes"

    ask = partial(asked, doing="asking", say=None, patience_seconds=30.0)
    assert ask(partial(call, away=True)) == "yes"
    calls.clear()
    with pytest.raises(RunError, match=r"no\n    see to it that checkpoint.where names a bucket"):
        ask(partial(call, away=False))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "where", ["s3:/bucket", "everywhere", "", "file:///", "file://a", "s3://a b"]
)
def test_what_is_no_place_is_refused(bench: Bench, where: str) -> None:
    with pytest.raises(ConfigError, match="expected shared, local, or a URL such as s3://bucket"):
        resolve(bench.recipe, {"checkpoint.where": where})


def test_a_registry_beside_it_is_refused(bench: Bench, tmp_path: Path) -> None:
    over = OverHosts(["tcp://10.0.0.1:1", "tcp://10.0.0.2:1"], b"s" * 32, run="/run")
    words = ["parallel.replicate=2", f"checkpoint.where=file://{tmp_path}"]
    with pytest.raises(ConfigError, match="with --etcd saves are on storage"):
        over.overrides(resolve(bench.recipe, words))


def test_a_place_that_cannot_be_written_is_told_at_the_start(bench: Bench) -> None:
    out = bench.new_path()
    words = [*LENGTH, "checkpoint.where=file:///proc/none"]
    with pytest.raises(RunError, match=r"file:///proc/none/check-.*: cannot be created: "):
        local.train(bench.recipe, words, out=out, console=False, pool=bench.pool)
    assert not out.exists()


def test_a_run_has_the_bits_that_it_has_in_a_folder(bench: Bench, tmp_path: Path) -> None:
    """Stopped and resumed in another number of replicas, which read each other's parts."""
    url, words = f"file://{tmp_path}/store", ("parallel.replicate=2", *LENGTH)
    where = f"checkpoint.where={url}"
    run = bench.train(*words, where, "train.stop_after_steps=6")
    assert listed(url).steps() == [4, 6] and not (run.path / "checkpoints").exists()
    bench.resume(run)
    plain = bench.train(*words, "train.stop_after_steps=6")
    bench.resume(plain)
    assert run.digits == plain.digits and run.weights == plain.weights
    assert listed(url).steps() == [8, 12]
    assert sum(name.endswith(".saves.json") for name in Objects(url).sizes()) == 2
    assert not any(name.endswith(".report") for name in Objects(url).sizes())
    # by anybody, from anywhere
    for number, source in enumerate((run.path, url, f"{url}/step-00000012.s2")):
        merged = api.merge(source, tmp_path / f"merged-{number}")
        assert (merged / "model.safetensors").read_bytes() == (
            run.path / "model/model.safetensors"
        ).read_bytes()
    told: list[str] = []
    assert reader_of(url, say=told.append).step == 12 and told == [f"reading from {url}"]
    with pytest.raises(CheckpointError, match="no save of step 4 counts there"):
        reader_of(f"{url}/step-00000004", say=told.append)
    folder = api.Result(run.path, {}).checkpoint()
    assert json.loads((folder / "manifest.json").read_text())["body"]["step"] == 12
    # and nobody begins another run in it
    with pytest.raises(RunError, match=r"has saves of a run already \(to step 12\)"):
        bench.train(*words, where)


@pytest.mark.slow
def test_a_run_goes_on_where_its_folder_was_lost(bench: Bench, tmp_path: Path) -> None:
    """On another machine, say, by the line that began it; not by one of another recipe."""
    where = f"checkpoint.where=file://{tmp_path}/store"
    bench.train(*LENGTH, where, "train.stop_after_steps=6")
    out = bench.new_path()
    known = {"console": False, "pool": bench.pool, "go_on": True}
    with pytest.raises(ConfigError, match="seed: cannot change in a run that goes on"):
        local.train(bench.recipe, [*LENGTH, where, "seed=9"], out=out, **known)
    assert not out.exists()
    local.train(bench.recipe, [*LENGTH, where], out=out, **known)
    whole = bench.run(*LENGTH)
    assert Run(out).losses == whole.losses[6:] and Run(out).weights == whole.weights
    assert load_recipe(str(out / "config.yaml")).checkpoint.where in where


@pytest.mark.slow
def test_where_nothing_is_left_a_resume_says_so(bench: Bench, tmp_path: Path) -> None:
    run = bench.train(*LENGTH, "train.stop_after_steps=6")
    with pytest.raises(RunError, match="has no save of this run, though it has saved some"):
        bench.resume(run, f"checkpoint.where=file://{tmp_path}/store")
    bench.resume(run)
    assert run.losses == bench.run(*LENGTH).losses


@pytest.mark.slow
def test_workers_that_start_again_are_another_start(bench: Bench, tmp_path: Path) -> None:
    """What a lost one might still write does not count any more."""
    url, out = f"file://{tmp_path}/store", bench.new_path()
    fault = {"kind": "kill", "rank": 0, "step": 7, "phase": "forward", "number": 0}
    local.train(
        bench.recipe,
        [*LENGTH, f"checkpoint.where={url}"],
        out=out,
        console=False,
        pool=bench.pool,
        instruments=Instruments(planned_faults=(fault,)),
    )
    whole = bench.run(*LENGTH)
    assert Run(out).losses == whole.losses and Run(out).weights == whole.weights
    assert "restarted" in Run(out).events
    saves = {name.partition("/")[0] for name in Objects(url).sizes() if "/" in name}
    assert saves == {"step-00000008.s2", "step-00000012.s2"}


def test_several_runs_do_not_share_a_store(bench: Bench, tmp_path: Path) -> None:
    where = [f"checkpoint.where=file://{tmp_path}/store"]
    with pytest.raises(ConfigError, match="a store has the saves of one"):
        rehearse(bench.recipe, where, faults=[Fault("kill", 0, 2)], out=tmp_path / "a")
    choices = [Choice("a", []), Choice("b", ["seed=4"])]
    with pytest.raises(ConfigError, match="a store has the saves of one"):
        compare(bench.recipe, where, choices=choices, out=tmp_path / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_scoring_leaves_the_store_alone(bench: Bench, tmp_path: Path) -> None:
    run, url = bench.run(*LENGTH), f"file://{tmp_path}/store"
    with Console() as console:
        found = score(
            run.path,
            recipe=bench.recipe,
            overrides=[f"checkpoint.where={url}"],
            console=console,
            pool=bench.pool,
        )
    assert found["evaluation_loss"] > 0 and Objects(url).sizes() == {}
