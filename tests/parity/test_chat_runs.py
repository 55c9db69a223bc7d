"""Chat fine-tuning as a run: any layout, the exported folder, and talking to it."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.cli.main import main
from shoal.config.load import load_recipe
from shoal.errors import DataError
from shoal.launch.prepare import prepare_inputs
from tiny import Bench, Run, largest_difference

CHAT = ("task={kind: chat, prompts: ['What is 2 and 3?'], sample_tokens: 4}", "train.steps=12")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty conversations about sums."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("talks") / "messages.jsonl"
    lines = []
    for number in range(80):
        messages = [{"role": "system", "content": "You add numbers."}] if number % 2 else []
        for _ in range(draw.randint(1, 3)):
            a, b = draw.randint(1, 9), draw.randint(1, 9)
            messages.append({"role": "user", "content": f"What is {a} and {b}?"})
            messages.append({"role": "assistant", "content": f"It is {a + b}."})
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(bench: Bench, talks: Path) -> Run:
    return bench.run(*CHAT, f"data.source={talks}")


@pytest.mark.quick(1)
@pytest.mark.parametrize("change", ["data.packing=true", "data.packing=false"])
def test_two_workers_learn_what_one_does(bench: Bench, talks: Path, change: str) -> None:
    one, two = (
        bench.run(*CHAT, f"data.source={talks}", change, layout)
        for layout in ("parallel={replicate: 1}", "parallel={replicate: 1, shard: 2}")
    )
    assert largest_difference(one.losses, two.losses) < 1e-5
    assert one.losses[-1] < one.losses[0]


def test_the_start_says_what_was_found(bench: Bench, talks: Path, run: Run) -> None:
    said: list[str] = []
    recipe = load_recipe(str(bench.recipe), [*CHAT, f"data.source={talks}"])
    prepare_inputs(recipe, say=said.append)
    found = "conversations (messages), by the chat template shoal's plain one, for models without"
    assert f"{found}; loss on answers only" in said


def test_prompts_are_shown_as_a_user_says_them(run: Run) -> None:
    (prompt, _), *_ = next(row["completions"] for row in run.rows if "completions" in row)
    assert prompt == "User: What is 2 and 3?\nAssistant:"


def test_talking_to_it_is_transformers_talking(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy, two turns, then anew: by `apply_chat_template` and `generate` of the folder."""
    folder = run.path / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def answered(messages: list[dict[str, str]]) -> str:
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = model.generate(**given, max_new_tokens=8, do_sample=False)
        made = ids[0, given["input_ids"].shape[1] :]
        return str(tokenizer.decode(made, skip_special_tokens=True)).strip()

    user = {"role": "user", "content": "What is 2 and 3?"}
    first = answered([user])
    second = answered([user, {"role": "assistant", "content": first}, user])
    lines = f"{user['content']}\n{user['content']}\n\n/new\n{user['content']}\n/exit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as left:
        main(["chat", str(run.path), "--temperature", "0", "--tokens", "8"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"


def test_a_model_without_a_template_is_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["chat", str(bench.run("train.steps=2").path)])
    assert left.value.code == 2
    assert "it has no chat template" in capsys.readouterr().err


def test_a_broken_line_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    whole = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text(json.dumps(whole) + "\n" + json.dumps({"messages": whole["messages"][:1]}))
    out = bench.new_path()
    with pytest.raises(DataError, match="line 2: the conversation ends with a message of the user"):
        bench.train(*CHAT, f"data.source={path}", out=out)
    assert not out.exists()
