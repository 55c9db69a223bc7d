"""Keys of the sync section that rule one another out."""

from __future__ import annotations

import pytest

from shoal.config.contradictions import contradictions
from shoal.config.load import load_recipe

STREAMING = "sync={kind: streaming-diloco, every_steps: 8, "


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([STREAMING + "fragments: 9}"], "sync.fragments: 9 meet one a step"),
        ([STREAMING + "fragments: 4, overlap_steps: 3}"], "the next fragment leaves 2 steps later"),
        ([STREAMING + "codec: {kind: int8, brake: {}}}"], "sync.codec.brake: a fragment is sent"),
        (["launch.link=20Mbit/s", "launch.workers=threads"], "launch.link: threads share their"),
        (
            ["sync.codec={kind: int8, error_feedback: true}", "precision.compute=float16"],
            "sync.codec.error_feedback: what is left out would be added under another loss scale",
        ),
    ],
)
def test_what_cannot_mean_anything_together(overrides: list[str], said: str) -> None:
    (found,) = contradictions(load_recipe("quickstart", overrides))
    assert said in str(found) and found.hint


def test_what_goes_together() -> None:
    assert not list(contradictions(load_recipe("quickstart", [STREAMING + "overlap_steps: 4}"])))
