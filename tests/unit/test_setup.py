"""Setting up: uv asks where pip asks, and training needs no development tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import pip_places  # noqa: E402

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
