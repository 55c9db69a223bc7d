"""The picture of a run's task while it trains: drawn at evaluations, as seldom as costs little."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shoal.launch import pictures
from shoal.launch.pictures import Pictures, draw_picture
from shoal.observe.events import write_shown
from shoal.page.shelf import Shelf
from shoal.tasks.image_classification import ImageClassification

KIND = "token-classification"
SHOWN = {"names": ["A", "B"], "confusion": [[5, 1], [0, 4]]}


def wait_for(made: Pictures) -> None:
    assert made._thread is not None
    made.close()


def test_drawn_at_an_evaluation_but_not_at_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drawing of c seconds is followed by 100 c without one."""
    monkeypatch.setattr(pictures, "FIRST_SECONDS", 0.0)
    made, path = Pictures(tmp_path, KIND), tmp_path / "confusion.png"
    write_shown(tmp_path, SHOWN)
    began = time.monotonic()
    made.evaluated()
    wait_for(made)
    first = path.stat()
    with Image.open(path) as image:
        assert image.size == (572, 506)
    assert made._due > began + 100 * 0.01  # no drawing takes less than 10 ms
    made.evaluated()
    wait_for(made)
    assert os.path.samestat(path.stat(), first)
    made._due = time.monotonic()
    made.evaluated()
    wait_for(made)
    assert not os.path.samestat(path.stat(), first)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["confusion.png", "shown.json"]


def test_a_short_run_is_not_disturbed(tmp_path: Path) -> None:
    made = Pictures(tmp_path, KIND)
    write_shown(tmp_path, SHOWN)
    made.evaluated()
    made.close()
    assert made._thread is None and made._due > time.monotonic() + 90


def test_what_cannot_be_drawn_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "FIRST_SECONDS", 0.0)
    (tmp_path / "shown.json").write_text("{")
    made = Pictures(tmp_path, KIND)
    made.evaluated()
    wait_for(made)
    assert made._due == float("inf") and not (tmp_path / "confusion.png").exists()
    with pytest.raises(json.JSONDecodeError):
        draw_picture(tmp_path, KIND)  # at the end it is said why


def test_the_page_never_sees_half_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    run, seen = tmp_path / "run", []
    (run / "config.yaml").write_text("seed: 1\n")
    write_shown(run, {"names": ["A"], "confusion": [[1]], "misread": []})
    draw = ImageClassification.draw

    def slowly(task: Any, shown: Mapping[str, Any], path: Path) -> None:
        path.write_bytes(b"half")
        seen.append(Shelf(tmp_path).state(run)["pictures"])
        draw(task, shown, path)

    monkeypatch.setattr(ImageClassification, "draw", slowly)
    draw_picture(run, "image-classification")
    assert seen == [[]]
    assert [name for name, _ in Shelf(tmp_path).state(run)["pictures"]] == ["confusion.png"]
