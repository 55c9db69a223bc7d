"""Actors that play an environment with the policy as it is: what they did is learned from.

All that is drawn is keyed by (seed, rollout, actor), and every forward has the same number of rows:
whoever plays which actors, the same is played. An actor goes on with its episode in the next
rollout. Where it stands is told by the episode's beginning and the actions since: whoever takes
over plays them again, so that no environment is ever stored.

Shapes: A actors, T steps of a rollout, N numbers of an observation, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError, Problem, RunError, nearest
from shoal.layout import Share
from shoal.tasks.imports import imported
from shoal.tasks.playing import Array, Floats, Play, Stored, choose, packed, unpacked

Policy = Callable[[NDArray[np.float32]], tuple[Floats, Floats]]
"""Observations [B, N] -> log-probabilities of the actions [B, actions] and values [B]."""

_KEY = "task.environment"
_TOLD_STEPS = 64


class Environment:
    """One environment of gymnasium, with observations as flat vectors and numbered actions."""

    def __init__(self, name: str) -> None:
        """Raises ConfigError for a name or an environment that cannot be played here."""
        self._environment = _made(name)
        spaces = _gymnasium().spaces
        space, actions = self._environment.observation_space, self._environment.action_space
        if not isinstance(actions, spaces.Discrete):
            what = f"{name} has the actions {actions}; expected a number of them (Discrete)"
            raise ConfigError([Problem(_KEY, what, "choose an environment such as CartPole-v1")])
        if not space.is_np_flattenable:
            what = f"{name} has the observations {space}, of no fixed number of values"
            raise ConfigError([Problem(_KEY, what, "choose an environment such as CartPole-v1")])
        self._flatten, self._space = spaces.flatten, space
        self.num_observations = int(spaces.flatdim(space))
        self.num_actions, self._first = int(actions.n), int(actions.start)

    def reset(self, seed: int) -> NDArray[np.float32]:
        """Begin an episode; its first observation [N]."""
        return self._flat(self._environment.reset(seed=seed)[0])

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool]:
        """Act: the observation [N] after it, the reward, and whether it terminated, was cut off."""
        found = self._environment.step(self._first + action)
        return self._flat(found[0]), float(found[1]), bool(found[2]), bool(found[3])

    def _flat(self, observation: Any) -> NDArray[np.float32]:
        flat: NDArray[np.float32] = self._flatten(self._space, observation).astype(np.float32)
        return flat


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError as error:
        what = f"environments need gymnasium, which is not installed ({error})"
        hint = "install the extra of tasks: pip install 'shoal[tasks]'"
        raise ConfigError([Problem("task.kind", what, hint)]) from None
    return gymnasium


def _made(name: str) -> Any:
    gymnasium = _gymnasium()
    module, colon, _ = name.rpartition(":")
    if colon:
        imported(module, named=name, key=_KEY)
    try:
        return gymnasium.make(name, disable_env_checker=True)
    except gymnasium.error.UnregisteredEnv:
        what = f"gymnasium knows no environment {name!r}"
        raise ConfigError([Problem(_KEY, what, nearest(name, gymnasium.registry))]) from None
    except Exception as error:  # whatever its own code raises, such as for what it needs
        said = f"{name} cannot be made: {type(error).__name__}: {error}"
        raise ConfigError([Problem(_KEY, said, "make it work in gymnasium first")]) from None


@dataclass
class Actor:
    """Where one actor stands: its how-many-th episode, and what it did and got in it."""

    episode: int = 0
    total: float = 0.0
    actions: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """Of playing, as the recipe's section has them."""

    environment: str
    num_observations: int
    actors: int
    rollout_steps: int
    epochs: int
    gamma: float
    gae_lambda: float

    @property
    def transitions(self) -> int:
        """Of one rollout."""
        return self.actors * self.rollout_steps


