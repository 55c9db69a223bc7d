"""shoal chat: talk to a model folder in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say, show


def chat(
    model: Annotated[Path, typer.Argument(help="A model folder, or a run that has one.")],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same answers.")] = 0,
) -> None:
    """Talk to a model by its chat template; what was said before is kept.

    One line is one message, from the terminal or from standard input. /new begins anew, /exit or
    the end of the input ends.
    """
    from shoal.observe.console import Console
    from shoal.serve.chat import Conversation

    with Console(out=sys.stderr) as console:
        console.phase("importing torch and transformers")
        talk = Conversation(model, system=system, seed=seed, say=console.phase)
    terminal = sys.stdin.isatty()

    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/new":
                talk.begin()
            case text:
                talk.answer(text, tokens=tokens, temperature=temperature, show=show)
                say("")
