"""The runs of a folder, and what a run directory says beside its rows. Only reads.

A server's record (launch/serving_record.py) stands among them: a folder with serving.json.
Everything is read from files, so a run that has ended, was copied, or is trained by another
program looks like any other. What cannot be read is said in `problems`, never an error.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.config.yaml_text import read_mapping
from shoal.errors import RunError, UserError
from shoal.untrusted import is_plain_name, open_plain

MOST_RUNS = 200
FRESH_SECONDS = 5.0
"""workers.json is written several times a second while a run is supervised."""
_MOST_BYTES = 4 << 20
_MOST_LISTED = 500
_MARKS = ("config.yaml", "metrics.jsonl", "serving.json")
_GROWING = ("events.jsonl", "serving.jsonl")
_SUMMARY = (
    "steps",
    "of_steps",
    "final_loss",
    "evaluation",
    "baseline",
    "best_step",
    "ending",
    "tokens_per_second",
    "train_seconds",
    "prediction_error",
    "parameters",
)
_PLAN = (
    "layout",
    "workers",
    "threads_per_worker",
    "micro_batch_samples",
    "compute",
    "reason",
    "predicted",
    "outcome",
    "device",
)


class Shelf:
    """Runs below a folder (itself, its folders, and theirs), or one run."""

    def __init__(self, root: Path) -> None:
        """Raises RunError where there is no folder, or no run in it."""
        self.root = root.expanduser()
        self._sizes: dict[Path, int] = {}
        self._trees: dict[Path, tuple[Any, tuple[dict[str, Any], str]]] = {}
        if not self.root.is_dir():
            raise RunError(f"{root}: no such folder; give a run, or a folder that holds runs")
        if not self.runs():
            raise RunError(
                f"{root}: holds no run (a folder with config.yaml or metrics.jsonl); begin one: "
                "shoal train quickstart"
            )

    def runs(self) -> dict[str, Path]:
        """Name -> folder, the one that was written to last first."""
        found = {}
        with suppress(OSError):
            for path in self._folders():
                times = [_modified(path / name) for name in (*_MARKS, *_GROWING)]
                if any(times[: len(_MARKS)]):
                    is_root = path == self.root
                    name = path.resolve().name if is_root else str(path.relative_to(self.root))
                    found[name] = (max(times), path)
        newest = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))
        return {name: path for name, (_, path) in newest[:MOST_RUNS]}

    def _folders(self) -> Iterator[Path]:
        yield self.root
        for path in _folders_in(self.root):
            yield path
            yield from _folders_in(path)

    def find(self, name: str) -> Path | None:
        """The folder of a run by the name that `runs` gives it, and of nothing else."""
        return self.runs().get(name)

    def state(self, run: Path) -> dict[str, Any]:
        """What a run says of itself beside rows and events; small, and the same while it stays."""
        if not run.is_dir():
            return {"gone": True, "problems": []}
        if is_record(run):
            name = "serving.json"
            about, why = self._tree(run / name)
            told = {key: _at(about, key) for key in ("model", "address", "threads")}
            problems = [f"{name}: {why}"] if why else []
            return {"gone": False, "active": is_active(run), "serving": told, "problems": problems}
        trees = {
            name: self._tree(run / name) for name in ("config.yaml", "plan.json", "summary.json")
        }
        config, plan, summary = (tree for tree, _ in trees.values())
        return {
            "gone": False,
            "active": is_active(run),
            "task": _at(config, "task", "kind"),
            "seed": _at(config, "seed"),
            "policy": _at(config, "sync", "kind"),
            "of_steps": summary.get("of_steps") or _at(config, "train", "steps"),
            "plan": {key: plan[key] for key in _PLAN if key in plan},
            "summary": {key: summary[key] for key in _SUMMARY if key in summary},
            "checkpoints": self._checkpoints(run),
            "pictures": [[path.name, _modified(path)] for path in _pictures(run)],
            "model": (run / "model").is_dir(),
            "problems": [f"{name}: {why}" for name, (_, why) in trees.items() if why],
        }

    def _tree(self, path: Path) -> tuple[dict[str, Any], str]:
        """A file's mapping, and why it has none; read again only when the file has changed."""
        try:
            found = path.stat()
        except OSError:
            return {}, ""
        stamp = found.st_mtime_ns, found.st_size
        if self._trees.get(path, (None,))[0] != stamp:
            self._trees[path] = stamp, _mapping(path)
        return self._trees[path][1]

    def _checkpoints(self, run: Path) -> list[dict[str, Any]]:
        found = []
        for path in _folders_in(run / "checkpoints"):
            number = path.name.removeprefix("step-")
            if (
                path.name.startswith("step-")
                and number.isdigit()
                and _modified(path / "manifest.json")
            ):
                if path not in self._sizes:  # complete, so it does not grow
                    with suppress(OSError):
                        self._sizes[path] = sum(each.stat().st_size for each in path.iterdir())
                found.append({"step": int(number), "bytes": self._sizes.get(path)})
        return sorted(found, key=lambda each: each["step"])


