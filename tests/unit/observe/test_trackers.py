"""TensorBoard and W&B are really written, and read back by their own readers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from shoal.config.recipe import ObserveSection
from shoal.errors import UserError
from shoal.launch import refuse
from shoal.launch.refuse import check_trackers
from shoal.observe.trackers import WandB, scalars
from tiny import Bench


def test_tensorboard_holds_what_the_run_logged(bench: Bench) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = bench.run("train.steps=4", "train.evaluate_every_steps=2", "observe.tensorboard=true")
    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert [value for _, value in found] == pytest.approx(run.losses, rel=1e-6)
    assert [event.step for event in board.Scalars("eval/loss")] == [0, 2, 4]
    groups = {tag.partition("/")[0] for tag in board.Tags()["scalars"]}
    assert groups == {"train", "eval", "perf"}
    config = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"evaluate_every_steps": 2' in config


def test_tensorboard_holds_the_hyperparameters(bench: Bench) -> None:
    """As its own plugin reads them, with the scalars that runs are compared by."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = bench.run("train.steps=4", "train.evaluate_every_steps=2", "observe.tensorboard=true")
    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()

    def stored(tag: str) -> HParamsPluginData:
        content = board.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
        return HParamsPluginData.FromString(content)

    values = stored("session_start_info").session_start_info.hparams
    assert values["train.optimizer.learning_rate"].number_value == 3e-3
    assert values["train.optimizer.kind"].string_value == "adamw"
    assert values["train.exact"].bool_value is False and "train.exact" in values
    assert values["train.epochs"].string_value == "null"
    metrics = [each.name.tag for each in stored("experiment").experiment.metric_infos]
    assert metrics == ["train/loss", "eval/loss"]
    assert set(metrics) <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4], "none is added"


def test_tags_are_grouped_as_the_field_does() -> None:
    step = {"step": 3, "loss": 2.5, "learning_rate": 1e-3, "tokens": 90, "step_seconds": 0.5}
    step |= {"tokens_per_second": 180.0, "sent_bytes": 7, "mfu": 0.25, "completions": []}
    assert scalars(step) == {
        "train/loss": 2.5,
        "train/learning_rate": 1e-3,
        "train/tokens": 90.0,
        "perf/step_seconds": 0.5,
        "perf/tokens_per_second": 180.0,
        "perf/sent_bytes": 7.0,
        "perf/mfu": 0.25,
    }
    scores = {"step": 3, "evaluation_loss": 2.0, "evaluation_loss/a": 1.5, "perplexity": 7.4}
    assert scalars(scores) == {"eval/loss": 2.0, "eval/loss/a": 1.5, "eval/perplexity": 7.4}


def test_wandb_offline_holds_what_was_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    section = ObserveSection(wandb={"project": "of-mine", "tags": ["tiny-tag"]}).wandb
    sink = WandB(tmp_path, config={"seed": 3}, settings=section)
    sink.row({"step": 1, "loss": 2.5, "text": "left out"})
    sink.row({"step": 2, "loss": 2.25})
    sink.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 10  # another process writes it, a little after it was told to
    while b"2.25" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.02)
    content = file.read_bytes()
    assert b"loss" in content and b"2.25" in content and b"left out" not in content
    assert b"of-mine" in content and b"tiny-tag" in content


def test_a_resumed_run_goes_on_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    asked: list[dict[str, object]] = []

    class Fake:
        id, url = "abc123", "https://wandb.example/abc123"

    def init(**settings: object) -> Fake:
        asked.append(settings)
        return Fake()

    monkeypatch.setattr(wandb, "init", init)
    assert WandB(tmp_path, config={"seed": 3}).address == Fake.url
    WandB(tmp_path, config={"seed": 3})
    assert [each["id"] for each in asked] == [None, "abc123"]
    assert asked[1]["resume"] == "allow" and asked[1]["config"] == {"seed": 3}
    assert asked[0]["project"] == "shoal" and asked[0]["name"] == tmp_path.name
    assert asked[0]["entity"] is None and asked[0]["group"] is None
    said = {"project": "p", "entity": "e", "name": "n", "group": "g", "tags": ["a", "b"]}
    section = ObserveSection(wandb=said).wandb
    WandB(tmp_path, config={}, settings=section)
    assert {key: asked[2][key] for key in said} == {**said, "tags": ("a", "b")}
    assert asked[2]["id"] == "abc123", "and still the same run"


@pytest.mark.parametrize("damage", [b"\xff\x00", b"", b"two words", b"a/b" * 99])
def test_a_damaged_id_is_a_new_one(
    damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    asked: list[object] = []

    class Fake:
        id, url = "abc123", None

    def init(**settings: object) -> Fake:
        asked.append(settings["id"])
        return Fake()

    monkeypatch.setattr(wandb, "init", init)
    (tmp_path / "wandb-id").write_bytes(damage)
    WandB(tmp_path, config={})
    assert asked == [None] and (tmp_path / "wandb-id").read_text() == "abc123\n"


@pytest.mark.slow
def test_wandb_without_a_key_is_refused_before_a_run_begins(bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {name: text for name, text in os.environ.items() if "WANDB" not in name}
    environment |= {"HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path)}
    done = bench.command("train", bench.recipe, "observe.wandb=true", "--out", run, env=environment)
    assert done.returncode == 2 and not run.exists()
    (said,) = done.stderr.splitlines()
    assert said.startswith("shoal: observe.wandb: no API key was found; log in with `wandb login`")
    environment["WANDB_MODE"] = "offline"
    words = ("train", bench.recipe, "observe.wandb=true", "--out", run, "--dry-run")
    assert bench.command(*words, env=environment).returncode == 0


def test_what_wandb_refuses_is_no_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def init(**settings: object) -> None:
        raise wandb.errors.CommError("permission denied")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"observe\.wandb: permission denied"):
        WandB(tmp_path, config={})


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refuse, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"observe.{name}: the package is not installed"):
        check_trackers(ObserveSection(**{name: True}))
    if name == "wandb":
        with pytest.raises(UserError, match=r"observe\.wandb: the package is not installed"):
            check_trackers(ObserveSection(wandb={"project": "mine"}))
    check_trackers(ObserveSection())
