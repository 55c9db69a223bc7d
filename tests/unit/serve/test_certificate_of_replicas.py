"""The certificate with what needs processes: two replicas, and replicas killed by turns."""

from __future__ import annotations

from pathlib import Path

import pytest
from served import NAME, write_model

from shoal.config.serve import serve_settings
from shoal.launch.certifying import certify_folder
from shoal.serve.int8 import cannot_multiply


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("weights", ["full", "int8"])
def test_no_answer_changes_with_replicas_and_kills(tmp_path: Path, weights: str) -> None:
    if weights == "int8" and (why := cannot_multiply()) is not None:
        pytest.skip(why)
    folder = write_model(tmp_path / NAME)
    said: list[str] = []
    settings = serve_settings(["threads=1", f"weights={weights}"])
    found = certify_folder(folder, settings=settings, num_requests=8, say=said.append)
    assert found.proven, str(found)
    *_, two, killed = found.found
    assert two.condition == "two replicas" and two.kills == 0
    assert killed.condition == "two replicas, killed by turns" and killed.kills > 0
    assert f"{killed.kills} kills" in str(found) and "together" in said
