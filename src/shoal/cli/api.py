"""The commands as functions: what `import shoal` offers beside its errors."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import RunError, UserError
from shoal.launch import local
from shoal.launch.callbacks import Callbacks
from shoal.launch.local import AnyRecipe, Overrides
from shoal.observe.console import Console
from shoal.observe.events import read_lines
from shoal.units import parse_bytes

Listeners = Mapping[str, Callable[[dict[str, Any]], object]]


@dataclass(repr=False)
class Result(local.Result):
    """A run that ended: its directory, its summary, and what it left behind."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, steps and evaluations: `pandas.DataFrame(result.metrics)`."""
        return read_lines(self.run / "metrics.jsonl")

    def checkpoint(self) -> Path:
        """The newest checkpoint that is whole. Raises CheckpointError or RunError for none."""
        from shoal.launch.object_store import saves_of

        store = saves_of(self.run)
        return store.path(store.newest_good(on_bad=lambda step, why: None))

    def model(self) -> Any:
        """The trained model as transformers has it, in float32. Raises ModelError for none."""
        from shoal.serve.reading import model_directory, read_model
        from shoal.tasks.kinds import create

        task = create(self.summary["task"])
        return read_model(model_directory(self.run), auto_class=task.auto_class)

    def __repr__(self) -> str:
        done = f"step {self.summary['steps']} of {self.summary['of_steps']}"
        return f"Result({str(self.run)!r}, {done}, loss {self.loss:.4f})"


def train(
    recipe: AnyRecipe,
    overrides: Overrides = (),
    *,
    out: str | Path | None = None,
    console: bool | None = None,
    callbacks: Listeners | None = None,
) -> Result:
    """Train `recipe`: a shipped name, a YAML file, a dict or a Recipe.

    `overrides`: {"parallel.replicate": 2} or ["parallel.replicate=2"]. `out`: the run directory,
    by default a new one below runs/. `console`: show progress, as the recipe says by default.
    `callbacks`: functions by name, called in this process with plain data: `on_step` and
    `on_evaluation` with a row of metrics.jsonl, `on_save` with the step that was saved; an error in
    one stops the run, and is raised once everything is saved.
    Raises UserError for what is wrong with the recipe, Stopped after Ctrl-C or SIGTERM once
    everything is saved.
    """
    heard = Callbacks(callbacks)
    done = local.train(recipe, overrides, out=out, console=console, callbacks=heard)
    return Result(**vars(done))


def resume(
    run: str | Path,
    overrides: Overrides = (),
    *,
    console: bool | None = None,
    callbacks: Listeners | None = None,
) -> Result:
    """Go on with a run from its newest good checkpoint, in the same or any other layout.

    Raises ConfigError for overrides that would make it another run, and what `train` raises.
    """
    heard = Callbacks(callbacks)
    return Result(**vars(local.resume(run, overrides, console=console, callbacks=heard)))


def evaluate(
    model: str | Path, recipe: AnyRecipe, overrides: Overrides = (), *, console: bool = False
) -> dict[str, float]:
    """Scores of a run or a model folder on the validation part of `recipe`.

    Raises the errors of reading the model, the recipe and its data.
    """
    from shoal.launch.score import score

    with Console(out=sys.stderr if console else io.StringIO()) as show:
        return score(Path(model), recipe=recipe, overrides=overrides, console=show)


def records(source: str | Path) -> Iterator[dict[str, Any]]:
    """Records of a source as training reads them: a name of `shoal data list`, a file or a folder.

    What is not in the cache is fetched. Raises DataError, FetchError.
    """
    from shoal.data.sources import read_records

    yield from read_records(str(source))


def generate(
    model: str | Path, prompt: str, *, tokens: int = 60, temperature: float = 0.8, seed: int = 0
) -> str:
    """What a run or a model folder adds to `prompt`: at most `tokens` tokens, to its end token.

    `temperature` 0 takes the likeliest. Raises ModelError for a folder that cannot be read.
    """
    from shoal.serve.generate import continue_prompt

    return continue_prompt(
        Path(model), prompt=prompt, tokens=tokens, temperature=temperature, seed=seed
    )


def merge(
    source: str | Path,
    out: str | Path,
    *,
    memory_limit: str | None = None,
    adapter: bool = False,
) -> Path:
    """Write the newest good checkpoint of a run, or the one named, as one Hugging Face folder.

    `source`: their folder, or a URL of the run's saves in an object store, or of one of them.

    An adapter is folded in; `adapter`: it alone is written, in peft's format. `memory_limit`: most
    tensor bytes in memory at once, such as "2GB". Returns `out`. Raises RunError, CheckpointError,
    UserError.
    """
    merged(str(source), out=Path(out), memory_limit=memory_limit, adapter=adapter)
    return Path(out)


def merged(
    source: str,
    *,
    out: Path,
    memory_limit: str | None,
    adapter: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[int, float | None, str | None]:
    """Merge as `merge`: the step, the difference of logits (None: only hashes compared), and how
    the loss that transformers gives compares with what was logged (None: nothing to compare).
    """
    from shoal.engine.export import merge as write
    from shoal.engine.export import merge_adapter, opened_by_transformers

    try:
        limit = None if memory_limit is None else parse_bytes(memory_limit)
    except ValueError as error:
        raise UserError(f"--memory-limit: {error}") from None
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise RunError(f"{out}: exists and is not empty; choose another --out")
    from shoal.launch.object_store import reader_of

    reader = reader_of(source, say=say)
    step = reader.step
    if adapter:
        merge_adapter(reader, out=out)
        return step, None, None
    difference = write(reader, out=out, limit_bytes=limit)
    return step, difference, None if limit else opened_by_transformers(reader, out=out)
