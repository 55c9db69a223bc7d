"""peft's LoRA under the Hugging Face Trainer, on rows that are ready. Prints JSON per step."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from baseline_trainer import Clock


class Rows(Dataset):
    """Rows of tokens with their targets, which transformers shifts itself."""

    def __init__(self, tokens: np.ndarray, labels: np.ndarray) -> None:
        moved = np.full_like(labels, -100)
        moved[:, 1:] = labels[:, :-1]
        self._rows = [
            {"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(own)}
            for row, own in zip(tokens, moved)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._rows[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="tokens.npy, labels.npy and about.json")
    given = parser.parse_args()
    about = json.loads((given.folder / "about.json").read_text())
    rows = Rows(*(np.load(given.folder / f"{name}.npy") for name in ("tokens", "labels")))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(about["model"], dtype=torch.float32)
    model.config.use_cache = False
    inside = [n for n, m in model.named_modules() if "layers." in n and type(m) is torch.nn.Linear]
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(r=about["rank"], lora_alpha=about["alpha"], target_modules=inside),
    )
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            use_cpu=True,
            max_steps=about["steps"],
            per_device_train_batch_size=about["micro"],
            gradient_accumulation_steps=about["batch"] // about["micro"],
            learning_rate=1e-3,
            weight_decay=0.0,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()


if __name__ == "__main__":
    main()