def workers(run: Path) -> dict[str, Any]:
    """What each worker does now, as its supervisor saw it; empty where nobody has looked lately."""
    found, _ = _mapping(run / "workers.json")
    at = found.get("written_at")
    if not isinstance(at, int | float) or time.time() - at > FRESH_SECONDS:
        return {}
    return found


def is_record(folder: Path) -> bool:
    """Whether it is a server's record, and no run."""
    return (folder / "serving.json").is_file()


def is_active(run: Path) -> bool:
    """Whether something is at work in the run: its lock is there, and is nobody's leftover."""
    try:
        with open_plain(run / ".lock") as file:
            holder = int(file.read(32))
        os.kill(max(1, holder), 0)
    except PermissionError:  # somebody else's, and alive
        return True
    except ProcessLookupError:  # killed, or on another machine
        return bool(workers(run))
    except (OSError, ValueError):
        return False
    return True


def picture(run: Path, name: str) -> Path | None:
    """The file of one of the run's pictures; None for any other name."""
    return next((path for path in _pictures(run) if path.name == name), None)


def leave_order(run: Path, order: str) -> None:
    """Leave the file SAVE or STOP in a run, as a person would. Raises UserError."""
    if order not in ("SAVE", "STOP"):
        raise UserError(f"{order[:20]!r}: expected SAVE or STOP")
    if is_record(run):
        raise UserError(f"{run.name}: a server takes no orders here; Ctrl-C or SIGTERM ends it")
    if not is_active(run):
        # a resume would obey it at once
        raise UserError(f"{run.name}: nothing is at work in this run, so nobody would take it")
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        os.close(os.open(run / order, flags, 0o644))
    except OSError as error:
        raise UserError(f"{run / order}: cannot be written: {error.strerror}") from None


def _pictures(run: Path) -> list[Path]:
    """Those of the task; loss.png is what the page draws itself."""
    with suppress(OSError):
        names = sorted(each for each in os.listdir(run) if each.endswith(".png"))
        shown = [each for each in names if each[0] != "." and each != "loss.png"]
        paths = [run / name for name in shown if is_plain_name(name)]
        return [path for path in paths[:20] if path.is_file() and not path.is_symlink()]
    return []


def _folders_in(folder: Path) -> list[Path]:
    """Folders in `folder`, no links and nothing hidden, the newest of very many; none where it
    cannot be read."""
    with suppress(OSError), os.scandir(folder) as entries:
        found = [
            (each.stat(follow_symlinks=False).st_mtime, each.name)
            for each in entries
            if each.is_dir(follow_symlinks=False) and each.name[0] != "."
        ]
        return [folder / name for _, name in sorted(found, reverse=True)[:_MOST_LISTED]]
    return []


def _modified(path: Path) -> float:
    """When a file was last written; 0 where there is none."""
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _read(path: Path) -> str:
    with open_plain(path) as file:
        return file.read(_MOST_BYTES).decode()


def _mapping(path: Path) -> tuple[dict[str, Any], str]:
    """The mapping in a JSON or YAML file, and why there is none."""
    try:
        text = _read(path)
        if path.suffix == ".yaml":
            return read_mapping(text, source=path.name), ""
        tree = json.loads(text)
        return (tree, "") if isinstance(tree, dict) else ({}, "expected a JSON object")
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError, UserError) as error:
        return {}, f"cannot be read: {str(error)[:100]}"


def _at(tree: Any, *keys: str) -> Any:
    """A plain value in a tree of mappings; None where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, str | int | float) else None
