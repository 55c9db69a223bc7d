"""A run's recipe names its files from the root, so that it can be resumed from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config.anchor import anchored
from shoal.config.load import load_recipe


def test_paths_become_absolute_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("text", encoding="utf-8")
    (tmp_path / "bert").mkdir()
    monkeypatch.chdir(tmp_path)
    mixture = "data.source=[{source: mine.txt, weight: 2}, {source: chitchat}]"
    found = anchored(
        load_recipe(
            "ner", [mixture, "model.path=bert", "data.tokenizer={kind: folder, path: bert}"]
        )
    )
    assert [each.source for each in found.data.sources] == [str(tmp_path / "mine.txt"), "chitchat"]
    assert found.data.sources[0].weight == 2
    assert found.data.tokenizer.path == str(tmp_path / "bert")
    assert found.model.path == str(tmp_path / "bert")  # type: ignore[union-attr]
    assert anchored(load_recipe("quickstart")) == load_recipe("quickstart")
