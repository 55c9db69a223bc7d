"""Reads every text that a person may see out of the sources, into the catalogue of translations.

    python scripts/catalogue.py            # merge what is new into the .po files, drop what is gone
    python scripts/catalogue.py --check    # exit status 1 where the files are not current

A message is one line of a text in the sources: what an f-string puts in is a placeholder. Where it
chooses between two endings of a word ("problem{'s' if count != 1 else ''}") the placeholder's name
begins with an underscore, and a translation leaves it out. Texts that no person reads (checks that
only a defect of ours meets, regular expressions, scripts, queries) are left out by `_is_prose` and
`UNSEEN`. What these files are for: docs/contribute/translations.md.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from shoal.language.catalogue import read_po  # noqa: E402

CATALOGUES = {
    ROOT / "src" / "shoal": ROOT / "src" / "shoal" / "language" / "zh_CN.po",
    ROOT / "apps": ROOT / "apps" / "zh_CN.po",
}

UNSEEN: dict[str, tuple[str, ...]] = {
    "": (
        "Value error",
        "{value} {value2}",
        "{prefix}",
        "{what}start",
        "{parent}; ",
        "<!doctype",
        "{{%",
        "$(",
        "&&",
        "pragma ",
        " integer, ",
        " real, ",
    ),
    "__init__.py": ("has no attribute",),
    "cli/": ("{name} data  ", "Result({run}"),
    "cli/helping.py": ("",),
    "cli/main.py": ("shoal: {", "shoal compare", "shoal {version}"),
    "comm/keys.py": ("Pair(",),
    "config/problems.py": ("Value error",),
    "data/registry.py": ("libreoffice-help", "10.5281"),
    "data/fetch.py": ("No module named pip",),
    "engine/saving/": ("{{",),
    "environment.py": ("model name",),
    "errors.py": ("allocate memory", "out of memory"),
    "launch/clusters/ray.py": ("",),  # a program for Ray
    "launch/clusters/slurm.py": ("srun ", "scontrol", "kill ", "if [", "--hosts HOSTS"),
    "launch/clusters/start.py": ("if {", "kill ", "while ", "wait "),
    "launch/clusters/hosts_file.py": ("ssh {",),
    "launch/registry/etcd.py": ("lease not found", "not found"),
    "launch/site.py": ("most recent",),
    "launch/torchrun.py": ("shoal: ",),
    "launch/candidates.py": ("setup micro",),
    "prove/comparison.py": ("final loss ratio",),
    "prove/rehearse.py": ("fault noticed",),
    "page/web.py": ("event: ", "id: ", "data: ", "?token="),
    "plan/picture.py": ("upper left",),
    "serve/http/": ("data: ", "shoal:"),
    "tasks/embedding_scores.py": ("lower right",),
    "tasks/image_classification.py": ("{names}, not ",),
    "tasks/speech_recognition.py": ("{wrong} of",),
    "tasks/pictures.py": ("{{",),
    "command.py": ("python -m",),
    "opinion/monitor.py": ("label text", "messages integer", "and negative", "order by"),
    "recommend/__main__.py": ("{asked} limit",),
    "support/desk.py": ("a an and", "Answer the question", "Text: {", "Question: {"),
    "support/store.py": ("text text", "question text"),
    "telling.py": ("state text",),
}
"""Texts by the beginning of their file's path and a part of them: what no person is told."""

COMMANDS = re.compile(r"^shoal [a-z]+( ([\w./{]+|[a-z-]+ --|--)[^,;]*)?$|^pip install|^chmod")
"""Lines that are typed, not read."""

OF_CLICK = [
    "Usage:",
    "Options:",
    "Arguments:",
    "Commands:",
    "Show this message and exit.",
    "Install completion for the current shell.",
    "Show completion for the current shell, to copy it or customize the installation.",
    "[required]",
    "[default: {default}]",
    "[default: {default}; {range}]",
    "[{range}; required]",
    "Example: {example}",
    "Examples:",
    "Try '{command}' for help.",
    "Error:",
    "No such option: {name}",
    "No such option: {name} Did you mean {possibility}?",
    "(Possible options: {possibilities})",
    "No such command {name}.",
    "No such command {name}. Did you mean {possibility}?",
    "Missing argument {name}.",
    "Missing option {name}.",
    "Missing command.",
    "Option {name} requires an argument.",
    "Option {name} does not take a value.",
    "Got unexpected extra argument(s) ({arguments})",
    "Invalid value for {param_hint}: {message}",
    "Invalid value: {message}",
    "{value} is not a valid {number_type}.",
    "{value} is not in the range {range}.",
    "{value} is not one of {choices}.",
]
"""What the library of the command line says itself."""

