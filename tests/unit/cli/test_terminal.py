"""What commands print: names, recipes and answers of others do not move a terminal."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

from screen import on_a_terminal
from shoal.cli import terminal
from tiny import shoal

EVIL = "\x1b]0;title\x07\x1b[2J\u202eover"
PROGRAM = """
from shoal.cli.main import main
main(["config", "show", "quickstart", "train.freeze=['gone\\u202eover']"])
"""


def test_one_file_writes_for_every_command() -> None:
    """So that each new command is held to the same."""
    for path in Path(terminal.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and path.name != "terminal.py":
                name = ast.unparse(node.func)
                assert name not in {"print", "typer.echo", "sys.stdout.write"}, path
                assert name != "traceback.print_exc", path


def test_a_terminal_gets_no_control_of_others() -> None:
    text, screen = on_a_terminal(PROGRAM, columns=100)
    assert not set("\x1b\x9b\u202e") & set(text)
    assert any(r"frozen: gone\u202eover" in line for line in screen.lines)


def test_a_command_may_colour_what_it_has_spelt_out() -> None:
    program = "from shoal.cli.terminal import say\nsay('\\x1b[32mgreen\\x1b[0m', styled=True)"
    text, screen = on_a_terminal(program, columns=80)
    assert "\x1b[32mgreen\x1b[0m" in text and screen.lines == ["green"]


def test_a_file_gets_what_is_there() -> None:
    words = shoal("config", "show", "quickstart", "train.freeze=['gone\u202eover']")
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "frozen: gone\u202eover" in done.stdout


def test_errors_are_spelt_out_everywhere() -> None:
    words = shoal("train", f"{EVIL}.yaml", "--debug")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert not set("\x1b\x07\u202e") & set(done.stderr)
    assert r"\x1b]0;title\x07\x1b[2J\u202eover.yaml: no such recipe file" in done.stderr
