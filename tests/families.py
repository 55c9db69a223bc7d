"""Recipes of tiny models of every family, and the layouts that each is proven in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from shoal.layout import Layout
from shoal.legal import SCHEDULES, axes_of, family_of
from shoal.legal.rules import CONTEXT_KINDS, SHARD_LEVELS
from tiny import write_corpus
from unit.models.tiny_models import MIXTURES, SETTINGS

LOSS = 1e-5
"""Relative, over five steps: the promise. Measured: 1.4e-7, two last places of float32."""

GRADIENT = 1e-3
"""By the rule of docs/design/determinism.md, first step, both from the same weights. Measured: 2e-6
where a gradient is not zero in truth, from sums in another order. Key biases are zero in truth, so
what is left is the rounding of terms as large as other gradients (6e-8 of them), set against 1e-6
of the whole: up to 1.5e-4 measured (vit), and the floor of this tolerance. A missing or doubled
reduction gives 0.4 to 1.0, a wrong scale or shard no less."""

LIMIT = 0.05
"""Clips always."""

TOKENS = 18
"""No multiple of 4, so that splitting the sequence needs padding."""

FAMILIES = tuple(family for family in SETTINGS if family not in ("cohere", "t5"))
"""Those that a task of the product trains; T5 is in test_encoder_decoder.py."""

BLOCKS = 8
"""Two stages for each of four ranks."""

_MORE_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
"""So that 4 ranks have a key head each, shared by two query heads."""


@dataclass(frozen=True)
class Case:
    """A layout to prove, and how the strategies behave in it."""

    family: str
    layout: Layout
    level: str = "parameters"
    more: tuple[str, ...] = field(default=())
    """Further overrides of `parallel`."""
    kind: str = "ring"
    """Of the context axis."""

    @property
    def overrides(self) -> list[str]:
        """As a recipe has them."""
        layout = self.layout
        words = [f"parallel.replicate={layout.replicate}", f"parallel.tensor={layout.tensor}"]
        words.append(f"parallel.shard={{degree: {layout.shard}, level: {self.level}}}")
        words.append(f"parallel.context={{degree: {layout.context}, kind: {self.kind}}}")
        words.append(f"parallel.expert={layout.expert}")
        return [*words, *self.more]

    @property
    def notes(self) -> str:
        """What the degrees do not say."""
        level = [self.level] if self.layout.shard > 1 else []
        kind = [self.kind] if self.layout.context > 1 else []
        return ", ".join([*level, *kind, *(word.partition(".")[2] for word in self.more)])


def matrix(family: str) -> list[Case]:
    """The layouts that a family is proven in: every axis of its own by 2 and 4, mixes."""
    tensor = "tensor" in axes_of(family)
    pairs = [(2, 1), (4, 1)] + ([(2, 2), (4, 2), (2, 4)] if tensor else [])
    cases = [
        Case(family, Layout(shard=s, tensor=t), level) for s, t in pairs for level in SHARD_LEVELS
    ]
    mixes = [Layout(replicate=2), Layout(replicate=4), Layout(replicate=2, shard=4)]
    if tensor:
        mixes += [Layout(tensor=2), Layout(tensor=4)]
        mixes += [Layout(replicate=2, shard=2, tensor=2), Layout(replicate=2, tensor=4)]
    if "expert" in axes_of(family):
        spread = [(2, 2), (4, 2), (4, 4)]
        cases += [
            Case(family, Layout(shard=s, expert=e), level)
            for s, e in spread
            for level in SHARD_LEVELS
        ]
        mixes += [Layout(shard=2, tensor=2, expert=2), Layout(replicate=2, shard=4, expert=4)]
        mixes += [Layout(replicate=2, shard=2, tensor=2, expert=2), Layout(shard=8, expert=4)]
    cases += [Case(family, layout) for layout in mixes]
    cases.append(Case(family, Layout(replicate=2), more=("launch.workers=threads",)))
    widest = Layout(shard=2, tensor=2 if tensor else 1)
    kinds = ("selective", "full")
    cases += [Case(family, widest, more=(f"parallel.recompute={kind}",)) for kind in kinds]
    return cases + (_of_rows(family) if "context" in axes_of(family) else [])


def _of_rows(family: str) -> list[Case]:
    """Rows cut in 2 and 4, both ways, and mixed with the other axes."""
    layouts = [Layout(context=2), Layout(context=4), Layout(context=2, shard=2)]
    layouts += [Layout(context=2, tensor=2), Layout(context=2, tensor=2, replicate=2)]
    cases = [Case(family, layout, kind=kind) for layout in layouts for kind in CONTEXT_KINDS]
    again = ("parallel.recompute=selective",)
    return [*cases, Case(family, Layout(context=2, tensor=2, shard=2), "optimizer", again)]


def staged(family: str) -> list[Case]:
    """The pipelines that a family is proven in, with `BLOCKS`: every schedule, and mixes."""
    if "pipeline" not in axes_of(family):
        return []
    cases = [
        Case(family, Layout(pipeline=degree), more=(_pipeline(degree, name),))
        for degree in (2, 4)
        for name in SCHEDULES
    ]
    one, looped, v = (_pipeline(2, name) for name in ("1f1b", "interleaved-1f1b", SCHEDULES[-1]))
    tensor = 2 if "tensor" in axes_of(family) and family_of(family).tensor else 1
    mixes = [
        Case(family, Layout(pipeline=2, shard=2, tensor=tensor), "gradients", (one,)),
        Case(family, Layout(pipeline=2, shard=2), "optimizer", (v,)),
        Case(family, Layout(pipeline=2, shard=2), more=(looped, "parallel.recompute=full")),
        Case(family, Layout(pipeline=2, replicate=2, tensor=tensor), more=(v,)),
    ]
    return cases + mixes


def _pipeline(degree: int, schedule: str) -> str:
    return f"parallel.pipeline={{degree: {degree}, schedule: {schedule}}}"


def recipe_of(family: str, folder: Path, *, blocks: int | None = None) -> Path:
    """A recipe file below `folder` that trains a tiny model of `family` on data made for it.

    `blocks`: so many, whose kinds go on as they begin; None: two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**SETTINGS, **MIXTURES}[family]
    heads = _MORE_HEADS if "num_key_value_heads" in settings else {}
    if "kv_lora_rank" in settings:  # each head has keys of its own
        heads = dict.fromkeys(heads, 8)
    tree = {
        "seed": 3,
        "task": {"kind": _task(family)},
        "model": {
            "kind": "config",
            "architecture": family,
            **settings,
            **heads,
            **_blocks(family, blocks),
            "dropout": "keyed",
        },
        "data": _data(family, folder),
        "train": {"steps": 5, "global_batch_samples": 8, "max_gradient_norm": LIMIT},
        "launch": {"device": "cpu"},
    }
    path = folder / f"{family}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def _blocks(family: str, count: int | None) -> dict[str, object]:
    if count is None:
        return {}
    kinds = {**SETTINGS, **MIXTURES}[family].get("layer_types")
    found: dict[str, object] = {"n_layer" if family == "gpt2" else "num_hidden_layers": count}
    return found | ({"layer_types": (kinds * count)[:count]} if kinds else {})


