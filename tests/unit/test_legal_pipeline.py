"""What a pipeline is refused, before a worker starts: the reason, and what to set instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B

from shoal.config.load import recipe_from
from shoal.config.recipe import Recipe
from shoal.engine.decision import largest_micro_batch
from shoal.launch.candidates import most_replicas
from shoal.launch.refuse import combination_of
from shoal.layout import Layout
from shoal.legal import Combination, facts_from_config, fits_schedule, open_axes, problems
from shoal.legal.rules import SCHEDULES

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
TWO = Layout(pipeline=2)
V = {"schedule": "zbv-zero-bubble", "stages_per_rank": 2}
LOOPED = {"schedule": "interleaved-1f1b", "stages_per_rank": 2}


def asked(*, tied: bool = False, **settings: Any) -> Combination:
    """A pipeline of two on 16 samples in micro batches of 4, with `settings`."""
    facts = facts_from_config({**LLAMA, "tie_word_embeddings": tied})
    known = {"layout": TWO, "global_batch_samples": 16, "micro_batch_samples": 4, **settings}
    return Combination(**known).of_model(facts)


REFUSED = [
    ({"layout": Layout(pipeline=8), "micro_batch_samples": 2}, "8 stages for 4 blocks", "most 4"),
    ({**LOOPED, "stages_per_rank": 3}, "6 stages for 4 blocks", "use shard=2 instead"),
    ({"micro_batch_samples": 16}, "needs 2 or more micro batches a step, got 1", "set it to 8"),
    (
        {"layout": Layout(pipeline=4, replicate=8), "micro_batch_samples": None},
        "needs 4 or more micro batches a step, got few samples",
        "nearest degree that has enough is 2",
    ),
    (
        {**LOOPED, "layout": Layout(pipeline=2, replicate=2), "micro_batch_samples": 8},
        "a multiple of 2 micro batches a step, got 1",
        "set it to 4",
    ),
    ({"schedule": "interleaved-1f1b"}, "needs two or more, got 1", "set it to 2"),
    ({"schedule": "zbv-zero-bubble"}, "needs exactly two, got 1", "set it to 2"),
    ({"stages_per_rank": 2}, "1f1b has one, got 2", "the schedule to interleaved-1f1b"),
    ({"schedule": "1f2b"}, "expected one of gpipe", "did you mean '1f1b'"),
    ({"split": (3, 2)}, "2 numbers that add up to 4 blocks, got [3, 2]", "one for each stage"),
    ({"split": (1, 1, 2)}, "2 numbers that add up to 4 blocks", "one for each stage"),
    ({"runs_once": False}, "more than one forward", "use parallel.shard=2 instead"),
    ({"workers": "threads"}, "threads carry the replicate axis only", "pipeline to 1"),
    ({**V, "layout": Layout(pipeline=2, shard=2)}, "takes apart", "set it to optimizer, or"),
    ({**V, "recompute": "full"}, "takes apart", "1f1b or interleaved-1f1b"),
    ({**V, "compile": True}, "takes apart", "1f1b or interleaved-1f1b"),
    ({**V, "exact": True}, "mixes the gradients", "schedule to 1f1b"),
    ({"exact": True, "tied": True}, "tied to the head", "tie_word_embeddings=false"),
    ({"exact": True, "layout": Layout(pipeline=2, tensor=2)}, "whole replicas and", "replicate"),
]


@pytest.mark.parametrize(("settings", "what", "hint"), REFUSED)
def test_what_is_refused(settings: dict[str, Any], what: str, hint: str) -> None:
    found = "\n".join(map(str, problems(asked(**settings))))
    assert what in found
    assert hint in found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch_samples": 8},
        {"split": (3, 1)},
        {"exact": True},
        {"optimizer": "muon"},
        {"recompute": "full", "compile": True},
        LOOPED,
        V,
        {**V, "layout": Layout(pipeline=2, shard=2), "shard_level": "optimizer"},
        {**LOOPED, "exact": False, "layout": Layout(pipeline=2, shard=2, tensor=2)},
        {"schedule": "gpipe", "micro_batch_samples": 16},
    ],
)
def test_what_is_taken(settings: dict[str, Any]) -> None:
    assert problems(asked(**settings)) == []


def test_every_hint_of_a_micro_batch_is_taken() -> None:
    """For every schedule, degree and batch: what the hint says is legal, or the degree is."""
    for name in SCHEDULES:
        for ranks in (2, 3, 4):
            for batch in range(1, 25):
                one = asked(
                    layout=Layout(pipeline=ranks),
                    global_batch_samples=batch,
                    micro_batch_samples=batch,
                    schedule=name,
                    stages_per_rank=1 if name in ("gpipe", "1f1b") else 2,
                )
                one = replace(one, facts=None, family=None)
                for problem in problems(one):
                    number = int(problem.hint.split()[-1])
                    if problem.where == "parallel.pipeline":
                        one = replace(one, layout=Layout(pipeline=number), micro_batch_samples=None)
                    else:
                        one = replace(one, micro_batch_samples=number)
                    assert problems(one) == [], (name, ranks, batch, str(problem))


def test_what_fits_a_schedule_is_what_torch_takes() -> None:
    class Stage:
        """As much of a stage as a schedule's constructor reads."""

        def __init__(self, index: int, each: int) -> None:
            self.stage_index, self.num_stages = index, 2 * each
            self.group_size, self.group_rank, self.device = 2, 0, torch.device("cpu")
            self.submod, self.is_first, self.is_last = torch.nn.Module(), index == 0, False

    for count in range(1, 9):
        if fits_schedule("1f1b", ranks=2, micro_batches=count):
            Schedule1F1B(Stage(0, 1), count)  # type: ignore[arg-type]
        else:
            with pytest.raises(ValueError, match="microbatches"):
                Schedule1F1B(Stage(0, 1), count)  # type: ignore[arg-type]
        if fits_schedule("interleaved-1f1b", ranks=2, micro_batches=count):
            ScheduleInterleaved1F1B([Stage(0, 2), Stage(2, 2)], count)  # type: ignore[list-item]


