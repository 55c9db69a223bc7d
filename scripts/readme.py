"""Writes what the READMEs and docs say of the sources: the map of files, and the table of tasks.

python scripts/readme.py           write
python scripts/readme.py --check   exit 1 when a page is not current

The map (docs/contribute/map.md) comes from the modules' own first lines, the table from shoal.legal
and shoal.tasks: which layouts and policies run today with the model families that have a task.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pages import ROOT, write_or_check
from shoal.errors import ModelError
from shoal.layout import Layout
from shoal.legal import (
    Combination,
    axes_of,
    facts_from_config,
    family_of,
    not_yet,
    of_two,
    problems,
)
from shoal.legal.families.table import FAMILIES, known_families
from shoal.legal.rules import IMPLEMENTED_AXES, IMPLEMENTED_POLICIES, POLICIES
from shoal.tasks.kinds import KINDS

SOURCE = ROOT / "src" / "shoal"
MAP = ROOT / "docs" / "contribute" / "map.md"
BEGIN, END = "<!-- tasks: written by scripts/readme.py -->", "<!-- end of tasks -->"
ORDER = (
    *("cli", "prove", "fleet", "page", "launch", "engine", "serve", "compress", "parallel"),
    *("sync", "models", "tasks", "data", "comm", "checkpoint", "plan", "observe", "runtime.py"),
    *("legal", "config", "recipes", "layout.py", "boxes.py", "fields.py", "units.py"),
    *("environment.py", "untrusted.py", "splitmix.py", "language", "errors.py"),
)
MAP_HEAD = """\
# Map: every file and what it is for

Written by `scripts/readme.py` from the first line of each module. Higher folders may import lower
ones; folders of one layer never import each other (`.importlinter`, checked).

"""
WORDS = {
    "README.md": {
        "task": "task",
        "families": "model families",
        "yes": "yes",
        "no": "no",
        "of": "{} of {}",
        "later": "Designed and refused today: {policies} (policies).",
        "and": ", ",
    },
    "README.zh.md": {
        "task": "任务",
        "families": "模型家族",
        "yes": "可以",
        "no": "不行",
        "of": "{1} 个中的 {0} 个",
        "later": "已设计、今天会被拒绝：{policies}（策略）。",
        "and": "、",
    },
}


def first_line(path: Path) -> str:
    """First line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def file_map() -> str:
    """docs/contribute/map.md: a row per room, its modules with what each is for."""
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
    return MAP_HEAD + "\n".join([*lines, "```"]) + "\n"


def families_of(kind: str) -> list[str]:
    """Families with a known table whose models have the head of a task."""
    transformers = importlib.import_module("transformers")
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    head = KINDS[kind].auto_class.removeprefix("AutoModelFor")
    table = re.sub("(?<=[a-z])(?=[A-Z])", "_", head).upper()  # CausalLM: CAUSAL_LM
    halves = {"SEQ2SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ2SEQ": "SPEECH_SEQ_2_SEQ"}
    names = "MODEL_MAPPING_NAMES" if head == "AutoModel" else ""
    heads = getattr(auto, names or f"MODEL_FOR_{halves.get(table, table)}_MAPPING_NAMES")
    able = [name for name in known_families() if name in heads]
    able = able or [name for name in FAMILIES if name in heads]  # known, without its sizes
    able = [name for name in able if bool(family_of(name).more_blocks) == (table in halves)]
    sized = transformers.CONFIG_MAPPING
    return [name for name in able if not KINDS[kind].causal or _is_causal(sized[name]())]


def _is_causal(config: Any) -> bool:
    try:
        return facts_from_config(config.to_dict()).causal
    except ModelError:  # defaults without sizes: an entry of a decoder
        return True


def task_table(words: dict[str, str]) -> str:
    """Tasks by axes and policies: what runs today, from the rules that refuse everything else."""
    axes = [each.name for each in fields(Layout)]
    built = [axis for axis in axes if axis in IMPLEMENTED_AXES]
    policies = [each for each in POLICIES if each in IMPLEMENTED_POLICIES]
    lines = [
        f"| {' | '.join([words['task'], words['families'], *built, *policies])} |",
        "| --- " * (2 + len(built) + len(policies)) + "|",
    ]
    for kind in KINDS:
        names = families_of(kind)
        cells = [_cell([_runs(kind, name, axis) for name in names], words) for axis in built]
        for policy in policies:
            workers = "threads" if policy == "hogwild" else "processes"
            two = Combination(layout=Layout(replicate=2), policy=policy, workers=workers)
            ways = [replace(two, family=name) for name in names]
            cells.append(_cell([not problems(each) for each in ways], words))
        lines.append(f"| `{kind}` | {len(names)} | {' | '.join(cells)} |")
    if set(policies) == set(POLICIES):
        return "\n".join(lines)
    later = words["later"].format(
        axes=words["and"].join(axis for axis in axes if axis not in built),
        policies=words["and"].join(each for each in POLICIES if each not in policies),
    )
    return "\n".join([*lines, "", later])


def _runs(kind: str, family: str, axis: str) -> bool:
    """Whether a family runs at degree 2 along an axis today (as scripts/layouts.py has it)."""
    read = {"gemma3": "gemma3_text"}.get(family, family)
    whole = KINDS[kind].whole_logits
    asked = Combination(layout=of_two(axis), family=read, whole_logits=whole)
    refused = [each for each in problems(asked) if whole and each.where == "parallel.tensor"]
    staged = axis != "pipeline" or KINDS[kind].runs_once
    return axis in axes_of(family) and staged and not not_yet(asked) and not refused


def _cell(runs: list[bool], words: dict[str, str]) -> str:
    if all(runs):
        return words["yes"]
    return words["of"].format(sum(runs), len(runs)) if any(runs) else words["no"]


def updated(text: str, table: str) -> str:
    """`text` with the table between the marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"scripts/readme.py: expected the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def pages() -> dict[Path, str]:
    """Every page that this script has a hand in, as it should be."""
    found = {MAP: file_map()}
    for name, words in WORDS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        found[ROOT / name] = updated(text, task_table(words))
    return found


if __name__ == "__main__":
    sys.exit(write_or_check(pages(), script="readme"))
