"""The rules of the house, as far as reading the sources can check them."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import budgets
from shoal.config.load import load_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[2]

SOURCE = ROOT / "src" / "shoal"
MODULES = sorted(SOURCE.rglob("*.py"))

HARD_FILE_LINES = 500
HARD_FUNCTION_LINES = 80

PICKLED = re.compile(
    r"^\s*(import|from)\s+(pickle|cloudpickle|dill|shelve|marshal)\b"
    r"|torch\.(save|load)\(|_object_list\(|recv_pyobj|send_pyobj|weights_only=False",
    re.MULTILINE,
)
GRAB_BAGS = {"utils", "helpers", "common", "base", "misc", "manager"}
DISTRIBUTED = {"runtime.py", "comm", "parallel", "sync", "prove"}
TRANSFORMERS = {"models", "tasks", "data", "serve"}


def room(module: Path) -> str:
    """First part of a module's path below the package."""
    return module.relative_to(SOURCE).parts[0]


def name(module: Path) -> str:
    return module.relative_to(SOURCE).as_posix()


def imports(module: Path) -> Iterator[str]:
    """Every module imported anywhere in a file, inside functions too."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(module: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_import_contracts() -> None:
    checker = Path(sys.executable).parent / "lint-imports"
    found = subprocess.run([str(checker), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_a_server_may_use_what_a_replica_is_made_of() -> None:
    """`serve` stands above parallel, comm and runtime; only rooms below meet no other ranks."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    forbidden = contracts["importlinter:contract:distributed"]["source_modules"].split()
    assert "shoal.models" in forbidden and "shoal.serve" not in forbidden
    layers = contracts["importlinter:contract:layers"]["layers"].split("\n")
    at = {room.strip(" ()"): n for n, row in enumerate(layers) for room in row.split("|")}
    assert at["serve"] == at["engine"] < at["parallel"] < at["comm"]


def test_files_and_functions_stay_small() -> None:
    large = [name(m) for m in MODULES if len(m.read_text("utf-8").splitlines()) > HARD_FILE_LINES]
    long = [
        f"{name(m)}:{function} ({lines})"
        for m in MODULES
        for function, lines in functions(m)
        if lines > HARD_FUNCTION_LINES
    ]
    assert not large and not long, (large, long)


ROOMS = budgets.rooms()


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_stays_within_its_budget(name: str) -> None:
    limit = budgets.budgets().get(name)
    assert limit is not None, f"give {name} a budget in pyproject.toml"
    assert ROOMS[name] <= limit, f"{ROOMS[name] - limit} lines of code over"


def test_what_counts_as_code(tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text(
        '"""Docstring.\n\nMore."""\n\n# why\nx = 1  # here\n"""Of x."""\n'
    )
    assert budgets.code_lines(tmp_path / "some.py") == 1


def test_every_module_says_what_it_is() -> None:
    for module in MODULES:
        text = ast.get_docstring(ast.parse(module.read_text("utf-8")))
        if module.name == "__init__.py" and not module.read_text("utf-8").strip():
            continue
        assert text, f"{name(module)} has no docstring"
        assert re.search(r"[.:;)]$", text.partition("\n")[0]), f"{name(module)}: {text[:80]}"


def test_sources_refer_to_pages_that_are_here() -> None:
    """Docs by their path, and never a page outside of the repository."""
    for path in [*MODULES, *sorted((ROOT / "tests").rglob("*.py")), ROOT / ".importlinter"]:
        text = path.read_text("utf-8")
        assert "DES" + "IGN" not in text, f"{path} names a page that is not here"
        for page in re.findall(r"docs/[\w/-]+\.(?:md|json|png)", text):
            assert (ROOT / page).is_file(), f"{path} names {page}, which is not here"


def test_no_grab_bags() -> None:
    assert not [name(m) for m in MODULES if m.stem in GRAB_BAGS]


def test_no_pickle() -> None:
    assert not [name(m) for m in MODULES if PICKLED.search(m.read_text("utf-8"))]


def test_outside_packages_only_in_their_rooms() -> None:
    wrong = []
    for module in MODULES:
        for imported in imports(module):
            if imported.startswith("torch.distributed") and room(module) not in DISTRIBUTED:
                wrong.append(f"{name(module)} imports {imported}")
            if imported.split(".")[0] == "transformers" and room(module) not in TRANSFORMERS:
                wrong.append(f"{name(module)} imports {imported}")
    # doctor only asks which backends torch was built with
    assert [each for each in wrong if not each.startswith("launch/doctor.py")] == []


def test_environment_is_read_in_one_place() -> None:
    pattern = re.compile(r"os\.(environ|getenv)")
    readers = {name(m) for m in MODULES if pattern.search(m.read_text("utf-8"))}
    # runtime sets what gloo reads; nothing there decides what a run does
    assert readers <= {"environment.py", "runtime.py"}, readers


def test_no_unfinished_marks_and_no_machine_paths() -> None:
    mark = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    home = re.compile("/(ro" + "ot|home/[a-z]+|wo" + "rk)/")
    for path in [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]:
        text = path.read_text("utf-8")
        assert not mark.search(text), path
        assert not home.search(text), path


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_shipped_recipes_load(recipe: str) -> None:
    assert load_recipe(recipe).train.global_batch_samples > 0


def test_command_line_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from shoal.cli.main import main\n"
        "try:\n    main(['config', 'show', 'quickstart'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "global batch" in found.stdout
