"""The applications: thin programs on the public interface; small, each within its budget."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import budgets
import shoal

ROOT = Path(__file__).resolve().parents[2]
APPS = ROOT / "apps"
MODULES = sorted(APPS.rglob("*.py"))
LANGUAGE = {
    *("shoal.language", "shoal.environment", "shoal.environment.language_wanted"),
    *(f"shoal.language.{name}" for name in ("LANGUAGES", "speak", "translated")),
}
"""In which language a command speaks is one thing for all of them."""
OWN = {
    "shoal",
    "shoal.page",
    "shoal.page.web",
    *LANGUAGE,
    *(f"shoal.{name}" for name in shoal.__all__),
}
BUDGETS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["shoal"]["apps"]


def imported(module: Path) -> Iterator[str]:
    """Every module imported anywhere in a file."""
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(module: Path) -> str:
    return module.relative_to(ROOT).as_posix()


def test_they_import_the_public_interface_alone() -> None:
    wrong = [
        f"{name(module)} imports {each}"
        for module in MODULES
        for each in imported(module)
        if each.split(".")[0] == "shoal" and each not in OWN
    ]
    assert not wrong
    assert any("shoal.page.web" in set(imported(module)) for module in MODULES)


def test_they_do_not_import_each_other_nor_torch() -> None:
    for module in MODULES:
        folder = module.relative_to(APPS).parts[0]
        for each in imported(module):
            parts = each.split(".")
            assert parts[0] not in ("torch", "transformers"), f"{name(module)} imports {each}"
            if parts[0] == "apps" and len(parts) > 1 and (APPS / parts[1]).is_dir():
                assert parts[1] == folder, f"{name(module)} imports {each}"


def test_the_sources_know_no_application() -> None:
    for module in (ROOT / "src").rglob("*.py"):
        assert not any(each.split(".")[0] == "apps" for each in imported(module)), module


@pytest.mark.parametrize("room", BUDGETS)
def test_an_application_stays_within_its_budget(room: str) -> None:
    """`shared` is the files directly in apps/."""
    files = APPS.glob("*.py") if room == "shared" else (APPS / room).rglob("*.py")
    lines = sum(map(budgets.code_lines, files))
    assert 0 < lines <= BUDGETS[room], f"{lines - BUDGETS[room]} lines of code over"


def test_every_application_has_a_budget_a_page_and_a_way_in() -> None:
    rooms = {path.name for path in APPS.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(BUDGETS) - {"shared"}
    for room in rooms:
        text = (APPS / room / "README.md").read_text("utf-8")
        assert f"python -m apps.{room}" in text and (APPS / room / "__main__.py").is_file()


def test_files_and_functions_stay_small_and_say_what_they_are() -> None:
    for module in MODULES:
        tree = ast.parse(module.read_text("utf-8"))
        assert (ast.get_docstring(tree) or "").partition("\n")[0][-1:] in (".", ":", ";", ")"), (
            module
        )
        assert len(module.read_text("utf-8").splitlines()) <= 500, module
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{module}: {node.name}"


def test_nothing_that_runs_what_it_reads() -> None:
    banned = re.compile(r"\b(pickle|eval|exec|os\.system|yaml\.load)\(|import pickle|shell=True")
    unfinished = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for path in [*MODULES, *APPS.rglob("*.js"), *APPS.rglob("*.html"), *APPS.rglob("*.md")]:
        text = path.read_text("utf-8")
        assert not banned.search(text) and not unfinished.search(text), path
        assert "innerHTML" not in text, f"{path}: texts of others go in by textContent"
        assert not re.search(r"<script(?! type=\"module\" src=)|\son\w+=\"|style=\"", text), path


def test_words_of_the_pages_are_there_in_both_languages() -> None:
    """Every key of a page's table in English and Chinese, and every key that is used."""
    for path in APPS.rglob("*.js"):
        text = path.read_text("utf-8")
        table = re.search(r"speak\(\{(.*?)\n\}\)", text, re.DOTALL)
        if table is None:
            continue
        english, chinese = (
            set(re.findall(r"(\w+): \"", part)) for part in re.split(r"\n  zh: ", table[1])
        )
        assert english == chinese, (path, english ^ chinese)
        beside = [*path.parent.glob("*.js"), *path.parent.glob("*.html")]
        used = set().union(
            *(re.findall(r"(?:word\(\"|data-word=\")(\w+)", p.read_text("utf-8")) for p in beside)
        )
        assert used <= english, (path, used - english)
