"""One live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest

from shoal.observe.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, **more: object) -> dict[str, object]:
    return {"step": number, "loss": 2.5, "step_seconds": 0.5, "tokens_per_second": 12_300, **more}


def test_a_terminal_has_one_line_that_is_drawn_again() -> None:
    out = Terminal()
    console = Console(steps=10, out=out)
    for number in (1, 2, 3):
        console.row(step(number))
    assert "\n" not in out.getvalue()
    last = out.getvalue().rpartition("\r\x1b[K")[2]
    assert last == "step     3/10  loss 2.5000  12.3k tokens/s  3.5 s left"
    console.line("something that stays")
    assert out.getvalue().endswith("\r\x1b[Ksomething that stays\n")


def test_a_long_line_does_not_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    out = Terminal()
    Console(steps=10, out=out).row(step(1))
    assert len(out.getvalue().removeprefix("\r\x1b[K")) < 20


def test_elsewhere_plain_lines_now_and_then() -> None:
    out = io.StringIO()
    console = Console(steps=100, out=out, lines_every_seconds=3600)
    for number in range(1, 101):
        console.row(step(number))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "100/100"]
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


def test_a_loss_that_is_no_number_is_shown() -> None:
    out = io.StringIO()
    Console(out=out).row(step(1, loss=None))
    assert "loss nan" in out.getvalue()


def test_evaluations_and_samples() -> None:
    out = io.StringIO()
    row = {"step": 5, "evaluation_loss": 1.25, "perplexity": 3.49, "seconds": 0.1}
    Console(out=out).row({**row, "completions": [["A: hello\nB:", " good day"]]})
    assert out.getvalue().splitlines() == [
        "step     5  evaluation: evaluation loss 1.25, perplexity 3.49",
        "      | A: hello",
        "      | B: good day",
    ]


def test_events_worth_a_line() -> None:
    out = io.StringIO()
    console = Console(out=out)
    console.event("saved", {"step": 3})
    console.event("skipped", {"text": "step skipped: no targets"})
    console.phase("the first step")
    first, second = out.getvalue().splitlines()
    assert first == "skipped: step skipped: no targets"
    assert second.startswith("[") and second.endswith("s] the first step")