class Rollouts:
    """Batches of what the actors did: each rollout is read `epochs` times, in another order each.

    A sample is a transition; its id is unique over the run.
    """

    def __init__(
        self, stored: Stored, settings: Settings, *, policy: Policy, play: Play | None
    ) -> None:
        """`stored`: the beginnings of episodes. `policy`: by the model as it is."""
        self._settings, self._policy, self._play = settings, policy, play
        self._order = stored.order_of(settings.environment, settings.transitions)
        self._starts = stored.in_batches_of(settings.actors)
        self.seed, self.names = stored.seed, [settings.environment]
        self.num_samples = [settings.transitions]
        self.global_batch_samples = stored.global_batch_samples
        self.steps_per_rollout = (
            settings.epochs * settings.transitions // stored.global_batch_samples
        )
        self._standing: dict[int, tuple[Environment, NDArray[np.float32]]] = {}
        self._kept: dict[str, Any] = {}
        self.restore({})

    # --- what a run asks for

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which what was played is learned from once."""
        return self._order.steps_per_epoch

    def ids(self, step: int) -> NDArray[np.int64]:
        """(0, sample id) of each transition of `step` [G, 2]."""
        return self._order.ids(step)

    def state(self, step: int) -> dict[str, int]:
        """Transitions learned from before `step`, each as often as it was."""
        return self._order.state(step)

    def length(self, steps: int) -> str:
        """How much is played."""
        rollouts = -(-steps // self.steps_per_rollout)
        return (
            f"{rollouts} rollouts of {self._settings.transitions:,} steps, "
            f"{rollouts * self._settings.transitions:,} in all"
        )

    def at(self, step: int, share: Share) -> dict[str, Array]:
        """Transitions: observations float32 [B, N], actions int64, log_probabilities, advantages
        (normalised over the global batch) and returns float32 [B]; sample_ids, source_ids."""
        rollout = step // self.steps_per_rollout
        if rollout == self.rollout + 1:
            self._next()
        elif rollout != self.rollout:
            raise ValueError(f"step {step} was played by other weights, or is not yet")
        ids = self.ids(step)
        index = ids[:, 1] % self._settings.transitions
        advantages = self.played["advantages"][index].astype(np.float64)
        normal = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        mine = slice(share.start, share.stop)
        batch = {name: array[index[mine]] for name, array in self.played.items()}
        return {
            **batch,
            "advantages": normal[mine].astype(np.float32),
            "sample_ids": ids[mine, 1].copy(),
            "source_ids": ids[mine, 0].copy(),
        }

    def kept(self) -> dict[str, Any]:
        """What was played last, where each actor stands, and the returns so far."""
        return self._kept

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Stand where `kept` says. Raises RunError for what is of other settings."""
        count = self._settings.actors
        self.rollout = int(kept.get("rollout", -1))
        """The last that was played, from 0."""
        self.actors = [Actor(**each) for each in kept.get("actors", [{}] * count)]
        self.history: list[list[float]] = [list(each) for each in kept.get("history", [])]
        """Of each rollout in which episodes ended: steps played so far, and their mean return."""
        self.played = unpacked(kept.get("played", {}))
        sizes = {len(array) for array in self.played.values()} - {self._settings.transitions}
        if len(self.actors) != count or sizes:
            raise RunError(
                f"the save has {len(self.actors)} actors and rollouts of {sizes or 'that size'}, "
                "not what the recipe says\n    go on with its own task section"
            )
        self._kept = dict(kept)
        self._standing.clear()

    @property
    def num_played(self) -> int:
        """Steps of the environment so far, all actors together."""
        return (self.rollout + 1) * self._settings.transitions

    # --- playing

    def _next(self) -> None:
        found = self._rollout(self.rollout + 1)
        ended = (found["terminated"] + found["truncated"]) > 0
        gains = advantages_of(
            found["rewards"],
            found["values"],
            self._values_after(found, ended),
            terminated=found["terminated"] > 0,
            ended=ended,
            gamma=self._settings.gamma,
            gae_lambda=self._settings.gae_lambda,
        )
        self.rollout += 1
        self._stand(found, ended)
        flat = {
            "observations": found["observations"].reshape(-1, found["observations"].shape[-1]),
            "log_probabilities": found["log_probabilities"].ravel(),
            "advantages": gains.ravel(),
            "returns": (gains + found["values"]).ravel(),
        }
        self.played = {name: array.astype(np.float32) for name, array in flat.items()}
        self.played["actions"] = found["actions"].ravel().astype(np.int64)
        self._kept = {
            "rollout": self.rollout,
            "actors": [asdict(each) for each in self.actors],
            "history": self.history,
            "played": packed(self.played),
        }

    def _rollout(self, number: int) -> dict[str, Floats]:
        """What all actors did, [A, T] of each, as every rank then has it."""
        assert self._play is not None, "who asks for batches plays"
        play, settings = self._play, self._settings
        mine = range(play.part, settings.actors, play.num_parts)
        here = {actor: self._place(actor) for actor in mine}
        self._standing.clear()  # nobody goes on from there if this does not come to its end
        width = settings.num_observations
        shape = (settings.actors, settings.rollout_steps)
        names = ("actions", "log_probabilities", "values", "rewards", "terminated", "truncated")
        found = {name: np.zeros(shape) for name in names}
        found |= {name: np.zeros((*shape, width)) for name in ("observations", "after")}
        draws = {a: np.random.default_rng((self.seed, number, a)).random(shape[1]) for a in mine}
        episodes = {actor: self.actors[actor].episode for actor in mine}
        for step in range(shape[1]):
            if step % _TOLD_STEPS == 0:
                play.tell(f"playing rollout {number + 1}", step / shape[1])
            seen = np.zeros((settings.actors, width), dtype=np.float32)
            for actor in mine:
                seen[actor] = here[actor][1]
            logs, values = self._policy(seen)
            for actor in mine:
                environment, at = here[actor][0], (actor, step)
                action = choose(logs[actor], draws[actor][step])
                after, reward, terminated, truncated = environment.step(action)
                row = (action, logs[actor, action], values[actor], reward, terminated, truncated)
                for name, value in zip(names, row):
                    found[name][at] = value
                found["observations"][at], found["after"][at] = seen[actor], after
                if terminated or truncated:
                    episodes[actor] += 1
                    after = environment.reset(self._start(actor, episodes[actor]))
                here[actor] = (environment, after)
        whole = play.together(found)
        self._standing.update(here)
        return whole

    def _values_after(self, found: Mapping[str, Floats], ended: Array) -> Floats:
        """The value of what each action led to [A, T]; of the policy where nothing follows."""
        values = np.concatenate([found["values"][:, 1:], np.zeros((len(ended), 1))], axis=1)
        asked = found["truncated"] > 0
        asked[:, -1] = True
        asked &= found["terminated"] == 0
        rows, count = np.argwhere(asked), len(ended)
        for first in range(0, len(rows), count):
            some = rows[first : first + count]
            seen = np.zeros((count, found["after"].shape[-1]), dtype=np.float32)
            seen[: len(some)] = found["after"][some[:, 0], some[:, 1]]
            values[some[:, 0], some[:, 1]] = self._policy(seen)[1][: len(some)]
        return values

    def _stand(self, found: Mapping[str, Floats], ended: Array) -> None:
        """Note where all actors are now, and what their episodes came to."""
        totals = []
        for number, actor in enumerate(self.actors):
            for step in range(self._settings.rollout_steps):
                actor.total += float(found["rewards"][number, step])
                actor.actions.append(int(found["actions"][number, step]))
                if ended[number, step]:
                    totals.append(actor.total)
                    actor = self.actors[number] = Actor(actor.episode + 1)
        if totals:
            self.history.append([self.num_played, sum(totals) / len(totals)])

    def _place(self, number: int) -> tuple[Environment, NDArray[np.float32]]:
        """An actor's environment and what it sees now, played again where it is not at hand."""
        if number not in self._standing:
            environment, actor = Environment(self._settings.environment), self.actors[number]
            seen = environment.reset(self._start(number, actor.episode))
            for action in actor.actions:
                seen = environment.step(action)[0]
            self._standing[number] = (environment, seen)
        return self._standing[number]

    def _start(self, actor: int, episode: int) -> int:
        """The number that an environment is reset with."""
        return int(self._starts.at(episode, Share(actor, actor + 1))["episodes"][0])


