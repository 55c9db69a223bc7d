"""What a stranger does first: installs the wheel into an empty environment and fine-tunes on files.

    python scripts/stranger.py [FOLDER]     FOLDER (new) is kept; else a temporary one is used

Builds the wheel, installs it with its dependencies and nothing else, and there, with a home of its
own: trains on a list in JSON, a compressed table and a folder of files; stops, resumes with another
learning rate; generates; and opens what was trained with transformers alone, which must have the
loss that was logged and write what `shoal generate` wrote. Exit status 1, with what was printed,
where any of it is not so. Needs uv beside this Python (`make setup` puts it there) and a registry.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = Path(sys.executable).parent / "uv"
TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.max_position_embeddings=64",
    "data.sequence_tokens=32",
    "data.tokenizer.vocabulary_size=300",
    "train.steps=12",
    "train.evaluate_every_steps=6",
    "checkpoint.every_steps=6",
    "task.prompts=[]",
    "train.schedule.warmup_steps=2",
    "parallel.replicate=2",
    "launch.tune=false",
    "precision.compute=float32",
    "data.validation.source=held-out.json",
    "data.packing=false",
]
PROMPT = "the red fox"
# What a user of transformers would write; nothing of shoal is imported.
OPENED = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
given = tokenizer(sys.argv[2], return_tensors="pt")
with torch.no_grad():
    ids = model.generate(**given, max_new_tokens=8, do_sample=False)
    total, targets = 0.0, 0
    for text in json.load(sys.stdin):
        row = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        if row.shape[1] > 1:
            total += model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
            targets += row.shape[1] - 1
print(json.dumps({"loss": total / targets, "text": tokenizer.decode(ids[0], True)}))
"""


class Failed(Exception):
    """Something is not as a stranger would expect."""


class Stranger:
    """Somebody in a folder of their own, with an environment of their own."""

    def __init__(self, home: Path) -> None:
        self.home, self._began = home, time.monotonic()
        kept = ("PATH", "LANG", "TMPDIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
        self._environment = {key: os.environ[key] for key in kept if key in os.environ}
        self._environment |= {"HOME": str(home), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:5.0f} s  {text}", flush=True)

    def run(self, *words: str | Path, given: str = "") -> str:
        """What a command of the environment prints; Failed unless it exits with 0."""
        line = [str(self.home / "env/bin" / words[0]), *map(str, words[1:])]
        done = subprocess.run(
            line, cwd=self.home, env=self._environment, input=given, text=True, capture_output=True
        )
        said = done.stdout + done.stderr
        if done.returncode:
            shown = " ".join(map(str, words))[:200]
            raise Failed(f"{shown}\nexited with {done.returncode}:\n{said[-4000:]}")
        return done.stdout

    def install(self) -> None:
        """The wheel and its dependencies, where pip would find them."""
        uv, env = str(UV), self.home / "env"
        places = subprocess.run(
            [sys.executable, ROOT / "scripts/pip_places.py"], capture_output=True, text=True
        ).stdout
        build = f"{uv} build -q --wheel --out-dir {self.home} {ROOT}"
        make = f"{uv} venv -q --python {sys.executable} {env}"
        add = f"{uv} pip install -q --python {env}/bin/python -c {ROOT}/constraints.txt"
        pin = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
        torch = pin[1] if pin else ""
        wheel = f"{self.home}/shoal-*.whl"
        cpu = (
            f"{add} torch=={torch}+cpu {wheel} || {add} --torch-backend cpu torch=={torch} {wheel}"
        )
        script = f"set -e\n{places}\n{build}\n{make}\n{cpu}\n"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"installing:\n{done.stderr[-4000:]}")


def texts(count: int, *, seed: int) -> list[str]:
    """Made-up sentences, each short enough for one row."""
    draw = random.Random(seed)
    words = ["the", "a", "red", "old", "quick", "fox", "boat", "river", "child", "finds", "hides"]
    return [" ".join(draw.choices(words, k=draw.randint(4, 14))) for _ in range(count)]


