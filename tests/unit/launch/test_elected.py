"""What coordinators of a run must have alike, over a real etcd: differences are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from held_agent import SECRET
from shoal.config.load import resolve
from shoal.errors import DataError, RunError
from shoal.launch.elected import Servers, name_of, spec_of, train_elected
from shoal.launch.over_hosts import OverHosts
from shoal.launch.pool import WorkerPool
from shoal.launch.prepare import source_digest
from shoal.launch.registry.membership import Membership
from tiny import Bench, write_corpus
from unit.launch.etcd_server import etcd_server, has_etcd
from unit.launch.test_registry import facts


def test_the_digest_is_of_all_content_and_of_nothing_else(bench: Bench, tmp_path: Path) -> None:
    held = write_corpus(tmp_path / "held.jsonl", seed=1, documents=20)
    words = [f"data.validation.source={held}", "data.validation.fraction=null"]

    def digest(*more: str) -> str:
        return source_digest(resolve(str(bench.recipe), [*words, *more]))

    first = digest()
    assert digest("train.steps=7") == first
    elsewhere = tmp_path / "other" / bench.corpus.name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(bench.corpus.read_bytes())
    assert digest(f"data.source={elsewhere}") == first
    elsewhere.write_bytes(bench.corpus.read_bytes() + b'{"text": "one more"}\n')
    assert digest(f"data.source={elsewhere}") != first
    write_corpus(held, seed=2, documents=20)
    assert digest() != first
    with pytest.raises(DataError, match="there is no file"):
        digest(f"data.source={tmp_path / 'nothing.jsonl'}")


@pytest.mark.skipif(not has_etcd(), reason="etcd is not installed (etcd-server)")
def test_a_coordinator_with_other_data_is_refused_before_anything_starts(
    bench: Bench, pool: WorkerPool, tmp_path: Path
) -> None:
    """The same path, as on a disk of its own, with one more document in the file."""
    data, out = write_corpus(tmp_path / "tales.jsonl", documents=20), tmp_path / "run"
    words = [f"data.source={data}"]
    hosts = OverHosts(["tcp://127.0.0.1:1"], SECRET)
    with etcd_server(tmp_path) as endpoint:
        servers = Servers([endpoint])
        store = servers.store(name_of(out, secret=SECRET))
        theirs = resolve(str(bench.recipe), [*words, "train.steps=31"])
        Membership(store, facts("h1")).enrol(spec_of(theirs, run=out))
        with data.open("a") as file:
            file.write('{"text": "one more"}\n')
        with pytest.raises(RunError, match=r"cannot take part in a run of h1: it differs") as error:
            train_elected(
                str(bench.recipe), words, out=out, hosts=hosts, servers=servers, pool=pool
            )
    lines = str(error.value).splitlines()
    assert lines[1] == "    recipe.train.steps: 30 here, 31 there"
    assert lines[2].startswith("    data: ") and len(lines) == 4
    assert not out.exists()
