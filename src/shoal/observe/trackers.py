"""TensorBoard and Weights & Biases, when a recipe asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.observe.events import Row, Sink


def _scalars(row: Row) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoard(Sink):
    """Scalars into RUN/tensorboard. Raises UserError when the package is not there."""

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "observe.tensorboard: the package is not installed; "
                "pip install 'shoal[tensorboard]', or set observe.tensorboard=false"
            ) from None
        self._writer = SummaryWriter(str(run / "tensorboard"))

    def row(self, row: Row) -> None:
        for key, value in _scalars(row).items():
            self._writer.add_scalar(key, value, row["step"])
        for index, (prompt, completion) in enumerate(row.get("completions") or []):
            self._writer.add_text(f"sample/{index}", prompt + completion, row["step"])

    def close(self) -> None:
        self._writer.close()


class WandB(Sink):
    """Scalars to Weights & Biases; WANDB_MODE=offline keeps them in RUN/wandb.

    Raises UserError when the package is not there.
    """

    def __init__(self, run: Path, *, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "observe.wandb: the package is not installed; pip install 'shoal[wandb]', "
                "or set observe.wandb=false"
            ) from None
        self._run = wandb.init(project="shoal", name=run.name, dir=str(run), config=config)

    def row(self, row: Row) -> None:
        self._run.log(_scalars(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()
