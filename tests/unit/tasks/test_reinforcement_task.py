"""Estimates and loss of reinforcement learning against plain sums; actors against gymnasium."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.data.prepare import SourceSpec, prepare
from shoal.data.stream import Stream
from shoal.errors import ConfigError, DataError, RunError
from shoal.layout import Share
from shoal.tasks.kinds import create
from shoal.tasks.reinforcement import Reinforcement, ppo_losses
from shoal.tasks.reinforcement_actors import (
    Environment,
    Rollouts,
    Settings,
    advantages_of,
    returns_of,
)

OPTIONS = {
    "kind": "reinforcement",
    "environment": "CartPole-v1",
    "actors": 3,
    "rollout_steps": 16,
    "epochs": 2,
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "clip": 0.2,
    "value_coefficient": 0.5,
    "entropy_coefficient": 0.01,
}


class Alone:
    """Plays everything by itself; its model leans as the pole does, and values its angle."""

    part, num_parts = 0, 1

    def logits(self, batch: Any) -> Any:
        seen = batch["pixel_values"][:, :, 0, 0]
        lean = seen[:, 2] + seen[:, 3]
        return np.stack([-lean, lean, 0.1 * seen[:, 2]], axis=1).astype(np.float32)

    def write(self, wanted: Any, **asked: Any) -> None:
        raise AssertionError("environments have no texts")

    def text_of(self, ids: Any) -> str:
        raise AssertionError("environments have no texts")

    def together(self, mine: Any) -> Any:
        return dict(mine)

    def still(self, mine: bool) -> bool:
        return mine

    def tell(self, what: str, done: float | None) -> None:
        """Nobody listens."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    task = create("reinforcement", options=OPTIONS)
    prepared = prepare(
        sources=[SourceSpec(source="episodes")],
        encode=lambda records: task.encode(records, tools=None),  # type: ignore[arg-type]
        encode_key="a test",
        sequence_tokens=8,
        packing=False,
        validation_fraction=0.02,
        fields=task.fields,
        out=tmp_path_factory.mktemp("prepared"),
    )
    return Stream(prepared, seed=5, global_batch_samples=12)


def batches(stored: Stream, **changed: Any) -> Rollouts:
    task = create("reinforcement", options={**OPTIONS, **changed})
    task.learn([])
    found = task.batches(stored, play=Alone())
    assert isinstance(found, Rollouts)
    return found


def test_advantages_are_the_sums_of_the_paper() -> None:
    """Equation 16 of arXiv 1506.02438 written out, of episodes that end and are cut off."""
    draw = np.random.default_rng(0)
    rewards, values, after = draw.normal(size=(3, 4, 20))
    terminated = draw.random((4, 20)) < 0.15
    ended = terminated | (draw.random((4, 20)) < 0.15)
    gamma, lam = 0.9, 0.7
    found = advantages_of(
        rewards,
        values,
        after,
        terminated=terminated,
        ended=ended,
        gamma=gamma,
        gae_lambda=lam,
    )
    for actor, first in np.ndindex(4, 20):
        total = 0.0
        for step in range(first, 20):
            worth = 0.0 if terminated[actor, step] else after[actor, step]
            error = rewards[actor, step] + gamma * worth - values[actor, step]
            total += (gamma * lam) ** (step - first) * error
            if ended[actor, step]:
                break
        assert found[actor, first] == pytest.approx(total, abs=1e-12)


def plain_loss(logits: Tensor, fields: dict[str, Tensor], unit: float) -> Tensor:
    """One transition after the other, by the definitions."""
    total = logits.new_zeros(())
    for row in range(len(logits)):
        probabilities = torch.softmax(logits[row, :-1], 0)
        action, gain = int(fields["actions"][row]), fields["advantages"][row]
        ratio = probabilities[action] / fields["log_probabilities"][row].exp()
        bounded = min(max(ratio.item(), 0.8), 1.2)
        surrogate = ratio * gain if ratio * gain <= bounded * gain else bounded * gain
        error = (logits[row, -1] * unit - fields["returns"][row]) / unit
        entropy = -sum(p * p.log() for p in probabilities)
        total = total - surrogate + 0.5 * error * error - 0.01 * entropy
    return total


