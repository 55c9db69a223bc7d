"""shoal config: show what a recipe really means; print the schema of recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.terminal import say
from shoal.cli.train import Overrides

app = typer.Typer(
    help="Show what a recipe means, which keys it may have, and which recipes are shipped.",
    no_args_is_help=True,
)


@app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    overrides: Overrides = None,
) -> None:
    """Print every key of a recipe with its value, and what the run will do in words."""
    from shoal.config.load import load_recipe, to_yaml
    from shoal.config.statement import statement

    resolved = load_recipe(recipe, overrides or [])
    say(to_yaml(resolved), verbatim=True)
    say("\n".join(f"# {line}" for line in statement(resolved)))


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes: every key, its type and default; editors read it."""
    import json

    from shoal.config.recipe import Recipe

    say(json.dumps(Recipe.model_json_schema(), indent=1), verbatim=True)


@app.command("list")
def names() -> None:
    """List the shipped recipes."""
    from shoal.config.load import shipped_recipes

    say("\n".join(shipped_recipes()), verbatim=True)
