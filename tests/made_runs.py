"""Run directories written by hand, as a run writes them: rows, events, plan, summary."""

from __future__ import annotations

import json
import math
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class MadeRun:
    """A run in `folder` that a test writes, row by row."""

    def __init__(self, folder: Path, *, layout: dict[str, int] | None = None) -> None:
        folder.mkdir(parents=True)
        self.path = folder
        (folder / "config.yaml").write_text(
            "seed: 5\ntask: {kind: causal-lm}\nsync: {kind: every-step}\ntrain: {steps: 200}\n"
        )
        plan = {
            "layout": {
                **dict.fromkeys(("replicate", "pipeline", "shard", "context", "tensor"), 1),
                **(layout or {"replicate": 2}),
            },
            "workers": "processes",
            "reason": "0.1 s a step",
            "predicted": {"step_seconds": 0.1, "peak_memory_bytes": 5e6},
        }
        (folder / "plan.json").write_text(json.dumps(plan))

    def lock(self) -> None:
        """As if this process trained it."""
        (self.path / ".lock").write_text(f"{os.getpid()}\n")

    def rows(self, start: int, stop: int, *, scale: float = 1.0) -> None:
        """Rows of the steps `start` to `stop` - 1, in one write."""
        self._append("metrics.jsonl", [self.row(step, scale=scale) for step in range(start, stop)])

    @staticmethod
    def row(step: int, *, scale: float = 1.0) -> dict[str, Any]:
        """A row with the keys that a real one has."""
        return {
            "step": step,
            "loss": scale * (2.0 + 8.0 / (1 + 0.05 * step) + 0.1 * math.sin(step)),
            "learning_rate": 1e-3,
            "gradient_norm": 1.0 + 0.01 * step,
            "tokens": 512 * step,
            "samples": 16 * step,
            "step_seconds": 0.1 + 0.01 * math.cos(step),
            "compute_seconds": 0.08,
            "communication_seconds": 0.015,
            "waiting_seconds": 0.005,
            "tokens_per_second": 5120.0,
            "sent_bytes": 123456,
            "sent_bytes_by_link": {"replica 1": 123456},
            "peak_memory_bytes": 4_000_000,
            "peak_private_bytes": None,
            "mfu": None,
        }

    def evaluation(self, step: int, *, text: str = "a text") -> None:
        """An evaluation with a completion."""
        row = {"step": step, "evaluation_loss": 3.0 + 8.0 / (1 + 0.05 * step), "seconds": 0.2}
        self._append("metrics.jsonl", [{**row, "completions": [["A prompt", text]]}])

    def event(self, name: str, **fields: Any) -> None:
        """Something that happens now."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._append("events.jsonl", [{"event": name, "happened_at": at, **fields}])

    def workers(self, *states: str) -> None:
        """What the supervisor sees of each rank now."""
        found = [
            {"rank": rank, "state": state, "waits_for": [], "phase": "forward", "step": 7}
            for rank, state in enumerate(states)
        ]
        beside = self.path / ".workers.json.1"
        beside.write_text(json.dumps({"written_at": time.time(), "workers": found}))
        os.replace(beside, self.path / "workers.json")

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
