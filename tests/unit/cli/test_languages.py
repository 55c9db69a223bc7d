"""Commands in Chinese: help, mistakes, a run; what programs read is the same in every language."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from shoal.cli import helping
from shoal.cli.main import app, main
from shoal.environment import language_wanted
from shoal.language import speak
from shoal.launch import local
from tiny import Bench, Run

CHINESE = re.compile("[一-鿿]")
ENGLISH = re.compile(r"(?<![\w'`{<./-])[a-z]{2,} [a-z]{2,} [a-z]{2,}(?![\w/=-])")
"""Three words of English in a row."""

COMMAND = re.compile(r"(shoal|python -m pytest|kubectl) [a-z]+ [^\n；。]*")


def english(said: str) -> list[str]:
    """What is in English, but for commands."""
    return ENGLISH.findall(COMMAND.sub("", said))


Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Iterator[Told]:
    """Run a command here: its exit status, and what it said on standard output and error."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    yield run
    speak("en")


def _commands(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    yield path
    for name, each in getattr(command, "commands", {}).items():
        yield from _commands(each, *path, name)


@pytest.mark.parametrize("path", list(_commands(typer.main.get_command(app))), ids=" ".join)
def test_help(told: Told, path: tuple[str, ...]) -> None:
    status, said, _ = told(*path, "--help", "--lang", "zh_CN")
    assert status == 0 and said.startswith("用法：")
    assert "选项：" in said and not english(said)
    texts = [line for line in said.splitlines() if not line.startswith("    shoal ")]
    assert max(map(helping.width, texts)) <= 80
    assert told(*path, "--help")[1].startswith("Usage: ")  # and back


MISTAKES = [
    (("train", "nosuch"), "没有名为 'nosuch' 的配方"),
    (("train", "quickstart", "train.stepps=3"), "train.stepps：未知的键\n    是不是想用 'steps'"),
    (("train", "quickstart", "train.steps=x"), "train.steps：期望一个整数；实际为'x'"),
    (("train", "quickstart", "train.steps=-1"), "train.steps：期望至少 1；实际为-1"),
    (("train", "quickstart", "data.source=gone.txt"), "没有文件、文件夹或登记条目叫 'gone.txt'"),
    (("train", "quickstart", "a=1", "b=2"), "2 个问题（配方 quickstart）："),
    (("resume", "gone"), "gone：没有这个运行"),
    (("generate", "gone", "A"), "gone：期望模型文件夹"),
    (("plan",), "用法："),
    (("plan", "quickstart", "--cluster", "8xB999"), "未知的设备"),
    (("train",), "错误：缺少参数 'recipe'"),
    (("train", "quickstart", "--nosuch"), "错误：没有这个选项：--nosuch"),
    (("trian",), "错误：没有这个命令：'trian'。是不是想用 'train'"),
    (("train", "quickstart", "--lr", "3"), "配方的键写作 KEY=VALUE：是不是想用"),
]


@pytest.mark.parametrize(("words", "wanted"), MISTAKES)
def test_mistakes(told: Told, words: tuple[str, ...], wanted: str, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run") if words[:1] == ("train",) and len(words) > 1 else ()
    status, out_said, said = told("--lang", "zh_CN", *words, *out)
    assert wanted in said + out_said and status in (0, 2)
    assert not english(said)


def test_a_layout_that_cannot_be(told: Told, bench: Bench, tmp_path: Path) -> None:
    words = ("train", bench.recipe, "parallel.tensor=3", "--out", tmp_path / "run")
    status, _, said = told(*words, "--lang", "zh_CN")
    assert (
        status == 2 and "parallel.tensor：3 不能整除 4 个查询头、2 个键值头和前馈宽度 64\n" in said
    )
    assert "可以整除的并行度：1, 2；最接近的是 2" in said and not english(said)


def test_where_lang_may_stand(told: Told) -> None:
    for words in (("config", "--lang=zh", "list", "--help"), ("--lang", "zh_CN", "config", "-h")):
        assert told(*words)[1].startswith("用法：")


def test_a_language_that_is_not_there(told: Told) -> None:
    status, _, said = told("doctor", "--lang", "fr")
    assert status == 2 and said == "shoal: --lang: no language 'fr'; known: en, zh_CN\n"


def test_lang_behind_a_script_is_the_scripts(told: Told) -> None:
    status, _, said = told("run", "gone.py", "--lang", "fr")
    assert status == 2 and "gone.py: no such script" in said


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh_CN"),
        ({"LANG": "zh_TW"}, "zh_CN"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_MESSAGES": "zh_CN", "LANG": "en_US.UTF-8"}, "zh_CN"),
        ({"LC_ALL": "", "LANG": "zh_CN"}, "zh_CN"),
        ({}, "en"),
    ],
)
def test_the_locale(
    told: Told, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: str
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language_wanted() == wanted
    said = told("resume", "gone")[2]
    assert bool(CHINESE.search(said)) == (wanted == "zh_CN")


def test_what_programs_read_is_in_no_language(told: Told) -> None:
    for words in (
        ("config", "schema"),
        ("config", "list"),
        ("plan", "quickstart", "--cluster", "8xH100", "--json"),
        ("simulate", "quickstart", "--cluster", "8xH100", "--json"),
    ):
        assert told(*words)[1] == told(*words, "--lang", "zh_CN")[1] != "", words
    shown = [told("config", "show", "quickstart", *more)[1] for more in ((), ("--lang", "zh_CN"))]
    keys = ["".join(line for line in each.splitlines() if line[:1] != "#") for each in shown]
    assert keys[0] == keys[1] and shown[0] != shown[1]


def test_reports(told: Told) -> None:
    said = told("doctor", "--lang", "zh_CN")[1]
    assert "个核中可用" in said and re.search(r"^ok ", said, re.MULTILINE)
    said = told("plan", "quickstart", "--cluster", "8xH100", "--lang", "zh_CN")[1]
    assert "一步的预测时间：" in said and "其他类别：" in said
    assert not english(said)
    said = told("data", "list", "--lang", "zh_CN")[1]
    assert "默认文本" in said and not english(said)


def test_a_run(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Its console and last words are Chinese, its files those of an English run."""
    overrides = ["train.steps=4", "train.evaluate_every_steps=2", "launch.tune=false"]
    runs = []
    for language in ("en", "zh_CN"):
        speak(language)
        try:
            runs.append(Run(bench.new_path()))
            local.train(bench.recipe, overrides, out=runs[-1].path, console=True, pool=bench.pool)
        finally:
            speak("en")
        said = capsys.readouterr().out
    for wanted in (
        "正在准备数据",
        "学习率  ",
        "第 4 步的评估：损失",
        "计划：1 个工作者",
        "正在写入",
    ):
        assert wanted in said, said
    told = [line for line in said.splitlines() if " | " not in line]
    assert not [line for line in told if english(line)]
    first, second = runs
    assert second.digits == first.digits and second.events == first.events
    for path in (path for path in second.path.rglob("*") if path.is_file()):
        if path.suffix in (".json", ".jsonl", ".yaml", ".log", ".txt"):
            assert not CHINESE.search(path.read_text(encoding="utf-8")), path
    assert json.loads((second.path / "summary.json").read_text())["steps"] == 4