MORE = {
    "data/registry.py": ["BERT, 22.7M parameters, 6 layers (all-MiniLM-L6-v2)"],
    "cli/data.py": ["made here"],
    "data/prepare.py": ["tokenizing {name}", "reading {name}"],
    "engine/decision.py": [
        "1 worker with {threads} core{_1}",
        "1 worker with {threads} core{_1}, micro batch {micro}, {compute}: {reason}",
        "{count} processes",
        "{count} threads",
        "{count} processes with {threads} cores each",
    ],
    "launch/candidates.py": [
        "setup",
        "s a step",
        "turns",
        "1 worker with {threads} core{_1} {seconds} s",
        "{count} processes {seconds} s",
        "{count} threads {seconds} s",
        "{count} processes with {threads} cores each {seconds} s",
    ],
    "launch/opening.py": [
        "{count} tokens",
        "{count} documents",
        "before the first step and {every}, on {which} of {count} validation samples ({share})",
    ],
    "launch/summary.py": ["next:"],
    "observe/console.py": [
        "step",
        "{count} tokens/s",
        "perplexity {perplexity}",
        "accuracy {accuracy}",
    ],
    "prove/certificate.py": ["tolerance"],
    "prove/comparison.py": [
        "final loss",
        "ratio",
        "equal tokens",
        "equal time",
        "bytes/token",
        "peak step",
        "stale",
    ],
    "prove/rehearse.py": ["fault", "noticed as", "after", "recovered", "culprit", "named"],
    "plan/hardware.py": ["{gbit} Gbit/s per device between nodes"],
    "plan/explain.py": [
        "{schedule} with {chunks} stages per rank",
        "One device is enough: it takes {seconds} a step (predicted); "
        "{workers} devices are {gain} x as fast",
        "One device alone takes {seconds} a step (predicted); "
        "{workers} devices are {gain} x as fast",
        "host",
        "compute",
        "activations",
        "weights",
        "reserve",
    ],
}
"""Texts that are put together of words, by the file that does so."""

_HEADINGS = {"config/statement.py": "statements", "launch/opening.py": "opening"}
"""Functions whose dictionary's keys stand before their texts, by file."""


def main() -> int:
    """Write or check every catalogue."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true", help="Write nothing.")
    given = arguments.parse_args()
    wrong = False
    for sources, path in CATALOGUES.items():
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        made, lacking = merged(sources, old)
        if given.check and made != old:
            print(f"{path.relative_to(ROOT)} is not current: run python scripts/catalogue.py")
            wrong = True
        if not given.check:
            path.write_text(made, encoding="utf-8")
        for text in lacking:
            print(f"{path.relative_to(ROOT)}: no translation of: {text}")
        wrong |= bool(lacking)
    return int(wrong)


def merged(sources: Path, old: str) -> tuple[str, list[str]]:
    """The catalogue of the sources with the translations that `old` has, and what it lacks."""
    known = {entry.id: entry.text for entry in read_po(old)}
    found = messages(sources).values()
    lines = [_HEAD, *(each.block(known.get(each.id, "")) for each in found)]
    return "\n".join(lines), [each.id for each in found if not known.get(each.id)]


_HEAD = """\
# Texts of shoal in simplified Chinese. Written by scripts/catalogue.py; translators fill in msgstr.
msgid ""
msgstr ""
"Language: zh_CN\\n"
"MIME-Version: 1.0\\n"
"Content-Type: text/plain; charset=UTF-8\\n"
"Content-Transfer-Encoding: 8bit\\n"
"""


_FORMATS = ("config/problems.py", "launch/hang.py")
"""Files whose plain texts are filled in by `str.format`."""


@dataclass
class Message:
    """One line that a person may see, and the files that hold it."""

    id: str
    files: list[str] = field(default_factory=list)

    def block(self, text: str) -> str:
        """As a .po file has it."""
        flag = "#, python-brace-format\n" if "{" in self.id else ""
        files = "".join(f"#: {each}\n" for each in self.files)
        return f'{files}{flag}msgid "{escaped(self.id)}"\nmsgstr "{escaped(text)}"\n'


def escaped(text: str) -> str:
    """As it stands between the quotation marks of a .po file."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\t", "\\t")


