"""Setting up: uv asks where pip asks, and training needs no development tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pip_places

ROOT = Path(__file__).resolve().parents[2]

LISTED = r"""
:env:.find-links='/wheels'
global.extra-index-url='https://one.example/simple\nhttps://two.example/simple'
global.index-url='https://mirror.example/simple'
global.constraint='/etc/constraints.txt'
global.timeout='60'
user.cert='/etc/ssl/own.pem'
"""


def test_places_of_pip_become_those_of_uv() -> None:
    assert pip_places.settings(LISTED) == {
        "UV_FIND_LINKS": "/wheels",
        "UV_INDEX": "https://one.example/simple https://two.example/simple",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_CONSTRAINT": "/etc/constraints.txt",
        "SSL_CERT_FILE": "/etc/ssl/own.pem",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert pip_places.settings("") == {}


def test_words_for_the_shell_are_quoted() -> None:
    asked = [sys.executable, str(ROOT / "scripts" / "pip_places.py")]
    environment = {"PIP_FIND_LINKS": "/a/$(folder)", "PIP_CONFIG_FILE": "/dev/null"}
    done = subprocess.run(asked, capture_output=True, text=True, env=environment, check=True)
    assert "export UV_FIND_LINKS='/a/$(folder)'\n" in done.stdout
    kept = {**environment, "UV_FIND_LINKS": "/own"}
    done = subprocess.run(asked, capture_output=True, text=True, env=kept, check=True)
    assert "UV_FIND_LINKS" not in done.stdout, "what uv was told already stays"


def test_only_tests_and_checks_install_development_tools(tmp_path: Path) -> None:
    def planned(target: str) -> str:
        asked = ["make", "-n", target, f"VENV={tmp_path}/new"]
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "scripts/setup" in planned("train") and "--dev" not in planned("train")
    for target in ("test", "test-all", "check"):
        assert "scripts/setup --dev" in planned(target)


def ended(folder: Path, **settings: str) -> tuple[int, str]:
    """Exit status of scripts/setup for a new environment, and what it says at its end."""
    environment = {**os.environ, "VENV": str(folder / "new"), **settings}
    asked = ["sh", str(ROOT / "scripts" / "setup")]
    done = subprocess.run(asked, capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr.splitlines()[-1]


def test_what_must_be_there_before(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\ncase "$*" in *"-m $MISSING"*) exit 1 ;; esac\n')
    stub.chmod(0o755)
    wanted = "setup: expected Python 3.11 or newer as false; name one: make setup PYTHON=python3.12"
    assert ended(tmp_path, PYTHON="false") == (2, wanted)
    wanted = "setup: TORCH: expected cpu or cuda, got rocm"
    assert ended(tmp_path, TORCH="rocm") == (2, wanted)
    said = f"setup: {stub} has no venv module"
    assert ended(tmp_path, PYTHON=str(stub), MISSING="venv") == (2, said)
    said = "setup: pip could not fetch uv; on Debian, pip is in: apt-get install python3-pip"
    assert ended(tmp_path, PYTHON=str(stub), MISSING="pip") == (2, said)