def advantages_of(
    rewards: Floats,
    values: Floats,
    values_after: Floats,
    *,
    terminated: Array,
    ended: Array,
    gamma: float,
    gae_lambda: float,
) -> Floats:
    """Generalised advantage estimates (Schulman et al., arXiv 1506.02438, equation 16) [A, T].

    `values_after`: of what each action led to, also where the episode was cut off there; nothing is
    worth anything where it `terminated`. `ended`: either of these; what follows is another episode.
    """
    errors = rewards + gamma * np.where(terminated, 0.0, values_after) - values
    gains, gain = np.zeros_like(errors), np.zeros(len(errors))
    for step in reversed(range(errors.shape[1])):
        gain = errors[:, step] + gamma * gae_lambda * np.where(ended[:, step], 0.0, gain)
        gains[:, step] = gain
    return gains


def returns_of(
    environment: str,
    starts: Sequence[int],
    act: Callable[[NDArray[np.float32]], Array],
    *,
    still: Callable[[bool], bool] = bool,
    tell: Callable[[int], None] = lambda steps: None,
) -> Floats:
    """The sum of rewards of the episodes that begin with `starts`, all played at once [B].

    `act`: observations [B, N] -> actions [B]; of an episode that is over they are zeros. `still`:
    whether others want another call of it.
    """
    places = [Environment(environment) for _ in starts]
    shape = (len(starts), (places or [Environment(environment)])[0].num_observations)
    seen, totals = np.zeros(shape, dtype=np.float32), np.zeros(len(starts))
    for number, (place, start) in enumerate(zip(places, starts)):
        seen[number] = place.reset(start)
    playing, steps = set(range(len(starts))), 0
    while still(bool(playing)):
        if steps % _TOLD_STEPS == 0:
            tell(steps)
        actions, steps = act(seen), steps + 1
        for number in sorted(playing):
            after, reward, terminated, truncated = places[number].step(int(actions[number]))
            totals[number] += reward
            seen[number] = 0.0 if terminated or truncated else after
            if terminated or truncated:
                playing.remove(number)
    return totals