def messages(sources: Path) -> dict[str, Message]:
    """Every message below a folder, in the order of the files."""
    found: dict[str, Message] = {}
    if sources.name == "shoal":
        for text in OF_CLICK:
            found.setdefault(text, Message(text, ["typer"]))
    for path in sorted(sources.rglob("*.py")):
        name = path.relative_to(sources).as_posix()
        if name.startswith("language/"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for text in [*MORE.get(name, []), *Reader(name).texts(tree)]:
            for line in text.split("\n"):
                if (line := line.strip()) and _is_seen(name, line):
                    held = found.setdefault(line, Message(line))
                    if name not in held.files:
                        held.files.append(name)
    return found


def _is_seen(name: str, line: str) -> bool:
    return not COMMANDS.search(line) and not any(
        name.startswith(place) and part in line for place, parts in UNSEEN.items() for part in parts
    )


_TWO_WORDS = re.compile(
    r"(?<![\w'\\/<.-])[A-Za-z][a-z']*,? +[a-z]{2,}|[a-z]{2,}[,:;]? +[A-Za-z]{2,}"
)
_ONE_WORD = re.compile(r"(^|[\s(])[A-Za-z]?[a-z]{2,}([\s,;:.)]|$)")
_BESIDE = re.compile(r"\} |[a-z:] \{|\}[a-z]|[a-z]\{")
_CODE = re.compile(
    r"\(\?|\\[dswb]|^(SELECT|select|insert|create|update|delete) |\bimport \w+|__|=%"
)
_NAMED = re.compile(r"\w\.\{|\}\.\w|://\{|=\{|\*\.")


def _is_prose(line: str, *, holes: bool) -> bool:
    """Whether a line is in words: two in a row, or one beside what is put in."""
    bare = re.sub(r"\{\w+\}", " ", line)
    if _CODE.search(line):
        return False
    if _TWO_WORDS.search(re.sub(r"\{\w+\}", "{}", line)):
        return True
    return (
        holes and not _NAMED.search(line) and bool(_BESIDE.search(line) and _ONE_WORD.search(bare))
    )


class Reader:
    """The texts of one file."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._taken: set[int] = set()
        self._begun: dict[str, list[ast.Assign]] = {}
        self._statement: ast.stmt | None = None

    def texts(self, tree: ast.Module) -> Iterator[str]:
        """Templates of all texts, in order."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                self._taken.add(id(node.value))
            elif isinstance(node, ast.Assert) and node.msg is not None:
                self._taken |= {id(each) for each in ast.walk(node.msg)}
            for body in ("body", "orelse"):
                if isinstance(block := getattr(node, body, None), list):
                    setattr(node, body, _joined(block))
        yield from self._of(tree)

    def _of(self, node: ast.AST) -> Iterator[str]:
        if id(node) in self._taken:
            return
        if isinstance(node, ast.stmt):
            self._statement = node
        if isinstance(node, ast.FunctionDef):
            self._begun = _beginnings(node)
        if isinstance(node, ast.FunctionDef) and self._is_command(node):
            yield from _paragraphs(ast.get_docstring(node) or "")
        if isinstance(node, ast.FunctionDef) and node.name == _HEADINGS.get(self._name):
            yield from self._headings(node)
        if isinstance(node, ast.Constant | ast.JoinedStr) or _is_sum(node):
            yield from self._template(node)
            return
        if isinstance(node, ast.Call) and _name_of(node.func) in ("compile", "getLogger"):
            return
        helped = [each.value for each in getattr(node, "keywords", []) if each.arg == "help"]
        for each in helped:
            if isinstance(each, ast.Constant) and isinstance(each.value, str):
                self._taken.add(id(each))
                yield each.value
        for child in ast.iter_child_nodes(node):
            yield from self._of(child)

    def _is_command(self, node: ast.FunctionDef) -> bool:
        called = any("command" in ast.dump(each) for each in node.decorator_list)
        if self._name == "cli/main.py" or not self._name.startswith("cli/"):
            return False
        return (
            called
            or node.name == Path(self._name).stem
            or (self._name == "cli/requests.py" and not node.name.startswith("_"))
        )

    @staticmethod
    def _headings(node: ast.FunctionDef) -> Iterator[str]:
        for each in ast.walk(node):
            keys = each.keys if isinstance(each, ast.Dict) and len(each.keys) > 4 else []
            if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Subscript):
                keys = [each.targets[0].slice]
            for key in keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value
                    if node.name == "statements":
                        yield f"{key.value}: {{text}}"

    def _template(self, node: ast.AST) -> Iterator[str]:
        if isinstance(self._statement, ast.Assign) and self._goes_on(node):
            return
        for beginning in self._beginnings_of(node):
            made = _Template(beginning, formats=self._name in _FORMATS)
            made.add(node)
            for line in "".join(made.parts).split("\n"):
                if _is_prose(line, holes="{" in line):
                    yield line
            for each in made.inner:
                yield from self._of(each)

    def _goes_on(self, node: ast.AST) -> bool:
        """Whether a text is only ever read as the beginning of others."""
        assert isinstance(self._statement, ast.Assign)
        name = _name_of(self._statement.targets[0])
        return self._statement.value is node and _is_begun(node) and name in self._begun

    def _beginnings_of(self, node: ast.AST) -> list[ast.AST | None]:
        """What the variable may hold with which an f-string begins; None where it is no text."""
        first = node
        while isinstance(first, ast.BinOp):
            first = first.left
        if isinstance(first, ast.JoinedStr):
            first = first.values[0]
        name = _name_of(first.value) if isinstance(first, ast.FormattedValue) else _name_of(first)
        assert self._statement is not None
        found: list[ast.AST | None] = []
        for each in self._begun.get(name, []):
            if each.lineno < self._statement.lineno:
                if _is_begun(each.value):
                    found.append(each.value)
                if each.col_offset <= self._statement.col_offset:
                    break
        return found or [None]


