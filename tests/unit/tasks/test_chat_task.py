"""Chat: targets are those of transformers, by templates that mark answers and by those that do not.

The oracle is TRL's pairs of templates: each as its model has it, and the same with the answers
marked, which transformers' own `apply_chat_template` turns into a mask.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shoal.data.conversations import chat_template_of, conversation_of, special_texts
from shoal.data.tokenize import load_tokenizer, train_tokenizer
from shoal.errors import DataError
from shoal.fields import IGNORED
from shoal.tasks.chat import Chat
from shoal.tasks.task import Tools
from shoal.tasks.templates import PLAIN, Template
from tiny import tales

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = ["cohere2", "gemma3", "llama3", "phi3", "qwen2_5_vl", "qwen3", "qwen3_instruct_2507"]
SPECIAL = re.compile(r"<\|[^|>\s]{1,40}\|>|<\w+_of_turn>|</?think>")


def conversations(count: int, *, seed: int, turns: int = 3) -> list[list[dict[str, str]]]:
    """Random ones; texts that begin or end with space, and some with a system prompt."""
    draw = random.Random(seed)
    words = ["hi", "the", "sum", "is", "four\n\n", "ünï", "你好", "ok.", "yes!", "{x}", "<b>"]

    def said(role: str) -> dict[str, str]:
        text = " ".join(draw.choices(words, k=draw.randint(1, 8)))
        return {"role": role, "content": draw.choice(["", " "]) + text + draw.choice(["", "\n"])}

    found = []
    for _ in range(count):
        talk = [said("system")] if draw.random() < 0.4 else []
        for _ in range(draw.randint(1, turns)):
            talk += [said("user"), said("assistant")]
        found.append(talk)
    return found


@pytest.fixture(scope="module")
def folder() -> Path:
    return train_tokenizer([tales(seed=0, documents=50)], vocabulary_size=320, cache_key="chat")


def record(messages: Any, **more: Any) -> dict[str, Any]:
    found = conversation_of({"messages": messages, **more}, where="x.jsonl: line 3")
    assert found is not None
    return found


def encoded(
    talks: list[Any], tools: Tools, *, train_on: str = "answers"
) -> list[tuple[list[int], list[bool]]]:
    """(ids, which of them are targets) of each conversation."""
    task = Chat(options={"train_on": train_on})
    records = [record(each) for each in talks]
    task.learn(records, tools=tools)
    return [
        (each["input_ids"], [False, *(label != IGNORED for label in each["labels"][:-1])])
        for each in task.encode(records, tools=tools)
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("marked", [False, True], ids=["as it is", "marked"])
def test_targets_are_those_of_transformers(folder: Path, name: str, marked: bool) -> None:
    plain = (TEMPLATES / f"{name}.jinja").read_text()
    training = (TEMPLATES / f"{name}_training.jinja").read_text()
    theirs = AutoTokenizer.from_pretrained(folder)
    special = sorted(set(SPECIAL.findall(plain)))
    theirs.add_special_tokens({"additional_special_tokens": special, "bos_token": "<|begin|>"})
    ours = theirs.backend_tokenizer
    texts = {"eos_token": theirs.eos_token, "bos_token": theirs.bos_token}
    tools = Tools(ours, None, (training if marked else plain, "x"), texts)
    # of several turns qwen3 strips thoughts, and TRL's copy for training does not
    talks = conversations(50, seed=1, turns=1 if name == "qwen3" else 3)
    if name == "qwen3" and marked:
        talks += conversations(20, seed=2)
    compared = 0
    for talk, (ids, targets) in zip(talks, encoded(talks, tools), strict=True):
        wanted = theirs.apply_chat_template(
            talk, chat_template=training, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == wanted["input_ids"]
        assert targets == [bool(each) for each in wanted["assistant_masks"]]
        compared += sum(targets)
    assert compared > 500


def test_thoughts_that_a_template_strips_are_no_targets(folder: Path) -> None:
    """qwen3 keeps the thoughts of the last answer only: what is learned is what is written."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tools = Tools(tokenizer, None, ((TEMPLATES / "qwen3.jinja").read_text(), "x"), {})
    answer = "<think>\nhm\n</think>\n\nyes"
    talk = [{"role": "user", "content": "so?"}, {"role": "assistant", "content": answer}] * 2
    (ids, targets), *_ = encoded([talk], tools)
    learned = tokenizer.decode([n for n, is_target in zip(ids, targets) if is_target], False)
    assert learned == "yes<|im_end|>\n<think>\nhm\n</think>\n\nyes<|im_end|>\n"


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        ("answers", " two<|end|> four<|end|>"),
        ("last", " four<|end|>"),
        ("all", "hm\nUser: one\nAssistant: two<|end|>\nUser: three\nAssistant: four<|end|>"),
    ],
)
def test_what_is_learned(folder: Path, train_on: str, wanted: str) -> None:
    talk = [
        {"role": "system", "content": "hm"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    tokenizer = load_tokenizer(folder)
    tools = Tools(tokenizer, 1, chat_template_of(folder), special_texts(folder))
    (ids, targets), *_ = encoded([talk], tools, train_on=train_on)
    chosen = [n for n, is_target in zip(ids, targets) if is_target]
    # nothing stands before the first token, so it is never predicted
    assert tokenizer.decode(chosen, False) == (wanted[1:] if train_on == "all" else wanted)


def test_a_prompt_ends_where_an_answer_begins(folder: Path) -> None:
    """In tokens too: no piece reaches over the border, which a model would never see."""
    tokenizer = load_tokenizer(folder)
    template = Template(PLAIN, tokens={"eos_token": "<|end|>"})
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    shown = tokenizer.encode(template.render(talk[:1], prompt=True)).ids
    (ids, targets), *_ = encoded([talk], Tools(tokenizer, 1, None, {"eos_token": "<|end|>"}))
    assert ids[: len(shown)] == shown and targets.index(True) == len(shown)


def test_plain_text_is_learned_whole(folder: Path) -> None:
    tokenizer, task = load_tokenizer(folder), Chat()
    tools = Tools(tokenizer, 1, None, special_texts(folder))
    task.learn([{"text": "The clever fox"}], tools=tools)
    assert "plain text" in task.notes[0]
    (sample,) = task.encode([{"text": "The clever fox"}], tools=tools)
    assert sample["labels"] == [*sample["input_ids"][1:], IGNORED]
    assert sample["input_ids"][-1] == 1


def test_a_template_that_refuses_is_told_with_the_line(folder: Path) -> None:
    text = "{{ raise_exception('only user and assistant roles are supported') }}"
    tools = Tools(load_tokenizer(folder), 1, (text, "chat_template.jinja"), {})
    with pytest.raises(DataError, match=r"x.jsonl: line 3: .*refuses it: only user and assistant"):
        encoded([[{"role": "assistant", "content": "hi"}]], tools)
    broken = Tools(load_tokenizer(folder), 1, ("{{ messages[0]['nothing'] + 1 }}", "x"), {})
    with pytest.raises(DataError, match=r"x.jsonl: line 3: the chat template"):
        encoded([[{"role": "assistant", "content": "hi"}]], broken)


def test_a_template_cannot_leave_its_sandbox(folder: Path) -> None:
    text = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tools = Tools(load_tokenizer(folder), 1, (text, "x"), {})
    with pytest.raises(DataError, match=r"x.jsonl: line 3: the chat template"):
        encoded([[{"role": "assistant", "content": "hi"}]], tools)


def test_labels_as_a_user_of_transformers_gives_them() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8]]),
        "labels": torch.tensor([[IGNORED, 7, 8, IGNORED]]),
        "document_ids": torch.tensor([[0, 0, 0, 0]]),
    }
    assert Chat().user_call(batch)["labels"].tolist() == [[IGNORED, IGNORED, 7, 8]]


