"""The proof that no sample is lost or doubled, and that planted faults are found and named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from shoal.cli.data import app
from shoal.data.prepare import SourceSpec, prepare
from shoal.data.stream import Stream
from shoal.data.verify import FILE, digest, sample_header, sample_row, verify_run
from shoal.errors import RunError
from shoal.layout import split_evenly

BATCH = 8


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    folder = tmp_path_factory.mktemp("data")
    sources = []
    for name, count in {"a": 50, "b": 20}.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"text {n}"}) for n in range(count)))
        sources.append(SourceSpec(source=str(path), weight=2.0 if name == "a" else 1.0))
    prepared = prepare(
        sources=sources,
        encode=lambda records: [{"input_ids": list(r["text"].encode())} for r in records],
        encode_key="bytes",
        sequence_tokens=8,
        packing=False,
        validation_fraction=0.1,
        out=folder / "prepared",
    )
    return Stream(prepared, seed=0, global_batch_samples=BATCH)


def row(stream: Stream, step: int, *, workers: int = 2) -> dict[str, Any]:
    """As the loop does it: each worker reports the digest of the batch it computed on."""
    parts = [stream.at(step, split_evenly(BATCH, workers, index)) for index in range(workers)]
    read = sum(
        digest(source_ids=part["source_ids"], sample_ids=part["sample_ids"]) for part in parts
    )
    return sample_row(step, stream=stream, read=read)


def log(run: Path, rows: list[dict[str, Any] | str]) -> Path:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in rows]
    (run / FILE).write_text("\n".join(lines) + "\n")
    return run


def test_digest_does_not_depend_on_the_split() -> None:
    random = np.random.default_rng(0)
    ids = {
        "source_ids": random.integers(0, 3, 60),
        "sample_ids": random.integers(0, 2**40, 60),
    }
    whole = digest(**ids)
    parts = [
        digest(**{k: v[start : start + 7] for k, v in ids.items()}) for start in range(0, 60, 7)
    ]
    assert np.array_equal(whole, np.sum(parts, axis=0))
    swapped = digest(source_ids=ids["source_ids"][::-1], sample_ids=ids["sample_ids"])
    assert swapped[0] != whole[0]


def test_a_clean_run_over_restarts_at_other_degrees(stream: Stream, tmp_path: Path) -> None:
    header = sample_header(stream)
    rows = [header, *(row(stream, step, workers=2) for step in range(13))]
    rows += ['{"step": 13, "ids": {"a.js']  # killed while writing
    rows += [header, *(row(stream, step, workers=3) for step in range(10, 25))]
    report = verify_run(log(tmp_path, rows))
    assert report.problems == []
    assert (report.num_steps, report.num_samples) == (25, 25 * BATCH)
    assert (report.num_restarts, report.num_redone_steps, report.num_unreadable_rows) == (1, 3, 1)
    assert report.epochs["a.jsonl"] > 2 and report.epochs["b.jsonl"] > 2
    assert "no sample was lost, none was read twice" in str(report)


ODD = [
    *("", "null", "3", "[]", "{}", "[" * 100_000, '{"sources": []}', '{"sources": {"a.jsonl": 0}}'),
    '{"step": -1, "ids": {}, "read": null}',
    '{"step": 1000000000000, "ids": {}, "read": null}',
    '{"step": 2, "ids": {"c.jsonl": [1]}, "read": null}',
    '{"step": 2, "ids": {"a.jsonl": ["x"]}, "read": null}',
    '{"step": 2, "ids": {"a.jsonl": [9999999999999999999999]}, "read": null}',
    '{"step": 2, "ids": {}, "read": {"samples": 3, "hash": "zz"}}',
    '{"step": 2, "ids": {}, "read": []}',
]


def test_rows_that_cannot_be_are_counted_and_not_used(stream: Stream, tmp_path: Path) -> None:
    rows = [row(stream, step) for step in range(4)]
    report = verify_run(log(tmp_path, [sample_header(stream), *rows[:2], *ODD, *rows[2:]]))
    assert report.problems == [] and report.num_steps == 4
    assert report.num_unreadable_rows == len(ODD)


def test_a_run_shorter_than_an_epoch_is_clean(stream: Stream, tmp_path: Path) -> None:
    rows = [sample_header(stream), row(stream, 0), row(stream, 1)]
    assert verify_run(log(tmp_path, rows)).problems == []


def planted(stream: Stream, fault: str) -> list[dict[str, Any]]:
    rows = [row(stream, step) for step in range(20)]
    if fault == "a step is missing":
        del rows[7]
    elif fault == "a worker read the share of another":
        shares = [stream.at(7, split_evenly(BATCH, 2, 0))] * 2
        read = sum(
            digest(source_ids=part["source_ids"], sample_ids=part["sample_ids"]) for part in shares
        )
        rows[7] = sample_row(7, stream=stream, read=read)
    elif fault == "a worker read nothing":
        part = stream.at(7, split_evenly(BATCH, 2, 0))
        read = digest(source_ids=part["source_ids"], sample_ids=part["sample_ids"])
        rows[7] = sample_row(7, stream=stream, read=read)
    elif fault == "the data position was not restored":
        again = row(stream, 2)
        rows[7] = {**again, "step": 7}
    return [sample_header(stream), *rows]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a step is missing", "step 7: has no row; its samples are not accounted for"),
        ("a worker read the share of another", "step 7: workers read 8 samples, but not those"),
        ("a worker read nothing", "step 7: workers read 4 samples, expected 8"),
        (
            "the data position was not restored",
            r"step 7: sample \d+ of a.jsonl was read before, in",
        ),
    ],
)
def test_planted_faults_are_named(stream: Stream, tmp_path: Path, fault: str, message: str) -> None:
    report = verify_run(log(tmp_path, planted(stream, fault)))
    assert any(re.match(message, problem) for problem in report.problems), report


def test_lost_samples_are_counted(stream: Stream, tmp_path: Path) -> None:
    report = verify_run(log(tmp_path, planted(stream, "the data position was not restored")))
    assert any("samples of a.jsonl were never read, e.g." in p for p in report.problems)


def test_data_that_changed_at_a_restart(stream: Stream, tmp_path: Path) -> None:
    header = sample_header(stream)
    other = {"sources": {**header["sources"], "a.jsonl": 44}}
    rows = [header, row(stream, 0), other, row(stream, 1)]
    problems = verify_run(log(tmp_path, rows)).problems
    assert "the data changed at a restart" in problems[0]


def test_another_global_batch_after_a_restart_is_found(stream: Stream, tmp_path: Path) -> None:
    """Steps of 8 samples, then of 4: the second run begins in the middle of the first."""
    small = Stream(stream.prepared, seed=0, global_batch_samples=4)
    rows = [sample_header(stream), *(row(stream, step) for step in range(3))]
    ids = small.ids(3)
    read = digest(source_ids=ids[:, 0], sample_ids=ids[:, 1])
    rows += [sample_header(small), sample_row(3, stream=small, read=read)]
    problems = verify_run(log(tmp_path, rows)).problems
    assert any("was read before" in problem for problem in problems)


def test_the_command(stream: Stream, tmp_path: Path) -> None:
    good = log(tmp_path, [sample_header(stream), row(stream, 0)])
    said = CliRunner().invoke(app, ["verify", str(good)])
    assert said.exit_code == 0 and "none was read twice" in said.output
    bad = log(tmp_path, planted(stream, "a step is missing"))
    said = CliRunner().invoke(app, ["verify", str(bad)])
    assert said.exit_code == 1 and "PROBLEM step 7" in said.output
    said = CliRunner().invoke(app, ["list"])
    assert said.exit_code == 0 and "chitchat" in said.output and "licence: MIT" in said.output


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"samples.jsonl: cannot be read .*Name a run directory"):
        verify_run(tmp_path)
    with pytest.raises(RunError, match=r"holds no committed step"):
        verify_run(log(tmp_path, ['{"sources": {"a": 3}}']))