def recipe(**parallel: Any) -> Recipe:
    """The tiny recipe with a section `parallel`."""
    tree = {
        "model": {"kind": "config", "architecture": "llama"},
        "data": {"source": "chitchat"},
        "train": {"steps": 1, "global_batch_samples": 32},
        "parallel": parallel,
    }
    return recipe_from(tree, source="a test")


def test_a_number_is_the_short_form() -> None:
    short, long = (combination_of(recipe(pipeline=p), TWO) for p in (2, {"degree": 2}))
    assert short == long
    assert (short.schedule, short.stages_per_rank, short.split) == ("1f1b", 1, ())
    given = {"degree": 2, "schedule": "zbv-zero-bubble", "split": [1, 2, 3, 4]}
    whole = combination_of(recipe(pipeline=given), TWO)
    assert (whole.stages_per_rank, whole.split) == (2, (1, 2, 3, 4))


def test_a_micro_batch_that_nobody_chose_fills_the_pipeline() -> None:
    """Four micro batches for each rank where there are samples, else what the schedule needs."""
    assert largest_micro_batch(recipe(pipeline=2), parts=1, at_most=64) == 4
    assert largest_micro_batch(recipe(pipeline=2), parts=1, at_most=2) == 2
    assert largest_micro_batch(recipe(pipeline=8), parts=2, at_most=64) == 1
    assert largest_micro_batch(recipe(shard=2), parts=2, at_most=64) == 16
    looped = {"degree": 4, "schedule": "interleaved-1f1b"}
    assert largest_micro_batch(recipe(pipeline=looped), parts=1, at_most=64) == 2


def test_a_plan_may_choose_it_where_the_task_allows() -> None:
    assert "pipeline" in open_axes(Combination(family="llama"))
    assert "pipeline" not in open_axes(Combination(family="llama", runs_once=False))
    assert "pipeline" not in open_axes(Combination(family="vit"))


def test_replicas_that_nobody_gave_leave_micro_batches_enough() -> None:
    """32 samples: eight replicas of four ranks have four micro batches each; no more fit."""
    assert most_replicas(recipe(pipeline=4), at_most=64) == 8
    assert most_replicas(recipe(pipeline=4), at_most=6) == 4
    assert most_replicas(recipe(), at_most=64) == 32
    looped = {"degree": 3, "schedule": "interleaved-1f1b"}
    assert most_replicas(recipe(pipeline=looped), at_most=64) == 1