def test_the_loss_and_its_gradient_are_those_of_plain_torch() -> None:
    """With ratios on both sides of the bounds, and advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    fields = {
        "actions": torch.randint(3, (64,), generator=generator),
        "log_probabilities": torch.log(0.1 + 0.8 * torch.rand(64, generator=generator)).double(),
        "advantages": torch.randn(64, generator=generator).double(),
        "returns": 10 * torch.randn(64, generator=generator).double(),
    }
    found = ppo_losses(
        logits, fields, clip=0.2, value_coefficient=0.5, entropy_coefficient=0.01, unit=50.0
    ).sum()
    wanted = plain_loss(logits, fields, 50.0)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)
    one, other = (torch.autograd.grad(each, logits)[0] for each in (found, wanted))
    assert torch.allclose(one, other, atol=1e-12) and one.abs().max() > 0.1


def begin(starts: Stream, actor: int, episode: int) -> int:
    return int(starts.at(episode, Share(actor, actor + 1))["episodes"][0])


def test_actors_play_what_gymnasium_plays(stored: Stream) -> None:
    """Each actor's observations and rewards, by its actions and the beginnings of its episodes."""
    rollouts, settings = batches(stored), OPTIONS
    found = [rollouts._rollout(0)]
    environment = gymnasium.make("CartPole-v1")
    starts = stored.in_batches_of(3)
    for actor in range(3):
        episode = 0
        seen, _ = environment.reset(seed=begin(starts, actor, episode))
        for step in range(int(settings["rollout_steps"])):  # type: ignore[call-overload]
            assert np.array_equal(found[0]["observations"][actor, step], seen)
            action = int(found[0]["actions"][actor, step])
            seen, reward, terminated, truncated, _ = environment.step(action)
            assert np.array_equal(found[0]["after"][actor, step], seen)
            assert found[0]["rewards"][actor, step] == reward
            if terminated or truncated:
                episode += 1
                seen, _ = environment.reset(seed=begin(starts, actor, episode))


def test_each_transition_is_learned_from_once_in_a_pass_and_rollouts_go_on(stored: Stream) -> None:
    rollouts = batches(stored)
    assert rollouts.steps_per_rollout == 8 and rollouts.steps_per_epoch == 4
    assert rollouts.length(9) == "2 rollouts of 48 steps, 96 in all"
    whole = [rollouts.at(step, Share(0, 12)) for step in range(8)]
    for some in (whole[:4], whole[4:]):
        rows = np.concatenate([each["sample_ids"] % 48 for each in some])
        assert sorted(rows) == list(range(48))
    part = rollouts.at(2, Share(4, 8))
    assert all(np.array_equal(part[name], whole[2][name][4:8]) for name in part)
    gains = whole[0]["advantages"]
    assert gains.mean() == pytest.approx(0, abs=1e-6) and gains.std() == pytest.approx(1, abs=1e-5)
    rollouts.at(8, Share(0, 12))
    with pytest.raises(ValueError, match="step 3 was played by other weights"):
        rollouts.at(3, Share(0, 12))


def test_who_takes_over_plays_on_where_the_other_was(stored: Stream) -> None:
    one, other = (batches(stored, rollout_steps=40, epochs=1) for _ in range(2))
    for step in (0, 10, 20):
        one.at(step, Share(0, 12))
        if step == 10:
            other.restore(one.kept())
            again, before = other.at(12, Share(0, 12)), one.at(12, Share(0, 12))
            assert all(np.array_equal(again[name], before[name]) for name in before)
    two, wanted = other.at(20, Share(0, 12)), one.at(20, Share(0, 12))
    assert all(np.array_equal(two[name], wanted[name]) for name in wanted)
    assert other.kept() == one.kept() and len(one.history) >= 1


