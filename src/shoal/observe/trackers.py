"""TensorBoard and Weights & Biases, when a recipe asks for them; tags are grouped as is usual.

Whether they can be written to is checked before workers start (launch/refuse.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from shoal.config.recipe import WandB as Settings
from shoal.errors import UserError
from shoal.observe.events import Row, Sink

_PERFORMANCE = ("_seconds", "_bytes", "_per_second", "mfu", "seconds")
_COMPARED = ("train/loss", "eval/loss")
"""What runs are compared by beside their hyperparameters."""
_ID = "wandb-id"
"""File of a run directory with the id that W&B knows the run by."""
_IDS = re.compile(r"[A-Za-z0-9_-]{1,64}")


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


def hyperparameters(config: dict[str, Any], *, under: str = "") -> dict[str, str | float | bool]:
    """Dotted key -> value of every key of a recipe, as trackers compare runs by."""
    found: dict[str, str | float | bool] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= hyperparameters(value, under=f"{under}{key}.")
        else:
            plain = isinstance(value, str | int | float)
            found[f"{under}{key}"] = value if plain else json.dumps(value)
    return found


class TensorBoard(Sink):
    """Scalars, samples, hyperparameters and the config into RUN/tensorboard."""

    def __init__(self, run: Path, *, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(run / "tensorboard"))
        # the values of the metrics are those of the scalars of the same name
        file = self._writer.file_writer
        assert file is not None, "open until `close`"
        for each in hparams(hyperparameters(config), dict.fromkeys(_COMPARED, 0.0)):
            file.add_summary(each)
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

    def __init__(
        self, run: Path, *, config: dict[str, Any], settings: Settings | bool = True
    ) -> None:
        import wandb

        chosen = settings if isinstance(settings, Settings) else Settings()
        kept = run / _ID
        known = kept.read_text(encoding="utf-8", errors="replace") if kept.is_file() else ""
        known = known.strip() if _IDS.fullmatch(known.strip()) else ""  # damaged: a new one
        try:
            self._run = wandb.init(
                project=chosen.project,
                entity=chosen.entity,
                name=chosen.name or run.name,
                group=chosen.group,
                tags=chosen.tags,
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
