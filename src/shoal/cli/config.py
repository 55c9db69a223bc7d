"""shoal config: show what a recipe really means; print the schema of recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.train import Overrides

app = typer.Typer(help="Show what a recipe means, and the schema of recipes.", no_args_is_help=True)


@app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    overrides: Overrides = None,
) -> None:
    """The recipe as resolved, and its effective statement."""
    from shoal.config.load import load_recipe, to_yaml
    from shoal.config.statement import statement

    resolved = load_recipe(recipe, overrides or [])
    print(to_yaml(resolved))
    print("\n".join(f"# {line}" for line in statement(resolved)))


@app.command("schema")
def schema() -> None:
    """The JSON schema of recipes, for editors."""
    import json

    from shoal.config.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=1))


@app.command("list")
def names() -> None:
    """The shipped recipes."""
    from shoal.config.load import shipped_recipes

    print("\n".join(shipped_recipes()))
