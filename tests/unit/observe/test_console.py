"""One live line on a terminal, plain lines elsewhere; nothing is silent, nothing is obeyed."""

from __future__ import annotations

import io
import re
import time

import pytest

from screen import on_a_terminal
from shoal.observe import console as module
from shoal.observe.console import Console
from shoal.observe.progress import BAR, fitting, wrapped

PROGRAM = """
import sys, time
from shoal.observe.console import Console
with Console(steps=400) as console:
    console.phase("importing torch and transformers")
    time.sleep(0.6)
    for number in range(3):
        console.progress("tokenizing tales", number / 4)
        time.sleep(0.3)
    for step in (1, 2, 3):
        console.row({"step": step, "loss": 2.5, "step_seconds": 0.5, "tokens_per_second": 12_300,
                     "learning_rate": 1e-3, "gradient_norm": 1.25})
    console.row({"step": 3, "evaluation_loss": 5.761, "perplexity": 317.7,
                 "evaluation_targets": 144.0, "evaluation_loss/the-first-source": 5.5,
                 "evaluation_loss/the-second-source": 6.25})
    time.sleep(0.6)
print("shoal: stopped after step 3, saved", file=sys.stderr)
"""


def step(number: int, **more: object) -> dict[str, object]:
    return {"step": number, "loss": 2.5, "step_seconds": 0.5, "tokens_per_second": 12_300, **more}


@pytest.mark.parametrize("columns", [46, 100])
def test_what_stays_on_a_terminal(columns: int) -> None:
    _, screen = on_a_terminal(PROGRAM, columns=columns)
    first, *middle, last = screen.lines
    assert re.match(r"\[ +0\.\d s\] importing torch and", first)
    assert last == "shoal: stopped after step 3, saved", "an error has a line of its own"
    said = "evaluation at step 3: loss 5.761, perplexity 317.7, loss/the-first-source 5.5,"
    assert " ".join(line.strip() for line in middle if "importing" not in line).endswith(
        f"{said} loss/the-second-source 6.25"
    )
    assert all(len(line) <= columns for line in screen.lines)
    assert not any("left" in line or "tokenizing" in line for line in screen.lines), "live only"


@pytest.mark.parametrize("columns", [46, 100])
def test_the_live_line_is_one_row(columns: int) -> None:
    text, _ = on_a_terminal(PROGRAM, columns=columns)
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", row) for row in re.split("[\r\n]+", text)]
    live = [row for row in drawn if "left" in row or "tokenizing" in row]
    assert live and all(len(row) < columns for row in live)
    assert any("tokenizing tales" in row and "50%" in row for row in live)
    steps = next(row for row in live if "3/400" in row)
    assert "loss 2.5000" in steps and "3m 18s left" in steps
    wide = {"━", "rate 1.00e-03", "norm 1.25", "12.3k tokens/s"}
    assert {word for word in wide if word in steps} == (wide if columns == 100 else set())
    assert len({row for row in drawn if "importing" in row}) >= 2, "its seconds are drawn again"


def test_a_terminal_that_cannot_redraw_gets_plain_lines() -> None:
    text, screen = on_a_terminal(PROGRAM, columns=80, term="dumb")
    assert "\x1b" not in text
    assert "step     1/400  loss 2.5000  12.3k tokens/s" in screen.lines


def test_fields_go_from_the_least_important() -> None:
    fields = [(0, "step 1/9"), BAR, (1, "loss 2.5"), (4, "9 tokens/s"), (2, "9 s left")]

    def kept(room: int) -> list[str]:
        return [text.strip() or "bar" for _, text in fitting(fields, room=room)[0]]

    assert fitting(fields, room=60) == (fields, 60 - 50)
    assert kept(49) == ["step 1/9", "bar", "loss 2.5", "9 s left"]
    assert kept(30) == ["step 1/9", "loss 2.5", "9 s left"]
    assert kept(20) == ["step 1/9", "loss 2.5"]
    assert kept(8) == kept(4) == ["step 1/9"]


def test_a_path_is_not_broken() -> None:
    path = "/a/very/long/path/that/people/copy"
    assert wrapped(f"in {path}", columns=20) == f"in\n    {path}"


def test_elsewhere_plain_lines_now_and_then() -> None:
    out = io.StringIO()
    console = Console(steps=100, out=out, lines_every_seconds=3600)
    for number in range(1, 101):
        console.row(step(number))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "100/100"]
    assert lines[1] == "step   100/100  loss 2.5000  12.3k tokens/s  0.0 s left"
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


def test_a_phase_that_takes_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    out = io.StringIO()
    console = Console(out=out)
    console.progress("tokenizing tales", 0.25)
    deadline = time.monotonic() + 20
    while "\n" not in out.getvalue() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert re.fullmatch(r" +tokenizing tales: \d+ s so far, 25% done\n", out.getvalue())
    console.close()
    said = out.getvalue()
    time.sleep(1.2)
    assert out.getvalue() == said, "nothing goes on any more"


def test_a_loss_that_is_no_number_is_shown() -> None:
    out = io.StringIO()
    Console(out=out).row(step(1, loss=None))
    assert "loss nan" in out.getvalue()


def test_evaluations_and_samples() -> None:
    out = io.StringIO()
    row = {"step": 5, "evaluation_loss": 1.25, "perplexity": 3.49, "seconds": 0.1}
    row["evaluation_targets"] = 144.0
    Console(out=out).row({**row, "completions": [["A: hello\nB:", " good day\nA: bye"]]})
    assert out.getvalue().splitlines() == [
        "evaluation at step 5: loss 1.25, perplexity 3.49",
        "  prompt     | A: hello",
        "             | B:",
        "  completion | good day",
        "             | A: bye",
    ]


def test_escape_sequences_of_a_model_are_shown_not_sent() -> None:
    out = io.StringIO()
    console = Console(out=out)
    evil = "\x1b]0;title\x07\x1b[2Jgone\r\x9b31m\u202edesrever"
    console.row({"step": 5, "evaluation_loss": 1.25, "completions": [["A:", evil]]})
    console.event("skipped", {"text": evil})
    console.phase(evil)
    assert not set("\x1b\x07\r\x9b\u202e") & set(out.getvalue())
    shown = r"\x1b]0;title\x07\x1b[2Jgone\r\x9b31m\u202edesrever"
    assert out.getvalue().count(shown) == 3


def test_events_worth_a_line() -> None:
    out = io.StringIO()
    console = Console(out=out)
    console.event("saved", {"step": 3})
    console.event("skipped", {"text": "step skipped: no targets"})
    console.event("resumed", {"step": 134})
    console.phase("the first step")
    first, second, third = out.getvalue().splitlines()
    assert first == "skipped: step skipped: no targets"
    assert second == "resumed: going on after step 134"
    assert third.startswith("[") and third.endswith("s] the first step")
