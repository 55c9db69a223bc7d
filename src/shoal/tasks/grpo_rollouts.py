"""Completions of prompts by the model as it is, their rewards and advantages.

What is drawn is keyed by (seed, rollout, sample, completion, place): whoever completes which, the
same is said. A replica that is whole completes them by the engine of serving, whose answers do not
depend on who is computed beside whom. Else the whole row is computed again for each token, and the
prompts of a forward are neighbours in the global batch, so many whatever the layout.

Shapes: P prompts, G completions of each, B rows, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import RunError
from shoal.fields import IGNORED
from shoal.layout import Share
from shoal.splitmix import seed_of, uniform
from shoal.tasks.playing import (
    Array,
    Floats,
    Play,
    Stored,
    Wanted,
    choose,
    log_softmax,
    packed,
    unpacked,
)

_MULTIPLE = 8  # of the positions of a batch
_ROWS = 32  # of a forward, about
_DEVIATION = 1e-4  # added to a group's, as TRL does
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """A prompt's tokens [T] and record; `key` is what is drawn by."""

    prompt: Ints
    record: Mapping[str, Any]
    key: tuple[int, int, int]


@dataclass(frozen=True)
class Made:
    """A prompt's completions: tokens and their log-probabilities [G, T]; lengths, rewards [G]."""

    tokens: Ints
    logs: Floats
    lengths: Ints
    rewards: Floats