def _beginnings(function: ast.FunctionDef) -> dict[str, list[ast.Assign]]:
    """Assignments of texts by the variable, the last first: others may go on from there."""
    found: dict[str, list[ast.Assign]] = {}
    for each in ast.walk(function):
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
            found.setdefault(each.targets[0].id, []).append(each)
    return {name: sorted(all_, key=lambda each: -each.lineno) for name, all_ in found.items()}


def _is_begun(node: ast.AST) -> bool:
    """Whether a text ends with a space, so that another goes on from it."""
    parts = getattr(node, "values", [node])
    last = parts[-1] if isinstance(node, ast.Constant | ast.JoinedStr) else None
    text = last.value if isinstance(last, ast.Constant) else ""
    return isinstance(text, str) and text.endswith(" ") and len(text) > 1


def _joined(block: list[ast.stmt]) -> list[ast.stmt]:
    """A block in which `x = a` with `x += b` behind it is one sum."""
    made: list[ast.stmt] = []
    for each in block:
        last = made[-1] if made else None
        if (
            isinstance(each, ast.AugAssign)
            and isinstance(each.op, ast.Add)
            and isinstance(last, ast.Assign)
            and ast.dump(last.targets[0]) == ast.dump(each.target).replace("Store", "Store")
            and _is_sum(ast.BinOp(last.value, ast.Add(), each.value))
        ):
            whole = ast.Assign(last.targets, ast.BinOp(last.value, ast.Add(), each.value))
            made[-1] = ast.copy_location(whole, last)
        else:
            made.append(each)
    return made


def _is_sum(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Add)
        and any(
            isinstance(each, ast.JoinedStr)
            or (isinstance(each, ast.Constant) and isinstance(each.value, str))
            or _is_sum(each)
            for each in (node.left, node.right)
        )
    )


