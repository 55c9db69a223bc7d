"""README and docs: current, equal in both languages, no broken link, and every command runs."""

from __future__ import annotations

import ast
import importlib.util
import io
import itertools
import json
import re
import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from shoal.cli.main import main
from shoal.launch import pool as pools
from shoal.launch.pool import WorkerPool
from tiny import Bench

ROOT = Path(__file__).resolve().parents[2]
README, CHINESE = (ROOT / name for name in ("README.md", "README.zh.md"))
START = ROOT / "docs" / "start"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], key=lambda path: path.as_posix()
)
LONGEST_README = 140
TRANSLATED = [README, *sorted(START.glob("*.md"))]

SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "data.sequence_tokens=32",
    "data.evaluation_samples=8",
    "data.tokenizer.vocabulary_size=300",
    "train.global_batch_samples=8",
    "train.schedule.warmup_steps=1",
    "task.sample_tokens=2",
    "launch.tune=false",
    "observe.console=false",
]
"""The quickstart, small enough to run in a test."""

TAGGING = [
    "model={kind: config, architecture: bert, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}",
    "data.sequence_tokens=32",
    "data.tokenizer.vocabulary_size=300",
    "train.epochs=1",
    "train.global_batch_samples=8",
    "train.schedule.warmup_steps=1",
    "launch.tune=false",
    "observe.console=false",
]
SEARCH = ["train.steps=2", "checkpoint.every_steps=2"]
FINETUNING = ["train.steps=2", "train.schedule.warmup_steps=1", "observe.console=false"]
IMAGES = [
    *("model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=1"),
    *("train.steps=2", "train.global_batch_samples=4", "train.schedule.warmup_steps=1"),
    "launch.tune=false",
    "observe.console=false",
]


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands(path: Path) -> list[str]:
    """Lines of the shell blocks, without their comments."""
    lines = [
        line.partition("  #")[0].strip()
        for block in blocks(path, "sh")
        for line in block.splitlines()
    ]
    return [line for line in lines if line]


def chinese(path: Path) -> Path:
    """The Chinese page of an English one."""
    return CHINESE if path == README else ROOT / "docs" / "zh" / path.relative_to(ROOT / "docs")


def script(name: str) -> ModuleType:
    """A script of scripts/, as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_map_and_task_table_are_current() -> None:
    for path, text in script("readme").pages().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path} is not current: run python scripts/readme.py"
        )


def test_recipe_reference_is_current() -> None:
    text = (ROOT / "docs" / "guide" / "recipe.md").read_text(encoding="utf-8")
    assert text == script("recipe_reference").page(), "run python scripts/recipe_reference.py"


def test_signatures_in_the_design_are_current() -> None:
    text = (ROOT / "docs" / "design" / "seams.md").read_text(encoding="utf-8")
    assert text == script("seams").page(), "run python scripts/seams.py"


@pytest.mark.parametrize("path", [README, CHINESE], ids=["english", "chinese"])
def test_readme_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_README


@pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: path.stem)
def test_both_languages_give_the_same_commands(path: Path) -> None:
    assert commands(path) == commands(chinese(path))
    for language in ("python", "yaml", "text"):
        assert blocks(path, language) == blocks(chinese(path), language)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
    return {head.strip().replace(" ", "-") for head in plain}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), f"{path.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(page), f"{path.name}: {page.name} has no heading #{anchor}"


def test_pages_named_in_prose_are_here() -> None:
    """Also paths that are no links, of pages and of files of ours."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(
            r"\b(?:docs|tests|scripts|benchmarks)/[\w/.-]+\.(?:md|py|json)", text
        ):
            assert (ROOT / name).is_file(), f"{path.name} names {name}, which is not there"
        if path.name in ("figures.md", "decisions.md"):  # what was true then
            continue
        for name in re.findall(r"`([a-z_]+/[a-z_0-9/]+\.py)`", text):
            known = [ROOT / name, ROOT / "src" / "shoal" / name]
            made = "starcoder2" in name  # what docs/contribute/new-family.md lets a reader write
            assert made or any(map(Path.is_file, known)), (
                f"{path.name} names {name}, which is not there"
            )


