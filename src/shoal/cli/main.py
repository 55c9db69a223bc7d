"""The command line: lazy, so that `shoal --help` answers at once; errors become exit statuses."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import typer

from shoal.cli import (
    config,
    data,
    doctor,
    evaluate,
    generate,
    merge,
    parity,
    plan,
    rehearse,
    resume,
    simulate,
    train,
)
from shoal.errors import Interrupted, ShoalError, UserError, disk_problem

app = typer.Typer(
    name="shoal",
    help="Train transformer models in parallel; one seed, one loss curve, in any layout.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.command("train")(train.train)
app.command("resume")(resume.resume)
app.command("merge")(merge.merge)
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)
app.command("parity")(parity.parity)
app.command("rehearse")(rehearse.rehearse)
app.command("doctor")(doctor.doctor)
app.command("plan", no_args_is_help=True)(plan.plan)
app.command("simulate", no_args_is_help=True)(simulate.simulate)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")


_INTERRUPTED = 130
"""typer's own status for a KeyboardInterrupt, which it does not let through."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0 done, 2 the user's mistake, 75 stopped and saved, 1 the rest."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    try:
        status = app(args=given, standalone_mode=False) or 0
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


def _tell(error: ShoalError, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"shoal: {error}", file=sys.stderr)
    return error.exit_status


def _unexpected(error: Exception) -> int:
    """click's own usage errors carry how to show themselves; anything else is a defect of ours."""
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        error.show()
        return int(error.exit_code)
    if isinstance(error, OSError) and disk_problem(error) is not None:
        print(f"shoal: {disk_problem(error)}", file=sys.stderr)
        return UserError.exit_status
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        print(f"shoal: {where}{error.strerror or error}", file=sys.stderr)
        return 2 if isinstance(error, FileNotFoundError | PermissionError) else 1
    traceback.print_exc()
    print("shoal: this is a defect of shoal, not a mistake of yours", file=sys.stderr)
    return 1