def test_an_episode_that_is_cut_off_is_worth_what_it_would_have_come_to(stored: Stream) -> None:
    """The value of the policy after a cut; nothing after an end."""
    gymnasium.register("Cut-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=5)
    try:
        rollouts = batches(stored, environment="Cut-v0")
        found = rollouts._rollout(0)
        ended = (found["terminated"] + found["truncated"]) > 0
        values = rollouts._values_after(found, ended)
    finally:
        del gymnasium.registry["Cut-v0"]
    assert (found["truncated"][:, 4::5] == 1).all() and not found["terminated"].any()
    angle = found["after"][..., 2].astype(np.float32)
    unit = 1 / (1 - 0.9)
    cut = found["truncated"] > 0
    assert np.allclose(values[cut], (np.float32(0.1) * angle[cut]) * unit, rtol=1e-5)
    inner = ~cut[:, :-1]
    assert np.array_equal(values[:, :-1][inner], found["values"][:, 1:][inner])


def test_returns_are_those_of_gymnasium() -> None:
    starts = [3, 1, 4, 15]
    found = returns_of("CartPole-v1", starts, lambda seen: (seen[:, 2] > 0).astype(int))
    environment = gymnasium.make("CartPole-v1")
    for start, total in zip(starts, found):
        seen, _ = environment.reset(seed=start)
        wanted, over = 0.0, False
        while not over:
            seen, reward, terminated, truncated, _ = environment.step(int(seen[2] > 0))
            wanted, over = wanted + float(reward), terminated or truncated
        assert total == wanted


def test_observations_of_any_space_become_vectors() -> None:
    numbered = Environment("FrozenLake-v1")
    assert (numbered.num_observations, numbered.num_actions) == (16, 4)
    assert numbered.reset(0).tolist() == [1.0] + [0.0] * 15


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPole-v7", r"task\.environment: gymnasium knows no.*\n.*did you mean 'CartPole-v"),
        ("Pendulum-v1", r"Pendulum-v1 has the actions Box.*expected a number of them"),
        ("nowhere_at_all:Mine-v0", r"task\.environment: 'nowhere_at_all:Mine-v0': ModuleNotFound"),
        ("LunarLander-v3", r"LunarLander-v3 cannot be made: .*\n.*work in gymnasium first"),
    ],
)
def test_environments_that_cannot_be_played(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Environment(name)


def test_gymnasium_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r"(?s)environments need gymnasium.*pip install 'shoal\["):
        create("reinforcement", options=OPTIONS).learn([])


def test_an_environment_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_world.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Own-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Environment("own_world:Own-v0").num_actions == 2


def test_a_batch_that_does_not_divide_a_rollout(stored: Stream) -> None:
    with pytest.raises(ConfigError, match=r"12 does not divide the 50\n? ?transitions"):
        batches(stored, actors=5, rollout_steps=10)


def test_records_that_are_no_episodes() -> None:
    with pytest.raises(DataError, match=r"(?s)got keys \['text'\].*data\.source=episodes"):
        create("reinforcement", options=OPTIONS).encode([{"text": "a"}], tools=None)  # type: ignore[arg-type]


def test_a_save_of_other_settings_or_damaged(stored: Stream) -> None:
    one = batches(stored)
    one.at(0, Share(0, 12))
    with pytest.raises(RunError, match="the save has 3 actors"):
        batches(stored, actors=6, rollout_steps=8).restore(one.kept())
    kept = {**one.kept(), "played": {"actions": ["<i8", [48], "AAA"]}}
    with pytest.raises(RunError, match="is damaged"):
        one.restore(kept)
    kept = {**one.kept(), "played": {"actions": ["|O", [48], ""]}}
    with pytest.raises(RunError, match="is damaged"):
        one.restore(kept)


def test_the_settings_are_those_of_the_section() -> None:
    assert Settings("x", 4, 8, 256, 10, 0.9, 0.9).transitions == 2048
    assert Reinforcement.kind == "reinforcement"