def test_every_folder_of_the_sources_is_in_the_readme() -> None:
    rooms = {p.name for p in (ROOT / "src" / "shoal").iterdir() if any(p.glob("*.py"))}
    for path in (README, CHINESE):
        text = path.read_text(encoding="utf-8")
        assert {room for room in rooms if f"`{room}/`" not in text} == set()


def test_every_folder_of_the_tests_is_described() -> None:
    text = (ROOT / "docs" / "contribute" / "tests.md").read_text(encoding="utf-8")
    for folder in (ROOT / "tests").iterdir():
        if any(folder.glob("**/test_*.py")):
            assert f"`tests/{folder.name}`" in text, folder.name


# --- messages that the pages quote


def message_templates() -> list[str]:
    """Every piece of text in the sources, what is filled in as a zero byte."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted_messages(path: Path) -> list[str]:
    """The first cells of the page's tables."""
    return re.findall(r"^\| `(.*?)` \|", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_quoted_messages_are_those_of_the_sources() -> None:
    page = START / "when-something-fails.md"
    quoted, templates = quoted_messages(page), message_templates()
    assert len(quoted) >= 30 and quoted == quoted_messages(chinese(page))
    for message in quoted:
        parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        pattern = re.compile(r"(?s)" + r".*\0?.*".join(parts))
        assert any(map(pattern.search, templates)), f"no source says {message!r} any more"


def test_files_events_and_figures_of_a_run_are_those_of_the_sources() -> None:
    """The first cells of docs/guide/run-directory.md."""
    text = (ROOT / "docs" / "guide" / "run-directory.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([\w.-]+)`", cell)]
    known = {word for each in message_templates() for word in re.findall(r"[\w.-]+", each)}
    assert len(names) > 40 and not [name for name in names if name not in known]


# --- commands


