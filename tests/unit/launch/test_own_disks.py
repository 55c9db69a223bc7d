"""What is refused of saves on own disks, and what a host gives to others and takes from them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
import zmq

from held_agent import SECRET, HeldAgent
from shoal.comm.guard import Guard
from shoal.comm.keys import Keys
from shoal.comm.line import LARGEST_MESSAGE
from shoal.config.load import resolve
from shoal.engine.decision import given_layout
from shoal.environment import cache_directory
from shoal.errors import ConfigError, FetchError, RunError
from shoal.launch import calls, local, torchrun
from shoal.launch.directory import DISK
from shoal.launch.elected import Servers, train_elected
from shoal.launch.host_files import disk_of
from shoal.launch.over_hosts import OverHosts, has_whole_saves
from shoal.launch.peers import PIECE_BYTES, Source, Wanted, bring_folder, is_cached, piece
from shoal.launch.pool import WorkerPool
from tiny import Bench

KEYS = Keys.of(SECRET)
TWO = OverHosts(["tcp://10.0.0.1:1", "tcp://10.0.0.2:1"], SECRET)


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        (["parallel.replicate=2"], True),
        (["parallel.replicate=5"], True),
        (["parallel.replicate=2", "sync={kind: local-sgd, every_steps: 4}"], False),
        (["parallel.replicate=2", "sync.codec={kind: int8}"], False),
        (["parallel={replicate: 1, pipeline: 2}"], False),
    ],
)
def test_who_saves_all_of_it(bench: Bench, words: list[str], whole: bool) -> None:
    recipe = resolve(bench.recipe, [*words, "checkpoint.where=local"])
    assert TWO.overrides(recipe)
    assert has_whole_saves(recipe, given_layout(recipe), num_hosts=2) is whole


def test_a_registry_is_refused(bench: Bench) -> None:
    """Before one leads, and before etcd is asked."""
    words, servers = ["checkpoint.where=local"], Servers(["http://127.0.0.1:1"])
    given: dict[str, Any] = {"hosts": TWO, "servers": servers, "pool": bench.pool}
    with pytest.raises(ConfigError, match="with --etcd saves are on storage"):
        train_elected(str(bench.recipe), words, out=bench.new_path(), **given)


def test_torchrun_is_refused(bench: Bench) -> None:
    recipe = resolve(bench.recipe, ["parallel.replicate=2", "checkpoint.where=local"])
    with pytest.raises(ConfigError, match=r"checkpoint\.where: torchrun's workers save"):
        torchrun._check_size(recipe, size=2)


@pytest.mark.slow
def test_hosts_that_share_the_folder_are_named(bench: Bench, pool: WorkerPool) -> None:
    """Else they would save over each other; nothing but an empty folder is left behind."""
    agents = [HeldAgent(pool), HeldAgent(pool)]
    out = bench.new_path()
    over = OverHosts([each.agent.address for each in agents], SECRET)
    try:
        with pytest.raises(RunError, match="have the run folder in common"):
            local.train(
                bench.recipe,
                ["parallel.replicate=2", "checkpoint.where=local"],
                out=out,
                console=False,
                pool=pool,
                hosts=over,
            )
    finally:
        for each in agents:
            each.close()
    assert [path.name for path in out.iterdir()] == [DISK]
    assert disk_of(out) == (out / DISK).read_text()


@pytest.mark.slow
def test_one_host_alone_saves_as_ever(bench: Bench) -> None:
    words = ("train.steps=8", "train.evaluate_every_steps=4")
    assert bench.run(*words, "checkpoint.where=local").digits == bench.run(*words).digits


def test_what_other_hosts_may_read(tmp_path: Path) -> None:
    cached, run = cache_directory() / "prepared" / "test-may-be-read", tmp_path / "run"
    save = run / "checkpoints" / "step-00000010"
    for folder in (cached, save, run / "model"):
        folder.mkdir(parents=True)
        (folder / "a.bin").write_bytes(b"0123456789")
    (cached / "link.bin").symlink_to(run / "model" / "a.bin")
    (cached / "way").symlink_to(run / "model")

    def answer(folder: Path | str, file: str = "a.bin", offset: int = 0) -> calls.Piece:
        asked = calls.AskPiece(folder=str(folder), file=file, offset=offset)
        return piece(asked, run=str(run))

    for folder in (cached, save):
        found = answer(folder, offset=4)
        assert (found.data, found.total, found.offset) == (b"456789", 10, 4)
    not_theirs = [
        answer(run / "model"),
        answer(tmp_path),
        answer(cached, "../test-may-be-read/a.bin"),
        answer(f"{cached}/../../../etc", "passwd"),
        answer(cached / "way"),
        answer(run / "checkpoints"),
        answer(cache_directory()),
    ]
    assert {each.problem for each in not_theirs} == {"is not for other hosts"}
    assert "is a link" in answer(cached, "link.bin").problem
    assert "No such file" in answer(cached, "none.bin").problem
    assert not is_cached(cached / "way") and not is_cached(Path("prepared"))


@contextmanager
def peer(say: Callable[[calls.AskPiece], calls.Piece | None]) -> Iterator[str]:
    """A host with the run's secret that answers as it likes; its address."""
    context: Any = zmq.Context()
    guard = Guard(context, keys=KEYS, largest_frame=LARGEST_MESSAGE, high_water_mark=0)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            if guard.socket in guard.ready(timeout_seconds=0.05):
                whom, text = guard.socket.recv_multipart()
                found = say(msgspec.msgpack.decode(text, type=calls.AskPiece))
                if found is not None:
                    guard.socket.send_multipart([whom, msgspec.msgpack.encode(found)])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield guard.address
    finally:
        ended.set()
        thread.join()
        guard.close()
        context.destroy(linger=0)


