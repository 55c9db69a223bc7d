"""Prints each room's code lines against its budget in pyproject.toml; exit status 1 if one is over.

A room is a folder of src/shoal; `layer0` is the files directly in it
but for runtime.py, which stands above. Code lines are those that
hold code: no blank lines, comments or docstrings.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "shoal"


def code_lines(module: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    text = module.read_text(encoding="utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(
        1
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and line.strip()[0] != "#" and number not in prose
    )


def rooms() -> dict[str, int]:
    """Code lines of every room that has any, the largest first."""
    outside = [module for module in SOURCE.glob("*.py") if module.name != "runtime.py"]
    found = {"layer0": sum(map(code_lines, outside)), "runtime": code_lines(SOURCE / "runtime.py")}
    for folder in (path for path in SOURCE.iterdir() if path.is_dir()):
        found[folder.name] = sum(code_lines(module) for module in folder.rglob("*.py"))
    return dict(sorted(((n, c) for n, c in found.items() if c), key=lambda each: -each[1]))


def budgets() -> dict[str, int]:
    """Most code lines of each room, from pyproject.toml."""
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(tree["tool"]["shoal"]["budgets"])


def main() -> int:
    """Print the table."""
    limits, over = budgets(), False
    for name, lines in rooms().items():
        limit = limits.get(name)
        wrong = limit is None or lines > limit
        over |= wrong
        note = " no budget" if limit is None else f" {lines - limit} over" if wrong else ""
        print(f"{name:<12} {lines:>6,} of {limit or 0:>6,}{note}")
    print(f"{'together':<12} {sum(rooms().values()):>6,} of {sum(limits.values()):>6,}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
