"""`import shoal`: the commands as functions, from a script, a thread and a notebook."""

from __future__ import annotations

import inspect
import json
import math
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shoal
from shoal import errors
from shoal.config.load import load_recipe
from tiny import Bench

QUICK = {"train.steps": 4, "train.evaluate_every_steps": 2, "checkpoint.every_steps": 2}


@pytest.fixture(scope="module")
def result(bench: Bench) -> shoal.Result:
    """A run begun from a Recipe, with overrides, in a thread."""
    recipe = load_recipe(str(bench.recipe), ["train.steps=9"])
    found: list[shoal.Result] = []

    def work() -> None:
        found.append(shoal.train(recipe, QUICK, out=bench.new_path(), console=False))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=100)
    assert found, "the thread raised"
    return found[0]


def test_what_is_exported() -> None:
    """Sorted, all there, and every error that a caller could meet."""
    assert shoal.__all__ == sorted(shoal.__all__) == dir(shoal)
    assert all(getattr(shoal, name) is not None for name in shoal.__all__)
    inside = {"PeersLost", "ChannelError"}  # raised and answered between workers
    every = {
        name
        for name, each in vars(errors).items()
        if isinstance(each, type) and issubclass(each, errors.ShoalError)
    }
    assert every - inside == {n for n in shoal.__all__ if n in every} == every - inside
    assert shoal.UserError is errors.UserError
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        shoal.trian  # noqa: B018


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, shoal\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'yaml', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "shoal.train, shoal.generate, shoal.Recipe\n"
        "heavy = {'torch', 'transformers', 'typer', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_hook_of_tests_is_in_a_signature() -> None:
    assert list(inspect.signature(shoal.train).parameters) == [
        *("recipe", "overrides", "out", "console", "callbacks")
    ]
    assert list(inspect.signature(shoal.resume).parameters) == [
        *("run", "overrides", "console", "callbacks")
    ]


def test_overrides_apply_to_a_recipe_and_a_run_starts_in_a_thread(result: shoal.Result) -> None:
    assert (result.summary["steps"], result.summary["of_steps"]) == (4, 4)
    assert (result.run / "summary.json").is_file()


def test_what_a_result_offers(result: shoal.Result) -> None:
    rows = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert result.metrics == rows
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert result.loss == rows[-2]["loss"] == result.summary["final_loss"]
    assert result.checkpoint() == result.run / "checkpoints" / "step-00000004"
    assert repr(result) == f"Result({str(result.run)!r}, step 4 of 4, loss {result.loss:.4f})"
    lost = shoal.Result(result.run, {**result.summary, "final_loss": None})
    assert math.isnan(lost.loss) and "loss nan" in repr(lost)


def test_its_model_is_the_one_that_transformers_reads(result: shoal.Result) -> None:
    folder = str(result.run / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ends = (theirs.config.eos_token_id, theirs.generation_config.eos_token_id)
    assert ends == (tokenizer.eos_token_id,) * 2 == (1, 1), "llama's own default is 2"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            result.model()(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6
        )


def test_generate_gives_what_is_added(result: shoal.Result) -> None:
    """The likeliest continuation is transformers' own."""
    folder = str(result.run / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    prompt = tokenizer("The river", return_tensors="pt")["input_ids"]
    ids = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False
    )
    wanted = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    assert shoal.generate(result.run, "The river", tokens=5, temperature=0) == wanted


def test_evaluate_and_merge(result: shoal.Result, bench: Bench, tmp_path: Path) -> None:
    scores = shoal.evaluate(result.run, bench.recipe, {"train.steps": 4})
    last = result.metrics[-1]
    assert scores["evaluation_loss"] == pytest.approx(last["evaluation_loss"], rel=1e-5)
    merged = shoal.merge(result.checkpoint(), tmp_path / "model")
    weights = (merged / "model.safetensors").read_bytes()
    assert weights == (result.run / "model/model.safetensors").read_bytes()
    with pytest.raises(shoal.RunError, match="exists and is not empty"):
        shoal.merge(result.run, merged)


def test_mistakes_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(shoal.ConfigError, match=r"lr: unknown key\n    did you mean"):
        shoal.train({"lr": 3})
    with pytest.raises(shoal.UserError, match=r"a dict or a shoal\.Recipe; got NoneType"):
        shoal.train(None)  # type: ignore[arg-type]
    with pytest.raises(shoal.ModelError, match="expected a model folder"):
        shoal.generate(tmp_path, "hello")


NOTEBOOK = """
import sys
import nbformat
from nbclient import NotebookClient
cells = [nbformat.v4.new_code_cell(text) for text in sys.argv[2:]]
book = nbformat.v4.new_notebook(cells=cells)
NotebookClient(book, timeout=100, kernel_name="python3").execute()
nbformat.write(book, sys.argv[1])
"""


@pytest.mark.slow  # tests/parity/test_notebook.py runs one with two workers
@pytest.mark.timeout(200)
def test_a_notebook_trains(bench: Bench, tmp_path: Path) -> None:
    """Cells run in an event loop, beside threads of the kernel; progress comes into the cell."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    out = bench.new_path()
    cells = [
        "import shoal\n"
        f"result = shoal.train({str(bench.recipe)!r}, {{'train.steps': 2}}, out={str(out)!r})",
        "result",
        "len(result.metrics), shoal.generate(result.run, 'The river', tokens=3, temperature=0)",
    ]
    book = tmp_path / "book.ipynb"
    words = [sys.executable, "-W", "ignore", "-c", NOTEBOOK, str(book), *cells]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, third = (cell["outputs"] for cell in json.loads(book.read_text())["cells"])
    printed = "".join("".join(each["text"]) for each in first if each.get("name") == "stdout")
    assert "step     2/2" in printed and "\x1b" not in printed
    shown = "".join(second[-1]["data"]["text/plain"])
    assert re.fullmatch(rf"Result\('{out}', step 2 of 2, loss \d+\.\d{{4}}\)", shown)
    assert "".join(third[-1]["data"]["text/plain"]).startswith("(4, ")


def test_records_of_a_source(tmp_path: Path) -> None:
    """As training reads them: a table's columns stay beside the text."""
    (tmp_path / "some.csv").write_text("text,label\nfine,good\nawful,bad\n")
    found = list(shoal.records(tmp_path / "some.csv"))
    assert [(each["text"], each["label"]) for each in found] == [("fine", "good"), ("awful", "bad")]
    with pytest.raises(shoal.DataError, match="there is no file, folder or registry entry"):
        list(shoal.records("no-such-data"))