def _task(family: str) -> str:
    kinds = {"bert": "token-classification", "roberta": "token-classification"}
    return {**kinds, "vit": "image-classification"}.get(family, "causal-lm")


def _data(family: str, folder: Path) -> dict[str, object]:
    """The section `data`, and what it names."""
    tokenizer = {"kind": "train", "vocabulary_size": 300}
    common = {"sequence_tokens": TOKENS, "validation": {"fraction": 0.2}, "evaluation_samples": 12}
    match _task(family):
        case "causal-lm":
            source = write_corpus(folder / "tales.jsonl", documents=80)
            packing = family != "t5"
            return {"source": str(source), "packing": packing, "tokenizer": tokenizer, **common}
        case "token-classification":
            source = folder / "tags.conll"
            rows = ["Ada B-person\nlives O\nin O\nParis B-place\n. O\n", "It O\nrains O\n. O\n"]
            text = "\n".join(rows[number % 2] for number in range(120)).replace(" ", "\t")
            source.write_text(text, encoding="utf-8")
            return {"source": str(source), "packing": False, "tokenizer": tokenizer, **common}
    _write_images(folder / "images")
    return {"source": str(folder / "images"), "packing": False, **common}


def _write_images(folder: Path) -> None:
    """Noisy images of 8 x 8 pixels of two classes."""
    random = np.random.default_rng(0)
    for name in ("up", "down"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(40):
            pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