HELD_OUT = texts(20, seed=8)


def write_files(home: Path) -> dict[str, Path]:
    """The same texts as a list in JSON, a compressed table, and a folder of two files."""
    whole = texts(200, seed=7)
    (home / "held-out.json").write_text(json.dumps([{"text": text} for text in HELD_OUT]))
    (home / "tales.json").write_text(json.dumps([{"text": text} for text in whole]))
    with gzip.open(home / "tales.csv.gz", "wt", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerows([["id", "text"], *([str(n), text] for n, text in enumerate(whole))])
    folder = home / "tales"
    folder.mkdir()
    halves = {"one.jsonl": whole[:100], "two.jsonl": whole[100:]}
    for name, part in halves.items():
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    (folder / "notes.pdf").write_bytes(b"%PDF-1.4")
    return {"json": home / "tales.json", "csv.gz": home / "tales.csv.gz", "folder": folder}


def losses(run: Path, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def expect(right: bool, text: str) -> None:
    if not right:
        raise Failed(text)


def walk(home: Path) -> None:
    """The whole path. Raises Failed."""
    me = Stranger(home)
    files = write_files(home)
    me.install()
    me.say("the wheel and its dependencies are installed in an empty environment")
    expect(not me.run("shoal", "--version").startswith("0.0"), "shoal --version")

    runs = {}
    for name, path in files.items():
        runs[name] = home / f"run-{name}"
        source = f"data.source={path}"
        out = me.run("shoal", "train", "quickstart", source, *TINY, "--out", runs[name])
        expect("notes.pdf" in out or name != "folder", "a file that is not read is not named")
        first, *_, last = losses(runs[name])
        expect(last < first, f"{name}: the loss went from {first} to {last}")
        me.say(f"trained on {path.name}: loss {first:.4f} to {last:.4f}")
    curves = {tuple(losses(run)) for run in runs.values()}
    expect(len(curves) == 1, f"the same texts, but the curves {curves}")

    run = home / "run-stopped"
    me.run(
        "shoal", "train", "quickstart", f"data.source={files['json']}", *TINY,
        "train.stop_after_steps=6", "--out", run,
    )  # fmt: skip
    out = me.run(
        "shoal", "resume", run, "train.optimizer.learning_rate=3e-3", "train.stop_after_steps=null"
    )
    changed = "changed: train.optimizer.learning_rate 0.0015 -> 0.003"
    expect(changed in out, f"expected the line {changed!r} in:\n{out}")
    whole = losses(runs["json"])
    expect(len(losses(run)) == 12, f"expected 12 steps, got {len(losses(run))}")
    expect(losses(run)[:7] == whole[:7] and losses(run)[8:] != whole[8:], "the curve of the resume")
    me.say("stopped after 6 steps, went on with twice the learning rate")

    written = me.run("shoal", "generate", run, PROMPT, "--tokens", "8", "--temperature", "0")
    me.say(f"generated: {written.strip()!r}")

    opened = me.run("python", "-c", OPENED, run / "model", PROMPT, given=json.dumps(HELD_OUT))
    found, logged = json.loads(opened), losses(run, "evaluation_loss")[-1]
    expect(abs(found["loss"] - logged) < 1e-5, f"transformers {found['loss']}, logged {logged}")
    expect(
        found["text"].strip() in written, f"transformers writes {found['text']!r}, not {written!r}"
    )
    me.say(f"transformers opens it: loss {found['loss']:.6f} (logged {logged:.6f}), the same text")


def main() -> int:
    """Walk the path in a folder and say how it went."""
    if not UV.exists():
        print(f"expected uv at {UV}; run make setup", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="stranger-") as scratch:
        home = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path(scratch)
        if len(sys.argv) > 1:
            home.mkdir(parents=True)
        try:
            walk(home)
        except Failed as failed:
            print(failed, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