class _Template:
    """One string expression, its values as named placeholders."""

    def __init__(self, beginning: ast.AST | None, *, formats: bool) -> None:
        self._beginning = beginning
        self._formats = formats
        self.parts: list[str] = []
        self.inner: list[ast.AST] = []
        self._names: dict[str, str] = {}

    def add(self, node: ast.AST) -> None:
        """Append what `node` contributes."""
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                self.parts.append(self._literal(node.value))
        elif isinstance(node, ast.JoinedStr):
            for each in node.values:
                self.add(each)
        elif isinstance(node, ast.FormattedValue):
            self._value(node.value)
        elif _is_sum(node):
            assert isinstance(node, ast.BinOp)
            self.add(node.left)
            self.add(node.right)
        else:
            self._value(node)

    def _literal(self, text: str) -> str:
        if not self._formats:
            return text.replace("{", "{{").replace("}", "}}")
        counted = iter(range(1, 9))

        def written(mark: re.Match[str]) -> str:
            if mark[0] == "{}":
                return f"{{part{next(counted)}}}"
            return mark[0] if len(mark[0]) > 1 else 2 * mark[0]

        return re.sub(r"\{\w*\}|[{}]", written, text)

    def _value(self, node: ast.AST) -> None:
        if isinstance(node, ast.Constant):  # room, as in f"{'':8}"
            self.parts.append(str(node.value) or " ")
            return
        beginning, self._beginning = self._beginning, None
        if beginning is not None and not self.parts:
            self.add(beginning)
            return
        self.parts.append(f"{{{self._name(node)}}}")
        if not _is_ending(node):
            self.inner.append(node)

    def _name(self, node: ast.AST) -> str:
        base = (
            f"_{len([n for n in self._names.values() if n[0] == '_']) + 1}"
            if _is_ending(node)
            else _called(node)
        )
        base = base or "value"
        key = ast.dump(node)
        if key not in self._names or base[0] == "_":
            name, number = base, 2
            while name in self._names.values():
                name, number = f"{base}{number}", number + 1
            self._names[key if base[0] != "_" else f"{key}{name}"] = name
            return name
        return self._names[key]


def _is_ending(node: ast.AST) -> bool:
    """A choice between two endings or words of English grammar."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Constant) and node.value.value == "s"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return isinstance(node.left, ast.Constant) and node.left.value == "s"
    return isinstance(node, ast.IfExp) and all(
        isinstance(each, ast.Constant)
        and isinstance(each.value, str)
        and re.fullmatch(
            r"(e?s|y|ies|is|are|was|were|has|have|it|them|its|their|a|an|do|does|that|those|this|these|)",
            each.value,
        )
        for each in (node.body, node.orelse)
    )


def _name_of(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _called(node: ast.AST) -> str:
    """A name for what a placeholder holds."""
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    if isinstance(node, ast.Subscript):
        key = node.slice
        if (
            isinstance(key, ast.Constant)
            and isinstance(key.value, str)
            and key.value.isidentifier()
        ):
            return key.value.strip("_")
        return _called(node.value)
    if isinstance(node, ast.Call):
        name = _name_of(node.func).strip("_")
        if isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Constant):
            if name in ("get",) and node.args and isinstance(node.args[0], ast.Constant):
                return str(node.args[0].value)
            if name in ("strip", "rstrip", "replace", "lower", "upper", "as_posix"):
                return _called(node.func.value)
        if name == "join":
            return _called(node.args[0]) if node.args else "list"
        if (
            name
            in (
                "sorted",
                "str",
                "repr",
                "len",
                "format_bytes",
                "format_seconds",
                "format_count",
                "min",
                "max",
                "round",
                "sum",
                "abs",
                "map",
                "reversed",
                "set",
                "list",
                "int",
                "float",
            )
            and node.args
        ):
            return _called(node.args[-1])
        return name
    if isinstance(node, ast.BinOp):
        return _called(node.left) or _called(node.right)
    if isinstance(node, ast.GeneratorExp | ast.ListComp):
        return _called(node.generators[0].iter)
    if isinstance(node, ast.BoolOp):
        return _called(node.values[0])
    if isinstance(node, ast.IfExp):
        return _called(node.body) or _called(node.orelse) or "part"
    return ""


def _paragraphs(text: str) -> Iterator[str]:
    """A docstring's paragraphs, each as one line."""
    for each in text.split("\n\n"):
        yield re.sub(r"\s+", " ", each).strip()


if __name__ == "__main__":
    sys.exit(main())
