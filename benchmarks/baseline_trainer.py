"""The Hugging Face Trainer on the quickstart's model. Run under torchrun; prints JSON per step."""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Rows(Dataset):
    """Token rows as samples."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


class Clock(TrainerCallback):
    """Prints the duration of each optimizer step on rank 0."""

    def on_step_begin(self, args, state, control, **_):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if args.process_index == 0:
            seconds = time.perf_counter() - self._began
            print(json.dumps({"step": state.global_step, "seconds": seconds}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--micro", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    given = parser.parse_args()
    steps = np.load(given.tokens)
    rows = torch.from_numpy(steps.reshape(-1, steps.shape[-1]))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**json.loads(given.config), use_cache=False))
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            use_cpu=True,
            max_steps=len(steps),
            per_device_train_batch_size=given.micro,
            gradient_accumulation_steps=steps.shape[1] // (given.micro * given.workers),
            learning_rate=3e-3,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=Rows(rows), callbacks=[Clock()]).train()


if __name__ == "__main__":
    main()