@dataclass(frozen=True)
class Sampler:
    """Completes prompts, each `group` times, with at most `tokens` tokens."""

    play: Play
    reward: Callable[[str, Mapping[str, Any]], float]
    group: int
    tokens: int
    end: int | None
    """The token that ends a completion; it belongs to it."""

    @property
    def at_once(self) -> int:
        """Prompts of one forward."""
        return max(1, _ROWS // self.group)

    def complete(
        self, asked: Sequence[Asked | None], *, likeliest: int = 0, what: str | None = None
    ) -> list[Made | None]:
        """Completions of prompts, drawn from the model's own distribution; None of none.

        The last `likeliest` of each group are not drawn. Ranks of one replica call it with as many,
        each with its own. `what` is told meanwhile.
        """
        real = [each for each in asked if each is not None]
        made = self._written(real, likeliest, what)
        if made is None:
            made = []
            for first in range(0, len(asked), self.at_once):
                if what is not None:
                    self.play.tell(what, first / len(asked))
                some = [each for each in asked[first : first + self.at_once] if each is not None]
                made += self._by_whole_rows(some, likeliest)
        found = iter(made)
        return [None if each is None else next(found) for each in asked]

    def _written(
        self, asked: Sequence[Asked], likeliest: int, what: str | None
    ) -> list[Made] | None:
        """By what keeps keys and values, where the play has that."""
        wanted = [
            Wanted(one.prompt.tolist(), seed_of(*one.key), n, n >= self.group - likeliest)
            for one in asked
            for n in range(self.group)
        ]
        written = self.play.write(wanted, tokens=self.tokens, end=self.end, what=what)
        if written is None:
            return None
        tokens = np.zeros((len(wanted), self.tokens), dtype=np.int64)
        logs, lengths = np.zeros(tokens.shape), np.zeros(len(wanted), dtype=np.int64)
        for row, each in enumerate(written):
            lengths[row] = len(each.tokens)
            tokens[row, : lengths[row]], logs[row, : lengths[row]] = each.tokens, each.logs
        return self._made(asked, tokens, logs, lengths)

    def _by_whole_rows(self, asked: Sequence[Asked], likeliest: int) -> list[Made]:
        """Of at most `at_once` prompts; of none, where other ranks of the replica have some."""
        count = self.at_once * self.group
        tokens = np.zeros((count, self.tokens), dtype=np.int64)
        logs, lengths = np.zeros(tokens.shape), np.zeros(count, dtype=np.int64)
        keys = [(seed_of(*one.key), len(one.prompt)) for one in asked]
        ids, before = self._aligned(asked)
        done, place = np.arange(count) >= len(asked) * self.group, 0
        while self.play.still(place < self.tokens and not done.all()):
            chances = log_softmax(self._logits(ids, before))
            said = np.zeros(count, dtype=np.int64)
            for row in np.flatnonzero(~done).tolist() if place < self.tokens else ():
                prompt, which = divmod(row, self.group)
                seed, length = keys[prompt]
                if which >= self.group - likeliest:
                    token = int(chances[row].argmax())
                else:
                    token = choose(chances[row], uniform(seed, which, length + place))
                said[row] = tokens[row, place] = token
                logs[row, place], lengths[row] = chances[row, token], place + 1
                done[row] = token == self.end
            ids, place = np.concatenate([ids, said[:, None]], axis=1), place + 1
        return self._made(asked, tokens, logs, lengths)

    def _made(
        self, asked: Sequence[Asked], tokens: Ints, logs: Floats, lengths: Ints
    ) -> list[Made]:
        """Rows by their prompts, rewarded."""
        rows = [slice(n * self.group, (n + 1) * self.group) for n in range(len(asked))]
        return [
            Made(
                tokens[some],
                logs[some],
                lengths[some],
                self._rewards(one, tokens[some], lengths[some]),
            )
            for one, some in zip(asked, rows)
        ]

    def _aligned(self, asked: Sequence[Asked]) -> tuple[Ints, Ints]:
        """Prompts that end alike, each as often as it is completed; what lies before them [B]."""
        longest = max((len(one.prompt) for one in asked), default=1)
        ids = np.zeros((self.at_once, longest), dtype=np.int64)
        before = np.zeros(self.at_once, dtype=np.int64)
        for number, one in enumerate(asked):
            before[number] = longest - len(one.prompt)
            ids[number, before[number] :] = one.prompt
        return ids.repeat(self.group, axis=0), before.repeat(self.group)

    def _logits(self, ids: Ints, before: Ints) -> NDArray[np.float32]:
        positions = np.arange(ids.shape[1])[None] - before[:, None]
        documents = np.where(positions < 0, -1, 0).astype(np.int32)
        row = {"input_ids": ids, "position_ids": positions.clip(0), "document_ids": documents}
        return self.play.logits(row)

    def _rewards(self, one: Asked, tokens: Ints, lengths: Ints) -> Floats:
        said = [row[:length] for row, length in zip(tokens, lengths)]
        texts = [self.play.text_of(row[row != self.end].tolist()) for row in said]
        return np.array([self.reward(text, one.record) for text in texts])


class Completions:
    """Batches of completions; a step's prompts are the stored ones in their order.

    What one rollout says is learned from in `epochs` steps. A sample is a completion in one of
    them; its id is unique over the run.
    """

    def __init__(self, stored: Stored, *, group: int, epochs: int, sampler: Sampler | None) -> None:
        """`group`: completions of a prompt. `sampler`: None where only the order is asked for."""
        self._stored, self._group, self._epochs = stored, group, epochs
        self._sampler, self._times = sampler, group * epochs
        self.names = stored.names
        self.num_samples = [size * self._times for size in stored.num_samples]
        self.global_batch_samples = stored.global_batch_samples * group
        self.restore({})

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which all prompts were completed, and learned from."""
        return self._stored.steps_per_epoch * self._epochs

    def ids(self, step: int) -> Ints:
        """(source, sample id) of each completion of `step` [P x G, 2]."""
        rollout, again = divmod(step, self._epochs)
        prompts = np.repeat(self._stored.ids(rollout), self._group, axis=0)
        which = np.tile(np.arange(self._group), len(prompts) // self._group)
        own = prompts[:, 1] * self._times + which * self._epochs + again
        return np.stack([prompts[:, 0], own], axis=1)

    def state(self, step: int) -> dict[str, int]:
        """Prompts completed of each source before `step`."""
        return self._stored.state(step // self._epochs)

    def length(self, steps: int) -> str:
        """How many prompts are completed, and how often all of them."""
        rollouts = -(-steps // self._epochs)
        prompts = rollouts * self._stored.global_batch_samples
        return (
            f"{prompts:,} prompts x {self._group} completions = "
            f"{self._stored.length(rollouts)} of the prompts"
        )

    def at(self, step: int, share: Share) -> dict[str, Array]:
        """Rows of tokens [B, T] with labels at completions, log_probabilities and advantages."""
        rollout, again = divmod(step, self._epochs)
        if rollout != self.rollout or not self.played:
            if again:
                raise ValueError(f"step {step} was played by other weights, or is not yet")
            self._next(rollout)
        ids, played = self.ids(step), self.played
        rows = slice(share.start, share.stop)
        longest = int(played["ends"][rows].max(initial=1)) - 1
        length = -(-longest // _MULTIPLE) * _MULTIPLE
        batch = {name: played[name][rows, :length] for name in _ROW}
        return {**batch, "sample_ids": ids[rows, 1].copy(), "source_ids": ids[rows, 0].copy()}

    def kept(self) -> dict[str, Any]:
        """The mean rewards so far; and what was said last, where it is learned from again."""
        return self._kept

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Stand where `kept` says. Raises RunError for what is damaged, or of another batch."""
        self.rollout = int(kept.get("rollout", -1))
        self.history: list[list[float]] = [list(each) for each in kept.get("history", [])]
        """Of each rollout: the step that it is for, and the mean reward."""
        self.played = unpacked(kept.get("played", {}))
        if any(len(each) != self.global_batch_samples for each in self.played.values()):
            raise RunError(
                "the save has completions of another batch than the recipe's\n"
                "    go on with its own train.global_batch_samples"
            )
        self._kept = dict(kept)

    def _next(self, rollout: int) -> None:
        """Complete the prompts of a rollout, each by the ranks of one part."""
        assert self._sampler is not None, "who asks for batches plays"
        play, stored, group = self._sampler.play, self._stored, self._group
        count, ids = stored.global_batch_samples, stored.ids(rollout)
        prompts = stored.at(rollout, Share(0, count))
        width = prompts["prompt_ids"].shape[1] + self._sampler.tokens
        width = -(-width // _MULTIPLE) * _MULTIPLE
        found = {name: np.zeros((count * group, width)) for name in (*_ROW, "ends")}
        found["ends"], rewards = np.zeros(count * group), np.zeros((count, group))
        numbers = self._numbers_of(play.part, play.num_parts)
        asked = [
            None
            if number is None
            else asked_of(prompts, number, key=(stored.seed, rollout, int(ids[number, 1])))
            for number in numbers
        ]
        what = f"completing the prompts of step {rollout + 1}"
        for number, one, made in zip(numbers, asked, self._sampler.complete(asked, what=what)):
            if number is None or one is None or made is None:
                continue
            rewards[number] = made.rewards
            for which in range(group):
                _write(found, number * group + which, one.prompt, made, which)
        found["rewards"] = rewards
        whole = play.together(found)
        rewards = whole.pop("rewards")
        gains = advantages_of(rewards).ravel()
        self.rollout = rollout
        self.history.append([rollout * self._epochs + 1, float(rewards.mean())])
        self.played = {
            name: array.astype(np.float32 if name == "log_probabilities" else np.int64)
            for name, array in whole.items()
        }
        self.played["document_ids"] -= 1
        self.played["labels"][self.played["labels"] == 0] = IGNORED + 1
        self.played["labels"] -= 1
        self.played["advantages"] = np.repeat(gains[:, None], width, axis=1).astype(np.float32)
        self._kept = {"rollout": rollout, "history": self.history}
        if self._epochs > 1:
            self._kept["played"] = packed(self.played)

    def _numbers_of(self, part: int, num_parts: int) -> list[int | None]:
        """Which prompts a part completes, `at_once` neighbours in turn; as many for each part."""
        assert self._sampler is not None, "who asks for batches plays"
        count, some = self._stored.global_batch_samples, self._sampler.at_once
        turns = -(-count // (some * num_parts))
        numbers = [
            (turn * num_parts + part) * some + n for turn in range(turns) for n in range(some)
        ]
        return [n if n < count else None for n in numbers]


_ROW = ("input_ids", "position_ids", "document_ids", "labels", "log_probabilities", "advantages")
"""What a row of a batch has at each of its tokens."""


def _write(found: Mapping[str, Floats], at: int, prompt: Ints, made: Made, which: int) -> None:
    """A prompt with one completion as a row; labels and documents one higher, for 0 is none."""
    said = made.tokens[which, : made.lengths[which]]
    ids = np.concatenate([prompt, said])
    length, first = len(ids) - 1, len(prompt) - 1
    found["input_ids"][at, :length] = ids[:-1]
    found["position_ids"][at, :length] = np.arange(length)
    found["document_ids"][at, :length] = 1
    found["labels"][at, first:length] = said + 1
    found["log_probabilities"][at, first:length] = made.logs[which, : len(said)]
    found["ends"][at] = len(ids)


def advantages_of(rewards: Floats) -> Floats:
    """Rewards [P, G] less their group's mean, over its deviation (of a sample, as TRL has it)."""
    apart: Floats = rewards - rewards.mean(1, keepdims=True)
    return apart / (rewards.std(1, ddof=1, keepdims=True) + _DEVIATION)


def asked_of(batch: Mapping[str, Array], row: int, *, key: tuple[int, int, int]) -> Asked:
    """One of the prompts of a batch."""
    prompt = np.asarray(batch["prompt_ids"][row])
    return Asked(prompt[prompt >= 0], records_of(np.asarray(batch["records"][row])), key)


def records_of(row: Array) -> dict[str, Any]:
    """A record from its bytes; zeros behind them are padding."""
    found: dict[str, Any] = json.loads(bytes(row).rstrip(b"\0") or b"{}")
    return found
