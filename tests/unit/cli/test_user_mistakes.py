"""The user's mistakes: exit 2, one message that names the key or file, nothing written over."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import pytest

from shoal.cli.main import main
from shoal.errors import FetchError, ModelError, RunError, UserError
from shoal.launch import local
from shoal.observe.events import read_lines
from tiny import Bench, Run, shoal


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> object:
    """Run the command in this process; returns (exit status, what it said on standard error)."""

    def run(*words: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        return int(end.value.code or 0), capsys.readouterr().err

    return run


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_unknown_key(told, bench: Bench, tmp_path: Path) -> None:
    status, said = told("train", bench.recipe, "train.step=3", "--out", tmp_path / "run")
    assert status == 2
    assert "train.step: unknown key" in said and "did you mean 'steps'?" in said
    assert "Traceback" not in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--lr", "KEY=VALUE: did you mean 'train.optimizer.learning_rate'?"),
        ("--batch-size", "KEY=VALUE: did you mean 'train.global_batch_samples'?"),
        ("--steps", "KEY=VALUE: did you mean 'train.steps'?"),
    ],
)
def test_an_option_that_is_a_key(told, option: str, said: str) -> None:
    status, text = told("train", "quickstart", option, "3")
    assert status == 2 and f"No such option: {option}" in text and said in text


def test_an_option_that_is_nothing(told) -> None:
    status, text = told("train", "quickstart", "--nosuchthing")
    assert status == 2 and "No such option" in text and "KEY=VALUE:" not in text


def test_escape_sequences_in_a_name_are_shown_not_sent(told, bench: Bench) -> None:
    status, said = told("train", bench.recipe, "data.source=\x1b[2Jgone.txt")
    assert status == 2 and "\x1b" not in said and r"\x1b[2Jgone.txt" in said


def test_a_dry_run_under_torchrun(told, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, said = told("train", bench.recipe, "--dry-run")
    assert status == 2 and "--dry-run: it starts no workers; run it once, without torchrun" in said


def test_debug_shows_the_traceback(told, bench: Bench) -> None:
    status, said = told("train", bench.recipe, "train.step=3", "--debug")
    assert status == 2 and "Traceback" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("parallel.replicate=3",), "3 replicas do not divide global_batch_samples 16"),
        (("parallel.replicate=3",), "nearest degrees that do: 2, 4"),
        (
            ("parallel.replicate=8", "train.micro_batch_samples=4"),
            "4 does not divide a replica's share of 2 samples",
        ),
        (("parallel.tensor=3",), "degrees that do: 1, 2"),
        pytest.param(
            ("parallel.pipeline=3",),
            "3 stages for 2 blocks: a stage would be empty",
            marks=pytest.mark.slow,
        ),
        (("parallel.pipeline=2", "train.micro_batch_samples=16"), "set it to 8"),
        pytest.param(
            ("parallel.pipeline={degree: 2, schedule: zbv-zero-bubble}",),
            "4 stages for 2 blocks",
            marks=pytest.mark.slow,
        ),
        (("parallel.pipeline={degree: 2, split: [2, 1]}",), "add up to 2 blocks, got [2, 1]"),
        (("launch.workers=threads", "model.dropout=framework"), "refused with threads"),
        (("data.source=missing.txt",), "missing.txt"),
        (("model.vocab_size=100",), "100"),
        (("precision.compute=float16",), "float16 needs a GPU, got a CPU"),
    ],
)
def test_recipes_that_cannot_run(
    told, bench: Bench, tmp_path: Path, change: tuple[str, ...], said: str
) -> None:
    run = tmp_path / "run"
    status, text = told("train", bench.recipe, *change, "--out", run)
    assert status == 2, text
    assert said in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ("train.freeze=['*nothing*']", UserError, "'*nothing*' matches no parameter"),
        ("train.freeze=['*']", UserError, "every parameter is frozen; nothing to train"),
        ("model.hidden_sise=8", ModelError, "model.hidden_sise: did you mean 'hidden_size'"),
        ("model.architecture=lama", ModelError, "did you mean 'llama'"),
    ],
)
def test_what_only_a_worker_can_see(
    bench: Bench, change: str, kind: type[UserError], said: str
) -> None:
    """Errors of workers come to the user as their own kind, once, without a traceback."""
    with pytest.raises(kind) as error:
        bench.train(change)
    assert said in str(error.value) and "Traceback" not in str(error.value)


def test_a_run_is_never_written_over(told, bench: Bench) -> None:
    run = bench.run()
    before = contents(run.path)
    status, said = told("train", bench.recipe, "--out", run.path)
    assert status == 2
    assert f"{run.path}: already holds a run" in said and f"shoal resume {run.path}" in said
    assert contents(run.path) == before


def test_a_folder_with_other_files(told, bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    status, said = told("train", bench.recipe, "--out", tmp_path)
    assert (status, "expected a new or empty folder" in said) == (2, True)
    status, said = told("train", bench.recipe, "--out", tmp_path / "thesis.txt")
    assert (status, "expected a new or empty folder" in said) == (2, True)


def test_a_folder_that_cannot_be_made(told, bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, said = told("train", bench.recipe, "--out", tmp_path / "file/run")
    assert (status, "cannot be made" in said) == (2, True)


def test_resume_of_nothing(told, tmp_path: Path) -> None:
    (tmp_path / "run-001").mkdir()
    (tmp_path / "run-002").mkdir()
    (tmp_path / "run-002/config.yaml").write_text("")
    status, said = told("resume", tmp_path / "run-01")
    assert status == 2 and "no such run; did you mean 'run-002'?" in said, "only runs are named"
    status, said = told("resume", tmp_path / "else")
    assert status == 2 and said.rstrip().endswith("no such run; known: run-002")
    status, said = told("resume", tmp_path / "run-001")
    assert status == 2 and "expected a run directory (with config.yaml), found none" in said


def test_resume_before_the_first_save(bench: Bench) -> None:
    run = bench.train("train.steps=2")
    for path in run.path.glob("checkpoints/*/*"):
        path.unlink()
    for path in run.path.glob("checkpoints/*"):
        path.rmdir()
    with pytest.raises(RunError, match="no checkpoint here; nothing to resume from"):
        bench.resume(run)


def test_merge_into_a_folder_with_files(told, bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    status, said = told("merge", bench.run().path, "--out", tmp_path)
    assert (status, "exists and is not empty; choose another --out" in said) == (2, True)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_merge_within_a_limit_that_is_none(told, bench: Bench, tmp_path: Path) -> None:
    words = ("merge", bench.run().path, "--out", tmp_path / "model", "--memory-limit")
    status, said = told(*words, "2 bananas")
    assert status == 2 and "--memory-limit: '2 bananas': unknown unit 'bananas'" in said
    status, said = told(*words, "100B")
    assert status == 2 and "a limit of 100 B leaves room for 5 numbers at a time" in said
    assert (
        "use --memory-limit 10000B or more, or none" in said and not (tmp_path / "model").exists()
    )


def test_merge_of_what_is_no_run(told, tmp_path: Path) -> None:
    status, said = told("merge", tmp_path, "--out", tmp_path / "model")
    assert status == 2 and "expected a run directory" in said
    status, said = told("merge", tmp_path / "step-00000007", "--out", tmp_path / "model")
    assert status != 0 and "manifest.json: cannot be read" in said


def test_generate_with_no_model(told, tmp_path: Path) -> None:
    status, said = told("generate", tmp_path, "hello")
    assert status == 2 and "expected a model folder (config.json and safetensors)" in said


def test_an_unreachable_hub(told, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    status, said = told("train", bench.recipe, "model={kind: pretrained, path: nobody/nothing}")
    assert status == 2
    assert "model.path: 'nobody/nothing' could not be had from the hub" in said
    assert "give a local folder" in said


def test_more_workers_than_cores_is_a_warning(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ("train.steps=1", "train.evaluate_every_steps=0", "parallel.replicate=16")
    threads = ("launch.workers=threads", "train.micro_batch_samples=1")
    local.train(bench.recipe, (*change, *threads), out=bench.new_path(), pool=bench.pool)
    said = capsys.readouterr().out
    assert "warning: 16 workers share" in said and "only makes each slower" in said


def test_no_space_for_a_checkpoint(bench: Bench, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: what is larger cannot be written."""
    run = Run(tmp_path / "run")
    limit = 200_000  # bytes: metrics and tokens fit, a checkpoint does not
    bench.run()  # prepares the data

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = ("train", bench.recipe, "train.steps=8", "checkpoint.every_steps=4", "--out", run.path)
    done = subprocess.run(
        shoal(*words), capture_output=True, text=True, timeout=60, preexec_fn=restrict
    )
    assert done.returncode == 2, done.stderr
    said = f"{run.path}/checkpoints: step {{}} could not be saved: the file would be larger than"
    assert said.format(8) in done.stderr
    assert "resume the run" in done.stderr and "Traceback" not in done.stderr
    failed = [row for row in read_lines(run.path / "events.jsonl") if row["event"] == "save-failed"]
    assert [row["step"] for row in failed] == [4] and said.format(4) in failed[0]["text"]
    assert len(run.losses) == 8, "only the last save of a run is worth ending it for"


def test_errors_say_their_kind_to_the_api(bench: Bench) -> None:
    with pytest.raises(FetchError):
        bench.train("model={kind: pretrained, path: nobody/nothing}")