@pytest.fixture
def workplace(
    bench: Bench, pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a user's data, where commands take workers from the shared server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pools, "WorkerPool", lambda: nullcontext(pool))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    sentence = "Ada B-person\nlives O\nin O\nParis B-place\n. O\n\n"
    for name in ("tags.conll", "YOUR.conll"):
        (tmp_path / name).write_text(sentence.replace(" ", "\t") * 60, encoding="utf-8")
    stories = [f"Story {n}. " + "The lamp keeper counts apples. " * 8 for n in range(80)]
    (tmp_path / "YOUR.txt").write_text("\n\n\n".join(stories), encoding="utf-8")
    (tmp_path / "HELD-OUT.txt").write_text("The tide is out.\n\n\nGulls wait.", encoding="utf-8")
    for split in ("train", "validation"):
        path = tmp_path / "YOUR-SPLITS" / f"{split}-0.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n\n".join(stories[: 60 if split == "train" else 5]), encoding="utf-8")
    rows = "".join(f'{{"title": "{n}", "body": "{story}"}}\n' for n, story in enumerate(stories))
    (tmp_path / "YOUR.jsonl").write_text(rows, encoding="utf-8")
    rows = "".join(
        f"{word} day {number},{word}\n" for number in range(30) for word in ("fine", "grim")
    )
    (tmp_path / "YOUR.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
    questions = [
        {
            "question": "What comes?",
            "context": f"Day {number} brings rain.",
            "answers": {"text": ["rain"], "answer_start": [len(f"Day {number} brings ")]},
        }
        for number in range(60)
    ]
    (tmp_path / "YOUR.json").write_text(json.dumps(questions), encoding="utf-8")
    asked = [{"query": f"what is {n}", "text": f"it is a number, {n}"} for n in range(30)]
    (tmp_path / "YOUR-FAQ.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    (chat,) = blocks(START / "your-data.md", "json")
    (tmp_path / "YOUR-CHATS.jsonl").write_text(chat * 60, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 2 and 3?\n"))
    (recipe,) = blocks(START / "your-data.md", "yaml")
    (tmp_path / "MINE.yaml").write_text(recipe, encoding="utf-8")
    random = np.random.default_rng(0)
    for label, number in itertools.product(("cat", "dog"), range(10)):
        path = tmp_path / "YOUR-FOLDER" / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (28, 28), dtype=np.uint8)).save(path)
    return tmp_path


def small(words: list[str], bench: Bench) -> list[str]:
    """What makes a documented command small enough for a test."""
    own = any(word.startswith("data.source=") for word in words)
    if words[1:3] == ["train", "ner"]:
        return TAGGING + ([] if own else ["data.source=tags.conll"])
    if words[1:3] in (["train", "sentiment"], ["train", "answers"]):
        return TAGGING
    if words[1:3] == ["train", "support"]:
        source = [] if own else ["data.source=YOUR-FAQ.jsonl", "data.validation={fraction: 0.2}"]
        return [
            *TAGGING[:1],
            "data.sequence_tokens=48",
            *TAGGING[2:3],
            *TAGGING[4:],
            *SEARCH,
            *source,
        ]
    if words[1:3] == ["train", "digits"]:
        return IMAGES
    if "finetune" in words[2:4]:
        model = f"model.path={bench.run('train.steps=2').path / 'model'}"
        return [
            model,
            *(["data.sequence_tokens=32", *FINETUNING])[: None if words[1] == "train" else 1],
        ]
    if words[1:3] == ["train", "MINE.yaml"]:
        return SMALL
    source = [] if own else [f"data.source={bench.corpus}"]
    steps = [] if any(word.startswith("train.steps=") for word in words) else ["train.steps=2"]
    if any(word.startswith("model.path=") for word in words):
        sizes = ("model.", "data.tokenizer.")
        return [each for each in SMALL if not each.startswith(sizes)] + steps + source
    if words[1:3] == ["train", "quickstart"] or words[1] in ("evaluate", "parity"):
        return SMALL + steps + source
    if words[1:3] == ["data", "preview"]:
        return [*SMALL, *source]
    if words[1] == "compress":
        return ["--sequence-tokens", "16", "--calibration-samples", "4"]
    if words[1] == "compare":
        return [*SMALL, *source, "train.steps=4", "parallel.replicate=2"]
    if words[1] == "rehearse":
        return [*SMALL, *source, "train.steps=21", "train.evaluate_every_steps=0"]
    return []


def run(command: str, bench: Bench) -> int:
    """Run one documented command, made small; its exit status."""
    words = shlex.split(command)
    assert words[0] == "shoal", command
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], *small(words, bench)])
    return int(ended.value.code or 0)


@pytest.mark.timeout(300)
def test_every_command_runs(workplace: Path, bench: Bench) -> None:
    """Those of the README, then those of docs/start, each once, in one folder."""
    documented = list(dict.fromkeys(line for path in TRANSLATED for line in commands(path)))
    documented = [line for line in documented if not line.startswith("make ")]
    assert len(documented) >= 20
    for command in documented:
        assert run(command, bench) == 0, command
    assert (workplace / "merged" / "model.safetensors").is_file()


def test_python_example_runs(
    workplace: Path, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = blocks(README, "python")
    assert example.count('"quickstart"') == 1
    text = example.replace('"quickstart"', repr(str(bench.recipe)))
    exec(compile(text, "README.md", "exec"), {})
    printed = re.search(r"^(\d+\.\d+) (\d+\.\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert printed is not None, "the example prints a loss and a speed"
    assert 0 < float(printed[1]) < 10 and float(printed[2]) > 0
    assert (workplace / "runs" / "two" / "summary.json").is_file()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in TRANSLATED:
        for command in commands(path):
            if command.startswith("make "):
                assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
