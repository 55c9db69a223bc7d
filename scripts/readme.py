"""Writes the map of folders into README.md and README.zh.md, from the modules' own first lines.

python scripts/readme.py           write
python scripts/readme.py --check   exit 1 when a README is not current
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "shoal"
BEGIN, END = "<!-- map: written by scripts/readme.py -->", "<!-- end of map -->"
READMES = ("README.md", "README.zh.md")
ORDER = (
    *("cli", "prove", "launch", "engine", "serve", "parallel", "sync"),
    *("models", "tasks", "data", "comm", "checkpoint", "plan", "observe", "runtime.py"),
    *("legal", "config", "recipes", "layout.py", "boxes.py", "fields.py", "units.py"),
    *("environment.py", "untrusted.py", "errors.py"),
)


def first_line(path: Path) -> str:
    """First line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def table() -> str:
    """The map: a row per room, its modules with what each is for."""
    lines = ["```", "src/shoal/"]
    names = [name for name in ORDER if (SOURCE / name).exists()]
    known = set(ORDER) | {"__init__.py", "__pycache__"}
    unknown = sorted(path.name for path in SOURCE.iterdir() if path.name not in known)
    if unknown:
        raise SystemExit(f"scripts/readme.py: give {', '.join(unknown)} a place in ORDER")
    for name in names:
        path = SOURCE / name
        if path.is_file():
            lines.append(f"  {name:<18} {first_line(path)}")
            continue
        lines.append(f"  {name}/")
        for module in sorted(path.rglob("*.py")):
            about = first_line(module)
            inner = module.relative_to(path).as_posix()
            if about and inner != "__init__.py":
                lines.append(f"    {inner:<18} {about}")
        if name == "recipes":
            recipes = ", ".join(sorted(each.stem for each in path.glob("*.yaml")))
            lines.append(f"    {'*.yaml':<18} {recipes}")
    return "\n".join([*lines, "```"])


def updated(text: str) -> str:
    """`text` with the map between the marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"scripts/readme.py: expected the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Write, or check."""
    stale = []
    for name in READMES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = updated(text)
        if new != text:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        print(f"not current: {', '.join(stale)}; run python scripts/readme.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
