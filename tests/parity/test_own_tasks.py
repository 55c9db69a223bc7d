"""A task from outside of the package, by its import path: `task.kind: my_module:MyTask`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shoal.config.load import load_recipe
from shoal.errors import ConfigError
from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.tasks import kinds
from tiny import Run, largest_difference

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = [
    "train.steps=10",
    "train.global_batch_samples=16",
    "data.packing=false",
    "data.sequence_tokens=16",
    "data.tokenizer.vocabulary_size=300",
    "model={architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
    "num_attention_heads: 2, num_key_value_heads: 2}",
    "precision.compute=float32",
    "train.schedule.warmup_steps=1",
    "train.optimizer.learning_rate=1e-2",
    "launch={workers: processes, threads_per_worker: 1, tune: false}",
]


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerPool:
    """Workers that may import from a folder of the user's, for his PYTHONPATH says so."""
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(ROOT / "examples" / "own_task.py", folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    with WorkerPool() as own:
        yield own


def test_two_workers_learn_it_as_one_does(tmp_path: Path, pool: WorkerPool) -> None:
    """Held against transformers before the start; summary and last words say its import path."""
    words = ("bad", "poor", "fair", "good", "great")
    rows = [{"text": " ".join([words[n % 5]] * (1 + n % 6)), "score": n % 5} for n in range(120)]
    data = tmp_path / "stars.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    runs = []
    for degree in (1, 2):
        out = tmp_path / f"run-{degree}"
        kind = ["task.kind=own_task:TextScore", f"data.source={data}"]
        degrees = [f"parallel.replicate={degree}"]
        overrides = [*OVERRIDES, *kind, *degrees]
        result = local.train("quickstart", overrides, out=out, console=False, pool=pool)
        assert result.summary["task"] == "own_task:TextScore"
        runs.append(Run(out))
    one, two = runs
    assert largest_difference(two.losses, one.losses) < 1e-5
    assert one.losses[-1] < one.losses[0]
    assert result.summary["evaluation"]["evaluation_loss"] < 4


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nowhere_at_all:Task", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("json:NoSuchTask", "json has no class NoSuchTask"),
        ("json:JSONDecoder", "json:JSONDecoder is no shoal Task"),
        ("json:loads", "json:loads is no shoal Task"),
    ],
)
def test_paths_that_lead_to_no_task(kind: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kinds.create(kind)
    assert f"task.kind: {message}" in str(caught.value) or message in str(caught.value)


@pytest.mark.parametrize("kind", ["../evil:Task", "a/b.py:Task", "evil:", ":Task", "evil:x y"])
def test_what_is_no_import_path(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.kind: expected (how|a kind)"):
        local._resolved("quickstart", [f"task={{kind: '{kind}'}}"])


def test_nothing_is_imported_from_the_folder_that_one_is_in(tmp_path: Path) -> None:
    """A recipe from elsewhere, with a file beside it that would run, though `-c` looks there."""
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nclass Task: pass\n")
    code = "from shoal.cli.main import main; main()"
    command = [sys.executable, "-c", code, "train", "quickstart", "task={kind: 'evil:Task'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "No module named 'evil'" in done.stderr, done.stderr
    assert "PYTHONPATH" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_change_of_its_code_prepares_the_data_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "changing_task.py"
    base = "from shoal.tasks.causal_lm import CausalLM\nclass Mine(CausalLM):\n    kind = ''\n"
    module.write_text(base)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = kinds.code_of("changing_task:Mine")
    module.write_text(base + "    # another\n")
    assert kinds.code_of("changing_task:Mine") != before
    assert kinds.code_of("causal-lm") == "causal-lm"


def install(folder: Path, name: str, *, listed: str, by_pip: bool = False) -> Path:
    """A package of one module, with a task that it lists by a short name, installed.

    A wheel of pure Python is installed by unpacking it, which is what pip does, in a second.
    """
    about = f"{name}-1.0.dist-info"
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(ROOT / "examples" / "own_task.py", f"{name}.py")
        archive.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        points = f"[shoal.tasks]\n{listed} = {name}:TextScore\n"
        archive.writestr(f"{about}/entry_points.txt", points)
        archive.writestr(f"{about}/RECORD", "")
    target = folder / "installed"
    if by_pip:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, timeout=100)
    else:
        zipfile.ZipFile(wheel).extractall(target)
    return target


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = install(tmp_path, "stars_of_mine", listed="text-score")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return folder


@pytest.mark.slow
def test_a_task_of_an_installed_package_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(tmp_path, "stars_of_mine", listed="text-score", by_pip=True)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    rows = [{"text": "good " * (1 + n % 6), "score": n % 5} for n in range(60)]
    data = tmp_path / "stars.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    asked = ["task.kind=text-score", f"data.source={data}", "train.steps=2"]
    with WorkerPool() as pool:
        overrides = [*OVERRIDES[1:], *asked, "parallel.replicate=1"]
        result = local.train(
            "quickstart", overrides, out=tmp_path / "run", console=False, pool=pool
        )
    assert result.summary["task"] == "text-score"
    assert kinds.code_of("text-score") != kinds.code_of("stars_of_mine:TextScore")


def test_a_name_that_nobody_lists_is_told_the_nearest(installed: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'text-score'"):
        load_recipe("quickstart", ["task={kind: text-scor}"])
    with pytest.raises(ConfigError, match="speech-recognition, text-score"):
        load_recipe("quickstart", ["task={kind: nothing-like-it}"])
    with pytest.raises(ConfigError, match="did you mean 'text-score'"):
        kinds.create("text-scor")


def test_two_packages_that_list_one_name(tmp_path: Path, installed: Path) -> None:
    install(tmp_path, "stars_of_another", listed="text-score")
    with pytest.raises(ConfigError, match="2 installed packages list a task 'text-score'"):
        kinds.create("text-score")
    install(tmp_path, "an_impostor", listed="chat")
    assert kinds.kind_of("chat").__module__ == "shoal.tasks.chat"


def test_what_lies_in_the_folder_that_one_is_in_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(tmp_path, "evil_stars", listed="evil-score")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend("")
    with pytest.raises(ConfigError, match="expected one of"):
        load_recipe("quickstart", ["task={kind: evil-score}"])
