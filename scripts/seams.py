"""Writes the signatures in docs/design/seams.md from the sources, below marks that name a class.

python scripts/seams.py           write
python scripts/seams.py --check   exit 1 when the page is not current

A mark is `<!-- FILE: CLASS -->`, FILE below src/shoal; the code block after it is the class: its
fields, its public methods, and the first line of what each does.
"""

from __future__ import annotations

import ast
import re
import sys

from pages import ROOT, write_or_check

PAGE = ROOT / "docs" / "design" / "seams.md"
_BLOCK = re.compile(r"(<!-- ([\w/.]+): (\w+) -->\n)```python\n.*?```", re.DOTALL)


def signatures(path: str, name: str) -> str:
    """A class as the page shows it."""
    tree = ast.parse((ROOT / "src" / "shoal" / path).read_text(encoding="utf-8"))
    owner = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    bases = ", ".join(ast.unparse(base) for base in owner.bases)
    lines = [f"class {name}({bases}):" if bases else f"class {name}:"]
    for node in owner.body:
        if isinstance(node, ast.AnnAssign | ast.Assign) and not ast.unparse(node).startswith("_"):
            lines.append(f"    {ast.unparse(node)}")
        if not isinstance(node, ast.FunctionDef):
            continue
        if not node.name.startswith("_") or node.name == "__call__":
            about = (ast.get_docstring(node) or "").partition("\n")[0]
            lines += [f"    @{ast.unparse(each)}" for each in node.decorator_list]
            lines.append(f"    def {node.name}({ast.unparse(node.args)}) -> {_returns(node)}")
            lines += [f"        # {about}"] if about else []
    return "\n".join(lines)


def _returns(node: ast.FunctionDef) -> str:
    return ast.unparse(node.returns) if node.returns is not None else "None"


def page() -> str:
    """The page with every block as the sources have it."""
    text = PAGE.read_text(encoding="utf-8")
    return _BLOCK.sub(lambda m: f"{m[1]}```python\n{signatures(m[2], m[3])}\n```", text)


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page()}, script="seams"))
