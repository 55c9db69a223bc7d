"""Rule: nothing that is read or received can run code: no pickle, no code of a model's folder."""

from __future__ import annotations

import ast
import json
import pickle  # to make what must not be read
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import saves
import torch
from test_paths import forge, model_of, write_indexed

from shoal.checkpoint.store import Store
from shoal.errors import CheckpointError, ModelError
from shoal.models.huggingface import build_meta, config_from, read_config
from shoal.models.pretrained import PretrainedWeights

SOURCE = Path(__file__).resolve().parents[2] / "src" / "shoal"


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code-was-run"


def test_the_trap_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()


def test_a_pickle_in_the_place_of_weights_is_never_opened(tmp_path: Path, mark: Path) -> None:
    for name in ("pytorch_model.bin", "model.safetensors"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        torch.save(Trap(mark), folder / name)
        with pytest.raises(ModelError):
            PretrainedWeights(folder, model=model_of(folder))
    assert not mark.exists()


def test_a_pickle_in_a_checkpoint_is_never_opened(tmp_path: Path, mark: Path) -> None:
    for step in (1, 2):
        saves.save(tmp_path / "run", step)
    folder = tmp_path / "run/step-00000002"
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(mark)))
    for name in ("manifest.json", "rank-00000.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Trap(mark)))
        with pytest.raises(CheckpointError):
            Store(tmp_path / "run").verify(2)
        (folder / name).write_bytes(content)
    reader = Store(tmp_path / "run").open(2)
    torch.save(Trap(mark), folder / "rank-00000.safetensors")
    with pytest.raises(CheckpointError):
        reader.read("weight")
    assert not mark.exists()


def write_folder_with_code(folder: Path, mark: Path, *, known: bool) -> None:
    """A model folder that asks for classes of its own, as hubs have them."""
    write_indexed(folder)
    config = read_config(architecture="llama", settings={}, vocabulary_size=32).to_dict()
    config.update(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=32,
        model_type="llama" if known else "trap",
        auto_map={
            "AutoConfig": "configuration_trap.TrapConfig",
            "AutoModelForCausalLM": "modeling_trap.TrapModel",
            "AutoTokenizer": ["tokenization_trap.Trap", None],
        },
    )
    (folder / "config.json").write_text(json.dumps(config))
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    for name in ("configuration_trap", "modeling_trap", "tokenization_trap"):
        (folder / f"{name}.py").write_text(code)


def test_code_in_a_model_folder_is_ignored(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "model"
    write_folder_with_code(folder, mark, known=True)
    config = read_config(path=folder, vocabulary_size=32)
    model = build_meta(config, auto_class="AutoModelForCausalLM")
    assert type(model).__module__.startswith("transformers.")
    assert PretrainedWeights(folder, model=model).missing == ()
    assert not mark.exists()
    assert "auto_map" not in config.to_dict(), "nor handed on to who reads what is exported"


def test_an_architecture_that_is_only_code_is_refused(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "model"
    write_folder_with_code(folder, mark, known=False)
    with pytest.raises(ModelError, match="transformers knows no 'trap'"):
        read_config(path=folder, vocabulary_size=32)
    assert not mark.exists()


def test_code_named_by_a_checkpoint_is_ignored(tmp_path: Path, mark: Path) -> None:
    saves.save(tmp_path, 1)
    tree = read_config(architecture="llama", settings={}, vocabulary_size=32).to_dict()
    tree["auto_map"] = {"AutoModelForCausalLM": f"{tmp_path}--modeling_trap.TrapModel"}
    forge(tmp_path / "step-00000001", lambda body: body["state"].update(model_config=tree))
    config = config_from(Store(tmp_path).open(1).state["model_config"])
    build_meta(config, auto_class="AutoModelForCausalLM")
    assert not hasattr(config, "auto_map") and not mark.exists()


def test_no_source_trusts_remote_code_or_evaluates_text() -> None:
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            trust = named.get("trust_remote_code")
            assert trust is None or (isinstance(trust, ast.Constant) and trust.value is False), path
            if isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "__import__"}, path
            shell = named.get("shell")
            assert shell is None or (isinstance(shell, ast.Constant) and not shell.value), path


LOADERS = re.compile(r"\bAuto\w+\.from_pretrained\(|type\(model\)\.from_pretrained\(")


def test_every_loader_says_that_it_trusts_no_code() -> None:
    """`convert` reads a pinned package, checked by its hash, through the same calls."""
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for found in LOADERS.finditer(text):
            if (
                path.name == "convert.py"
                or "save_pretrained" in text[found.end() : found.end() + 40]
            ):
                continue
            call = text[found.end() : found.end() + 200]
            assert "trust_remote_code=False" in call, f"{path.name}: {call}"


def test_an_archive_of_code_is_data(tmp_path: Path, mark: Path) -> None:
    """Unpacking writes files; nothing below a package is imported."""
    from shoal.data import fetch

    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/__init__.py", f"open({str(mark)!r}, 'w')")
        wheel.writestr("tiny/data.txt", "hello")
    fetch.unpack_wheel(path, into=tmp_path / "out", members=["*.txt"])
    names = [each.name for each in (tmp_path / "out/tiny").iterdir()]
    assert names == ["data.txt"] and not mark.exists()
