"""The command line: lazy, so that `shoal --help` answers at once; errors become exit statuses."""

from __future__ import annotations

import copy
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from shoal.cli import (
    agent,
    chat,
    compare,
    compress,
    config,
    data,
    doctor,
    evaluate,
    generate,
    launch,
    merge,
    page,
    parity,
    plan,
    rehearse,
    requests,
    resume,
    run,
    serve,
    simulate,
    train,
)
from shoal.cli.terminal import say, tell
from shoal.environment import language_wanted
from shoal.errors import Interrupted, ShoalError, UserError, disk_problem, nearest
from shoal.language import LANGUAGES, is_english, speak

app = typer.Typer(
    name="shoal",
    help="Train transformer models in parallel; one seed, one loss curve, in any layout.",
    epilog="Begin with: shoal train quickstart. Every command explains itself: shoal train --help.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, command: Callable[..., None], *example: str, **settings: Any) -> None:
    """A command whose first sentence stands whole in the list, with examples at its end."""
    epilog = f"Example: {example[0]}"
    if len(example) > 1:
        epilog = "\b\n" + "\n".join(["Examples:", *(f"  {each}" for each in example)])
    app.command(name, short_help=_sentence(command), epilog=epilog, **settings)(command)


def _sentence(command: Callable[..., Any]) -> str:
    return (inspect.getdoc(command) or "").partition("\n\n")[0].replace("\n", " ")


_add(
    "train",
    train.train,
    "shoal train quickstart",
    "shoal train quickstart data.source=YOUR.txt train.optimizer.learning_rate=3e-4",
    "shoal train quickstart parallel.replicate=2 --out runs/two",
    "shoal train MINE.yaml model.path=FOLDER --dry-run",
)
_add("resume", resume.resume, "shoal resume runs/quickstart-001 parallel.replicate=4")
_add("stop", requests.stop, "shoal stop runs/quickstart-001")
_add("save", requests.save, "shoal save runs/quickstart-001")
_add("drain", requests.drain, "shoal drain h3 runs/quickstart-001")
_add(
    "run",
    run.run,
    "shoal run examples/own_loop.py --workers 2",
    context_settings={"ignore_unknown_options": True},
)
_add("page", page.page, "shoal page", "shoal page runs/quickstart-001 --port 0")
_add("agent", agent.agent, "shoal agent --listen 10.0.0.2 --keys SHARED/keys")
_add("merge", merge.merge, "shoal merge runs/quickstart-001 --out model")
_add("generate", generate.generate, 'shoal generate runs/quickstart-001 "A: Hello"')
_add("chat", chat.chat, "shoal chat runs/quickstart-001")
_add("serve", serve.serve, "shoal serve runs/quickstart-001 replicate=2 port=8000")
_add(
    "compress",
    compress.compress,
    "shoal compress runs/quickstart-001 --out small --quantise int8 --calibrate YOUR.txt",
)
_add("evaluate", evaluate.evaluate, "shoal evaluate runs/quickstart-001 quickstart")
_add("parity", parity.parity, "shoal parity quickstart parallel.replicate=2")
_add("rehearse", rehearse.rehearse, "shoal rehearse quickstart --fault kill:1@20")
_add(
    "compare",
    compare.compare,
    'shoal compare sync-bench --sync every-step --sync "{kind: diloco, every_steps: 30}"',
    "shoal compare quickstart --layout replicate=2 --layout tensor=2",
)
_add("doctor", doctor.doctor, "shoal doctor")
_add(
    "plan",
    plan.plan,
    "shoal plan quickstart --cluster 8xH100",
    no_args_is_help=True,
)
_add(
    "simulate",
    simulate.simulate,
    "shoal simulate quickstart --cluster 8xH100",
    no_args_is_help=True,
)
for _name, _group in (("data", data.app), ("config", config.app), ("launch", launch.app)):
    for _each in _group.registered_commands:
        _each.short_help = _sentence(_each.callback) if _each.callback else None
    app.add_typer(_group, name=_name, short_help=_group.info.help)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        say(f"shoal {version('shoal')}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks, of a user's mistakes too.")
    ] = False,
    lang: Annotated[
        str | None,
        typer.Option("--lang", metavar="LANGUAGE", help="Either en or zh_CN; else the locale's."),
    ] = None,
) -> None:
    """Options that stand before any command; `main` takes --debug and --lang from anywhere."""


_INTERRUPTED = 130
"""typer's own status for a KeyboardInterrupt, which it does not let through."""


def _of(words: Sequence[str]) -> typer.Typer:
    """The application with the one command that `words` begin with; the rest takes a tenth."""
    alone = copy.copy(app)
    alone.registered_commands = [c for c in app.registered_commands if [c.name] == [*words[:1]]]
    alone.registered_groups = [g for g in app.registered_groups if [g.name] == [*words[:1]]]
    return alone if alone.registered_commands or alone.registered_groups else app


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0 done, 2 the user's mistake, 75 stopped and saved, 1 the rest."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    speak(language_wanted())
    try:
        given, language = _language(given)
        speak(language or language_wanted())
        status = _command(_of(given))(args=given, standalone_mode=False) or 0
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
    except ShoalError as error:
        status = _tell(error, debug=debug)
    except (KeyboardInterrupt, typer.Abort):
        status = _tell(Interrupted("interrupted; nothing was begun or saved"), debug=debug)
    except typer.Exit as leave:
        status = leave.exit_code
    except Exception as error:
        status = _unexpected(error)
    sys.exit(status)


def _language(given: list[str]) -> tuple[list[str], str | None]:
    """The words without --lang, and what it says. `shoal run` leaves those behind its script alone.

    Raises UserError for a language that is not there.
    """
    end = len(given)
    if given[:1] == ["run"]:
        end = next((n for n, word in enumerate(given) if word.endswith(".py")), end)
    for number, word in enumerate(given[:end]):
        name, mark, value = word.partition("=")
        if name != "--lang":
            continue
        rest = given[:number] + given[number + (1 if mark else 2) :]
        chosen = value if mark else " ".join(given[number + 1 : number + 2])
        if chosen == "zh":
            chosen = "zh_CN"
        if chosen not in LANGUAGES:
            raise UserError(f"--lang: no language {chosen!r}; {nearest(chosen, LANGUAGES)}")
        return rest, chosen
    return given, None


def _command(commands: typer.Typer) -> Callable[..., Any]:
    """What runs the words of a command line."""
    if is_english():
        return commands
    from shoal.cli.helping import command_of  # lays out help for wide letters

    return command_of(commands)


def _tell(error: ShoalError, *, debug: bool) -> int:
    if debug:
        tell(traceback.format_exc(), verbatim=True)
    tell(f"shoal: {error}")
    return error.exit_status


def _unexpected(error: Exception) -> int:
    """click's own usage errors carry how to show themselves; anything else is a defect of ours."""
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        if is_english():
            error.show()
        else:
            from shoal.cli.helping import show_usage_error

            show_usage_error(error)
        option = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
        from shoal.config.suggest import suggestion  # imports pydantic, which takes a while

        hint = suggestion(option, known=()) if option else ""
        if hint:
            tell(f"Keys of a recipe are given as KEY=VALUE: {hint}")
        return int(error.exit_code)
    if isinstance(error, OSError) and disk_problem(error) is not None:
        tell(f"shoal: {disk_problem(error)}")
        return UserError.exit_status
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        tell(f"shoal: {where}{error.strerror or error}")
        return 2 if isinstance(error, FileNotFoundError | PermissionError) else 1
    tell(traceback.format_exc(), verbatim=True)
    tell("shoal: this is a defect of shoal, not a mistake of yours")
    return 1
