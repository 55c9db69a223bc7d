"""The end of a run says what to type next, for this recipe and its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config.load import load_recipe, to_yaml
from shoal.launch.summary import last_words


def said(run: Path, *overrides: str, name: str) -> list[str]:
    """The lines after `next:` of a run of a shipped recipe that was never scored."""
    recipe = load_recipe(name, overrides)
    (run / "config.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    summary = {
        "task": recipe.task.kind,
        "evaluation": None,
        "baseline": {},
        "measured": {},
        "ending": None,
    }
    summary |= {"tokens_per_second": 7.0, "steps": 3, "of_steps": 3, "layout": {"replicate": 2}}
    lines = last_words(run, summary, recipe=name)
    return [line.strip() for line in lines[lines.index("next:") + 1 :]]


@pytest.mark.parametrize(
    ("name", "own"), [("quickstart", "YOUR.txt"), ("ner", "YOUR.conll"), ("digits", "YOUR-FOLDER")]
)
def test_what_to_type_next(tmp_path: Path, name: str, own: str) -> None:
    lines = said(tmp_path, name=name)
    assert lines[1] == f"shoal parity {name} parallel.replicate=2"
    assert lines[2].startswith(f"shoal train {name} data.source={own}")


def test_a_run_on_own_data_is_not_told_to_use_own_data(tmp_path: Path) -> None:
    lines = said(tmp_path, "data.source=mine.txt", name="quickstart")
    assert len(lines) == 2
    assert lines[0] == f"shoal generate {tmp_path}/model 'A: Hello, how are you?'"
    asked = said(tmp_path, 'task.prompts=["Once upon"]', name="quickstart")
    assert asked[0].endswith("'Once upon'")
