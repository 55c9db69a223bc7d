"""What takes long gives signs of life, or it would be taken for stuck."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from one_rank import built
from passing_on import newest
from shoal.data.tokenize import load_tokenizer
from shoal.engine.decision import Decision, given_layout
from shoal.engine.evaluate import complete
from shoal.engine.job import Inputs, Job
from shoal.launch.hang import LONG
from shoal.launch.local import resumed_recipe
from shoal.launch.pool import WorkerPool
from shoal.observe.events import Report
from tiny import Bench
from workers import run_workers


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of the worker."""
    marks: list[str] = []
    with built(payload, descriptor) as training:
        training.ranks.world.pulse.on_mark = lambda phase, step: marks.append(phase)
        folder = training.job.inputs.tokenizer_directory
        assert folder is not None
        tokenizer = load_tokenizer(folder)
        ((_, said),) = complete(training, prompts=["A:"], tokens=7, tokenizer=tokenizer)
    Report(descriptor).say("compared", found={"marks": marks, "said": said})
    return 0


def test_each_token_of_a_completion_is_one(bench: Bench, pool: WorkerPool, tmp_path: Path) -> None:
    """Evaluations of a small part of the data are short, and completions after them may not be."""
    trained = bench.run()
    recipe = resumed_recipe(trained.path, [])
    inputs = Inputs.from_json(newest(trained).state["inputs"])
    decision = Decision(given_layout(recipe), "processes", 1, 2, "float32", "a test")
    payload = {**Job(recipe, trained.path, inputs, decision).to_json(), "out": str(tmp_path)}
    (found,) = run_workers(pool, "fault.test_signs_of_life:run", payload, size=1)
    assert found["said"]
    assert found["marks"].count("complete") == 7
    assert "complete" in LONG, "the first token may take a while"
