"""What a start says before anything is trained: the model, the data, how long, how, on what."""

from __future__ import annotations

from shoal.config.recipe import PretrainedModel, Recipe
from shoal.config.statement import statements
from shoal.data.special import SpecialTokens
from shoal.engine.batches import batches_of
from shoal.engine.decision import Decision
from shoal.engine.job import Inputs
from shoal.errors import ModelError
from shoal.launch.refuse import trained_config
from shoal.legal import facts_from_config
from shoal.observe.console import Console
from shoal.tasks.kinds import kind_of
from shoal.units import format_count


def say_opening(recipe: Recipe, *, inputs: Inputs, decision: Decision, console: Console) -> None:
    """Show the plan and `opening`, and how many steps there are to come.

    Raises DataError when the prepared data was damaged.
    """
    console.phase(f"plan: {decision}")
    console.steps = num_steps(recipe, inputs=inputs)
    for line in opening(recipe, inputs=inputs, decision=decision, steps=console.steps):
        console.line(line)


def opening(recipe: Recipe, *, inputs: Inputs, decision: Decision, steps: int) -> list[str]:
    """Lines for a person: what is trained, on which data, how often it is seen, and on what."""
    train = recipe.train.model_copy(update={"steps": steps, "epochs": None})
    said = statements(recipe.model_copy(update={"train": train}))
    held_out = f"of {inputs.validation_samples:,} validation samples"
    lines = {
        "model": _model(recipe, inputs=inputs),
        "data": _data(recipe, inputs=inputs),
        "end token": _end(recipe, inputs),
        "length": f"{said['length']} = {batches_of(recipe, inputs).length(steps)}",
        "batch": f"{said['global batch']}; micro batch {decision.micro_batch_samples}",
        "learning rate": said["learning rate"],
        "optimizer": said["optimizer"],
        "evaluates": said["evaluates"].replace("validation samples", held_out),
        "saves": said["saves"],
        "runs on": _where(recipe, decision),
    }
    more = ("tokenizer", "exact", "stops early", "ends early")
    lines |= {name: said[name] for name in more if name in said}
    return [f"  {name:<14} {text}" for name, text in lines.items() if text]


def num_steps(recipe: Recipe, *, inputs: Inputs) -> int:
    """Optimizer steps of the whole run; the data is read only where the recipe gives epochs."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return recipe.train.num_steps(steps_per_epoch=batches_of(recipe, inputs).steps_per_epoch)


def _model(recipe: Recipe, *, inputs: Inputs) -> str:
    try:
        config = trained_config(recipe, inputs=inputs)
        count = f"{format_count(facts_from_config(config).parameters)} parameters"
        family = str(config.get("model_type"))
    except ModelError:  # a family without a table: its size is known once it is built
        family, count = str(getattr(recipe.model, "architecture", "model")), "size not known yet"
    begins = "from random weights"
    if isinstance(recipe.model, PretrainedModel):
        begins = f"from the weights of {recipe.model.path}"
    return f"{family}, {count}, {begins}; task {recipe.task.kind}"


def _data(recipe: Recipe, *, inputs: Inputs) -> str:
    names = ", ".join(spec.source for spec in recipe.data.sources)
    known = dict(inputs.counts)
    if known.get("documents") == known.get("samples"):  # where each is one of the other
        known.pop("documents", None)
    counts = [
        f"{known[what]:,} {what}" for what in ("documents", "samples", "tokens") if known.get(what)
    ]
    return f"{names}: {', '.join(counts) or f'{inputs.train_samples:,} samples'} to train on"


def _end(recipe: Recipe, inputs: Inputs) -> str:
    """What closes documents; nothing for tasks that close none."""
    if not kind_of(recipe.task.kind).closes_documents or not inputs.special_tokens:
        return ""
    special = SpecialTokens(**inputs.special_tokens)
    if special.closing is None:
        return "none: no file of the tokenizer names one, so documents are not closed"
    return f"{special.text!r} (id {special.closing}, by {special.said_by}) closes each document"


def _where(recipe: Recipe, decision: Decision) -> str:
    layout = decision.layout
    cut = str(layout) if layout.workers > 1 else "one worker"
    return f"{decision.device}, {decision.compute}; {cut}; policy {recipe.sync.kind}"
