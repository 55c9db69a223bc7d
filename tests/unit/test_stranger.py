"""What a stranger does first works from the wheel alone, in an empty environment."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    package, packed = ROOT / "src" / "shoal", set[Path]()
    for pattern in built["tool"]["setuptools"]["package-data"]["shoal"]:
        packed |= set(package.glob(pattern))
    others = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "py.typed"
    }
    assert packed == others
    folders = {path.parent for path in package.rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders), "else it is no package"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_path_of_a_stranger() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "stranger.py")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers opens it" in done.stdout