# --- the shapes of conversations


ASKED = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


@pytest.mark.parametrize(
    ("row", "shape", "messages"),
    [
        ({"messages": ASKED}, "messages", ASKED),
        ({"messages": json.dumps(ASKED)}, "messages", ASKED),
        (
            {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
            "conversations",
            ASKED,
        ),
        ({"prompt": "one", "completion": "two"}, "prompt, completion", ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, "prompt, completion", ASKED),
        (
            {"instruction": "one", "input": "", "output": "two"},
            "instruction, input, output",
            ASKED,
        ),
        (
            {"instruction": "add", "input": "1 and 1", "output": "2", "system": "be brief"},
            "instruction, input, output",
            [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "add\n\n1 and 1"},
                {"role": "assistant", "content": "2"},
            ],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "one"}]},
                    ASKED[1],
                ]
            },
            "messages",
            ASKED,
        ),
    ],
)
def test_shapes_are_known_by_their_columns(row: Any, shape: str, messages: Any) -> None:
    found = conversation_of(row, where="here")
    assert found is not None
    assert (found["shape"], found["messages"]) == (shape, messages)


def test_tools_and_their_calls_are_kept(folder: Path) -> None:
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    talk = [
        ASKED[0],
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "3", "name": "add"},
        ASKED[1],
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    kept = record(talk, tools=json.dumps(tools))
    assert kept["messages"][1] == {"role": "assistant", "tool_calls": call}
    assert kept["messages"][2]["name"] == "add" and kept["tools"] == tools
    text, spans = Template((TEMPLATES / "qwen3.jinja").read_text(), tokens={}).answers(
        kept["messages"], tools=kept["tools"]
    )
    assert '"name": "add"' in text[: spans[0][0]], "what tools there are"
    assert "<tool_call>" in text[slice(*spans[0])] and "two" in text[slice(*spans[1])]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": "hello"}, "expected a list of messages in 'messages'"),
        ({"messages": []}, "expected a list of messages in 'messages'"),
        ({"messages": ["hello"]}, "message 1: expected an object with a role"),
        (
            {"messages": [{"role": "usre", "content": "x"}]},
            "its role is 'usre'; did you mean 'user'",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "expected text as the content of user"),
        ({"messages": [{"role": "user"}]}, "expected text as the content of user, got nothing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "expected parts of type text only",
        ),
        ({"messages": ASKED[:1]}, "ends with a message of the user, expected an answer"),
        ({"messages": ASKED, "tools": "{"}, "`tools` is no JSON"),
        ({"instruction": None, "output": "x"}, "expected text in 'instruction', got NoneType"),
    ],
)
def test_broken_conversations_are_named(row: Any, problem: str) -> None:
    with pytest.raises(DataError, match=re.escape("x: line 2: ")) as raised:
        conversation_of(row, where="x: line 2")
    assert problem in str(raised.value)


def test_templates_of_a_folder(tmp_path: Path, folder: Path) -> None:
    assert chat_template_of(folder) is None
    config = {"chat_template": "in the config", "eos_token": {"content": "</s>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat_template_of(tmp_path) == ("in the config", "tokenizer_config.json")
    assert special_texts(tmp_path) == {"eos_token": "</s>"}
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert chat_template_of(tmp_path) == ("d", "tokenizer_config.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": ["damaged"]}))
    assert chat_template_of(tmp_path) is None
    made = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(folder))
    made.chat_template = "as transformers saves it"
    made.save_pretrained(tmp_path / "saved")
    assert chat_template_of(tmp_path / "saved") == (
        "as transformers saves it",
        "chat_template.jinja",
    )