CONTENT = bytes(range(251)) * 20_000
"""Some pieces, the last of which is not full."""


def honest(asked: calls.AskPiece) -> calls.Piece:
    data = CONTENT[asked.offset : asked.offset + PIECE_BYTES]
    return calls.Piece(offset=asked.offset, data=data, total=len(CONTENT))


def changed(**more: Any) -> Callable[[calls.AskPiece], calls.Piece]:
    return lambda asked: msgspec.structs.replace(honest(asked), **more)


def wanted(size: int | None = len(CONTENT), content: bytes = CONTENT) -> Wanted:
    return Wanted("a.bin", size, xxhash.xxh3_128_hexdigest(content), xxhash.xxh3_128)


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_file_arrives_bit_for_bit(tmp_path: Path, size: int | None) -> None:
    with peer(honest) as address, Source(address, keys=KEYS) as source:
        source.get(Path("/x"), wanted(size), into=tmp_path / "a.bin")
        assert source.num_bytes == len(CONTENT)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("say", "words"),
    [
        (changed(total=1 << 50), "expected 5020000 bytes, got 1125899906842624"),
        (changed(data=b""), "other bytes than were asked for"),
        (changed(data=CONTENT), "other bytes than were asked for"),
        (changed(offset=7), "other bytes than were asked for"),
        (changed(data=bytes(PIECE_BYTES)), "other bytes than were asked for"),
        (changed(problem="No space"), "No space"),
    ],
    ids=["size", "nothing", "too-much", "elsewhere", "short", "problem"],
)
def test_other_answers_are_refused(tmp_path: Path, say: Any, words: str) -> None:
    with (
        peer(say) as address,
        Source(address, keys=KEYS) as source,
        pytest.raises(FetchError, match=words),
    ):
        source.get(Path("/x"), wanted(), into=tmp_path / "a.bin")


def test_a_size_that_nobody_said_before_is_limited(tmp_path: Path) -> None:
    with (
        peer(changed(total=1 << 50)) as address,
        Source(address, keys=KEYS) as source,
        pytest.raises(FetchError, match="bytes"),
    ):
        source.get(Path("/x"), wanted(None), into=tmp_path / "a.bin")


def test_other_bytes_are_refused_and_the_next_source_is_asked(tmp_path: Path) -> None:
    """A hash that fits does not come of them; what was begun is gone."""

    def wrong(asked: calls.AskPiece) -> calls.Piece:
        found = honest(asked)
        return msgspec.structs.replace(found, data=found.data[:-1] + b"\xff")

    contents = {
        "files": {"a.bin": len(CONTENT)},
        "hashes": {"a.bin": xxhash.xxh3_128_hexdigest(CONTENT)},
    }
    folder = tmp_path / "data"
    with peer(wrong) as bad, peer(honest) as good:
        with pytest.raises(FetchError, match="its bytes are not those that were written"):
            bring_folder(folder, contents, sources=[bad], keys=KEYS)
        assert not any(tmp_path.iterdir())
        found = bring_folder(folder, contents, sources=[bad, good], keys=KEYS)
        assert found.num_bytes == 2 * len(CONTENT) and len(found.refused) == 1
        assert (folder / "a.bin").read_bytes() == CONTENT
        assert bring_folder(folder, contents, sources=[], keys=KEYS).num_bytes == 0
