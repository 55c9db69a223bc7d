"""TensorBoard and Weights & Biases, when a recipe asks for them; tags are grouped as is usual.

Whether they can be written to is checked before workers start (launch/refuse.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.observe.events import Row, Sink

_PERFORMANCE = ("_seconds", "_bytes", "_per_second", "mfu", "seconds")
_ID = "wandb-id"
"""File of a run directory with the id that W&B knows the run by."""


def scalars(row: Row) -> dict[str, float]:
    """Numbers of a row under the tags of the field: `train/loss`, `eval/loss`, `perf/mfu`."""
    group = "eval" if "evaluation_loss" in row else "train"
    found = {}
    for key, value in row.items():
        if key == "step" or not isinstance(value, int | float) or isinstance(value, bool):
            continue
        name = key.removeprefix("evaluation_")
        where = "perf" if group == "train" and name.endswith(_PERFORMANCE) else group
        found[f"{where}/{name}"] = float(value)
    return found


class TensorBoard(Sink):
    """Scalars, samples and the config into RUN/tensorboard."""

    def __init__(self, run: Path, *, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))
        text = json.dumps(config, indent=1)
        self._writer.add_text("config", "    " + text.replace("\n", "\n    "))  # as Markdown's code

    def row(self, row: Row) -> None:
        for key, value in scalars(row).items():
            self._writer.add_scalar(key, value, row["step"])
        for index, (prompt, completion) in enumerate(row.get("completions") or []):
            text = f"**{prompt}**{completion}"
            self._writer.add_text(f"samples/{index}", text, row["step"])

    def close(self) -> None:
        self._writer.close()


class WandB(Sink):
    """Scalars and the config to Weights & Biases; WANDB_MODE=offline keeps them in RUN/wandb.

    A resumed run goes on under its id. Raises UserError where W&B refuses.
    """

    def __init__(self, run: Path, *, config: dict[str, Any]) -> None:
        import wandb

        kept = run / _ID
        known = kept.read_text(encoding="utf-8").strip() if kept.is_file() else ""
        try:
            self._run = wandb.init(
                project="shoal",
                name=run.name,
                dir=str(run),
                config=config,
                id=known or None,
                resume="allow",
                settings=wandb.Settings(silent=True),  # its own lines would cross the live line
            )
        except wandb.errors.Error as error:
            raise UserError(f"observe.wandb: {error}") from None
        kept.write_text(self._run.id + "\n", encoding="utf-8")
        self.address: str | None = self._run.url
        """Where the run can be seen; None when it is kept offline."""

    def row(self, row: Row) -> None:
        self._run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()
