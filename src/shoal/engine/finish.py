"""The end of a run, on the rank that writes: the model, the last events, what the summary needs."""

from __future__ import annotations

from dataclasses import asdict

from shoal.engine.export import is_complete, saves_read, write_model
from shoal.engine.log import RunLog
from shoal.engine.training import Training
from shoal.observe.events import Report


def finish(training: Training, *, files: RunLog, report: Report) -> None:
    """Write RUN/model where the run is done, close `files`, and report what it came to."""
    step, ending = training.progress.step, training.watch.ending
    complete = is_complete(training)
    if complete and training.job.final_model:
        _write_model(training, report=report)
    name = "finished" if complete else "paused" if ending is None else ending.kind
    files.sink.event(name, {"step": step, **({"text": ending.text} if ending else {})})
    files.close()
    report.say("phase", text="scoring the baseline")
    report.say(
        "done",
        step=step,
        steps=training.steps,
        tokens=training.progress.tokens,
        seconds=training.progress.seconds,
        parameters=training.replica.num_parameters,
        peak_memory_bytes=training.peak_memory_bytes,
        task=training.task.kind,
        baseline=training.task.baseline(training.evaluation),
        ending=None if ending is None else asdict(ending),
        best_step=training.watch.best,
    )


def _write_model(training: Training, *, report: Report) -> None:
    """From the end of the run, or from its best save, as the recipe says and the disk has it."""
    step, out, best = training.progress.step, training.job.run / "model", training.watch.best
    if training.store.divided and saves_read(training):
        report.say("phase", text="waiting for what the other hosts have saved")
        training.store.wait_for(step)  # with the last one the best one is there too
    if training.job.recipe.checkpoint.model == "best" and best in training.store.steps():
        step = best
    report.say("phase", text=f"writing the model of step {step} to {out}")
    write_model(training, step=step, out=out)
