"""What an application's command says is in the language of the person."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shoal.environment import environment_of_others

ROOT = Path(__file__).resolve().parents[2]


def told(name: str, *words: str | Path, **variables: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", f"apps.{name}", *map(str, words)],
        cwd=ROOT,
        env={**environment_of_others(), "PYTHONPATH": str(ROOT / "src"), **variables},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "words", "wanted"),
    [
        ("support", ("--help", "--lang", "zh_CN"), "智能客服：找到能回答问题的段落。"),
        (
            "opinion",
            ("--source", "gone", "--model", "x", "--lang=zh_CN"),
            "gone：没有这个文件，也不是",
        ),
    ],
)
def test_a_command_in_chinese(
    name: str, words: tuple[str, ...], wanted: str, tmp_path: Path
) -> None:
    status, said = told(name, *words, "--state", tmp_path)
    assert wanted in said and "Traceback" not in said and status in (0, 2)


def test_the_locale_is_asked(tmp_path: Path) -> None:
    words = ("--source", "gone", "--model", "x", "--state", tmp_path)
    assert "没有这个文件" in told("opinion", *words, LC_ALL="zh_CN.UTF-8", PYTHONUTF8="1")[1]
    assert "no such file" in told("opinion", *words, LC_ALL="C.UTF-8")[1]
