"""The loop of one replica: requests in, steps, events out. No HTTP, no text, no processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from shoal.errors import UserError
from shoal.serve.blocks import Blocks
from shoal.serve.cache import SINK, Span
from shoal.serve.divided import Divided
from shoal.serve.grammar import Following, Grammars
from shoal.serve.request import Counters, Event, Finish, Request, Scored
from shoal.serve.runner import Runner, log_probabilities
from shoal.serve.sampler import choose, top_of
from shoal.serve.scheduler import Chunk, Limits, Plan, View, blocks_for, plan_step
from shoal.serve.speculate import proposals_for


@dataclass(eq=False)
class _Sequence:
    """A request on its way."""

    key: int
    request: Request
    tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    scored_prompt: int = 1
    """Tokens of the prompt whose score was told, or which have none."""
    cached_tokens: int = 0
    guesses: list[int] = field(default_factory=list)
    grammar: Following | None = None
    guessed: int = 0
    taken: int = 0
    """Guessed tokens so far, and those of them that were right."""

    @property
    def made(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)


class Engine:
    """Serves requests by steps; what it answers to one does not depend on the others."""

    def __init__(
        self,
        runner: Runner | Divided,
        *,
        step_tokens: int = 128,
        max_running: int = 64,
        share_prefixes: bool = True,
        most_guesses: int = 0,
        grammars: Callable[[], Grammars] | None = None,
    ) -> None:
        """`step_tokens`: rows of one forward; `most_guesses`: tokens guessed at once, 0: none.

        `grammars`: makes what compiles schemas, when the first is asked for.
        """
        size = runner.cache.block_tokens
        self.runner, self._share, self._most_guesses = runner, share_prefixes, most_guesses
        self.blocks = Blocks(num_blocks=runner.cache.num_blocks, block_tokens=size)
        self._limits = Limits(
            step_tokens, size, self.blocks.num_blocks, min(max_running, step_tokens)
        )
        self._make_grammars = grammars
        self._grammars: Grammars | None = None
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        self._by_id: dict[str, _Sequence] = {}
        self._next = 0
        self.counters = Counters()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._by_id

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_free(self) -> int:
        """Blocks of the cache that can be taken."""
        return self.blocks.num_free

    def facts(self) -> dict[str, Any]:
        """What clients and the server must know."""
        runner = self.runner
        return {
            "kind": "generate",
            "context": self.most_tokens,
            "vocabulary": runner.sizes.vocabulary,
            "blocks": self.blocks.num_blocks,
            "exact": runner.exact,
            "products": str(runner.report) if runner.report else "not exact, as asked",
        }

    @property
    def most_tokens(self) -> int:
        """Of one sequence: the context, or what all blocks hold."""
        held = self.blocks.num_blocks * self.blocks.block_tokens
        return min(self.runner.sizes.context, held)

    def _following(self, request: Request) -> Following | None:
        """The grammar of a request that has a schema. Raises UserError."""
        if request.sampling.schema is None:
            return None
        if self._grammars is None:
            if self._make_grammars is None:
                raise UserError("no tokenizer is known here, so no schema can be followed")
            self._grammars = self._make_grammars()
        return self._grammars.follow(request.sampling.schema, so_far=request.so_far)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises UserError for one that can never be served."""
        sampling, length = request.sampling, len(request.prompt)
        whole = length + (0 if request.pooled else sampling.max_tokens)
        if not length:
            raise UserError("the prompt has no tokens; give at least one")
        if whole > self.most_tokens:
            raise UserError(
                f"the prompt has {length} tokens and {sampling.max_tokens} may be made, but a "
                f"sequence has at most {self.most_tokens} here; shorten one of them"
            )
        vocabulary = self.runner.sizes.vocabulary
        wrong = [t for t in (*request.prompt, *sampling.logit_bias) if not 0 <= t < vocabulary]
        if wrong:
            raise UserError(f"token {wrong[0]} is not one of the model's {vocabulary}")
        if request.adapter is not None and request.adapter not in self.runner.adapters.names:
            raise UserError(f"there is no adapter {request.adapter!r} here")
        if request.id in self._by_id:
            raise UserError(f"request {request.id!r} is being served already")
        sequence = _Sequence(self._next, request, [*request.prompt, *request.so_far])
        sequence.grammar = self._following(request)
        self._next += 1
        self._by_id[request.id] = sequence
        self._waiting.append(sequence)

    def cancel(self, name: str) -> None:
        """Forget a request; its blocks are free at once. One that is gone needs nothing."""
        sequence = self._by_id.pop(name, None)
        if sequence is None:
            return
        self._running.pop(sequence.key, None)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._let_go(sequence)

    def _let_go(self, sequence: _Sequence) -> None:
        self.blocks.release([each for each in sequence.blocks if each != SINK])
        sequence.blocks, sequence.computed = [], 0

    def step(self) -> list[Event]:
        """One forward, and what came of it."""
        found = self._find_prefixes()
        views = [self._view(each) for each in self._running.values()]
        plan = plan_step(
            views,
            [self._waiting_view(each, found) for each in self._waiting],
            free=self.blocks.num_free,
            limits=self._limits,
        )
        self._follow(plan, found)
        if not plan.chunks:
            return []
        return self._compute(plan.chunks)

    def _find_prefixes(self) -> dict[int, list[int]]:
        """Of waiting requests the blocks that hold their beginning."""
        found: dict[int, list[int]] = {}
        for sequence in list(self._waiting)[: self._limits.max_running]:
            request = sequence.request
            wanted = self._share and request.sampling.prompt_logprobs < 0
            found[sequence.key] = (
                self.blocks.match(sequence.tokens, root=request.adapter) if wanted else []
            )
        return found

    def _view(self, sequence: _Sequence) -> View:
        left = len(sequence.tokens) - sequence.computed
        sequence.guesses = []
        if left == 1 and self._most_guesses and not sequence.request.pooled:
            room = sequence.request.sampling.max_tokens - sequence.made - 1
            if sequence.guessed < 16 or 4 * sequence.taken > sequence.guessed:
                sequence.guesses = proposals_for(
                    sequence.tokens, most=min(self._most_guesses, room)
                )
        return View(
            sequence.key,
            len(sequence.tokens),
            sequence.computed,
            len(sequence.blocks),
            self.blocks.num_own(sequence.blocks),
            len(sequence.guesses),
        )

    def _waiting_view(self, sequence: _Sequence, found: dict[int, list[int]]) -> View:
        blocks = found.get(sequence.key, [])
        computed = len(blocks) * self.blocks.block_tokens
        idle = self.blocks.num_idle(blocks)
        return View(sequence.key, len(sequence.tokens), computed, len(blocks), idle)

    def _follow(self, plan: Plan, found: dict[int, list[int]]) -> None:
        """Preempt, admit, and take the blocks that the chunks write to."""
        for key in plan.preempted:
            sequence = self._running.pop(key)
            self._let_go(sequence)
            self._waiting.appendleft(sequence)
            self.counters.preemptions += 1
        for key in plan.admitted:
            sequence = self._waiting.popleft()
            assert sequence.key == key, "the head of the queue is let in first"
            blocks = found.get(key, [])
            self.blocks.share(blocks)
            more = blocks_for(len(sequence.tokens), self.blocks.block_tokens) - len(blocks)
            sequence.blocks = [*blocks, *self.blocks.take(more)]
            sequence.computed = len(blocks) * self.blocks.block_tokens
            sequence.cached_tokens = max(sequence.cached_tokens, sequence.computed)
            self.counters.prefix_queries += len(sequence.tokens)
            self.counters.prefix_hits += sequence.computed
            self._running[key] = sequence
        for chunk in plan.chunks:
            sequence = self._running[chunk.key]
            sequence.guesses = sequence.guesses[: chunk.proposals]
            end = chunk.start + chunk.count
            more = blocks_for(end, self.blocks.block_tokens) - len(sequence.blocks)
            sequence.blocks += self.blocks.take(max(0, more))

    def _compute(self, chunks: Sequence[Chunk]) -> list[Event]:
        tokens: list[int] = []
        spans: list[Span] = []
        wanted: list[int] = []
        rows: list[range] = []
        for chunk in chunks:
            sequence = self._running[chunk.key]
            known = [*sequence.tokens, *sequence.guesses]
            first = len(tokens)
            tokens += known[chunk.start : chunk.start + chunk.count]
            spans.append(Span(chunk.start, chunk.count, tuple(sequence.blocks)))
            columns = self._columns(sequence, chunk)
            rows.append(range(len(wanted), len(wanted) + len(columns)))
            wanted += [first + at for at in columns]
        names = [self._running[chunk.key].request.adapter for chunk in chunks]
        hidden = self.runner.hidden(tokens, spans, wanted, adapters=names)
        scored = [
            number
            for chunk, own in zip(chunks, rows)
            if not self._running[chunk.key].request.pooled
            for number in own
        ]
        logits = self.runner.logits(hidden[scored]) if scored else hidden.new_empty(0, 1).float()
        place = {number: at for at, number in enumerate(scored)}
        self.counters.steps += 1
        events: list[Event] = []
        for chunk, own in zip(chunks, rows):
            sequence = self._running[chunk.key]
            before = sequence.computed
            sequence.computed = chunk.start + chunk.count
            self._remember(sequence, before, chunk)
            self._drop_unseen(sequence, chunk)
            if sequence.request.pooled:
                events += self._pooled(sequence, hidden[own.start : own.stop])
            else:
                first = place[own.start] if own else 0  # what is wanted of one is side by side
                events += self._after(sequence, chunk, logits[first : first + len(own)])
        return events

    @staticmethod
    def _columns(sequence: _Sequence, chunk: Chunk) -> list[int]:
        """Which of a chunk's tokens the logits after are wanted of."""
        end = chunk.start + chunk.count
        if sequence.request.sampling.prompt_logprobs >= 0:
            first = max(0, sequence.scored_prompt - 1 - chunk.start)
            last = end >= len(sequence.tokens)
            inside = min(chunk.count, len(sequence.request.prompt) - 1 - chunk.start)
            return list(range(first, chunk.count if last else max(first, inside)))
        if end < len(sequence.tokens):
            return []
        return list(range(chunk.count - 1 - chunk.proposals, chunk.count))

    def _remember(self, sequence: _Sequence, before: int, chunk: Chunk) -> None:
        """Blocks that became full with tokens that are certain may be shared."""
        self.counters.prompt_tokens += max(
            0, min(sequence.computed, len(sequence.request.prompt)) - before
        )
        size = self.blocks.block_tokens
        certain = min(sequence.computed - chunk.proposals, len(sequence.tokens))
        for number in range(before // size, certain // size if self._share else 0):
            self.blocks.remember(
                sequence.blocks, number, sequence.tokens, root=sequence.request.adapter
            )

    def _drop_unseen(self, sequence: _Sequence, chunk: Chunk) -> None:
        """Blocks that no layer looks back at any more are free."""
        window = self.runner.sizes.window
        if window is None:
            return
        sure = min(sequence.computed, chunk.start + chunk.count - chunk.proposals)
        for number in range(max(0, sure + 1 - window) // self.blocks.block_tokens):
            if sequence.blocks[number] != SINK:
                self.blocks.release([sequence.blocks[number]])
                sequence.blocks[number] = SINK

    def _pooled(self, sequence: _Sequence, hidden: Tensor) -> Iterator[Event]:
        if sequence.computed < len(sequence.tokens):
            return
        values = tuple(hidden[-1].float().tolist())
        self._finish(sequence)
        yield Event(
            id=sequence.request.id,
            hidden=values,
            finish="stop",
            cached_tokens=sequence.cached_tokens,
        )

    def _after(self, sequence: _Sequence, chunk: Chunk, logits: Tensor) -> Iterator[Event]:
        """What the logits after a chunk's wanted tokens say."""
        request, sampling = sequence.request, sequence.request.sampling
        scores: list[Scored] = []
        wants = max(sampling.logprobs, sampling.prompt_logprobs) >= 0
        rows = logits.cpu().numpy()
        logprobs = log_probabilities(logits).cpu().numpy() if wants else rows
        at = 0
        if sampling.prompt_logprobs >= 0:
            while at < len(logits) and sequence.scored_prompt < len(request.prompt):
                token = request.prompt[sequence.scored_prompt]
                scores.append(_scored(logprobs[at], token, sampling.prompt_logprobs))
                sequence.scored_prompt += 1
                at += 1
        if sequence.computed < len(sequence.tokens):
            if scores:
                yield Event(id=request.id, prompt=tuple(scores))
            return
        if sampling.max_tokens == 0:
            self._finish(sequence)
            yield Event(id=request.id, prompt=tuple(scores), finish="length")
            return
        made, finish = self._chosen(sequence, chunk, rows[at:], logprobs[at:])
        index = sequence.made - len(made)
        if finish is not None:
            self._finish(sequence)
        yield Event(
            id=request.id,
            index=index,
            tokens=tuple(made),
            prompt=tuple(scores),
            finish=finish,
            cached_tokens=sequence.cached_tokens,
        )

    def _chosen(
        self, sequence: _Sequence, chunk: Chunk, rows: np.ndarray, logprobs: np.ndarray
    ) -> tuple[list[Scored], Finish | None]:
        """Tokens that are certain now: one, and one more for each guess that it confirms."""
        request, sampling = sequence.request, sequence.request.sampling
        base, made = len(sequence.tokens), []
        guesses = sequence.guesses
        finish: Finish | None = None
        for number, row in enumerate(rows):
            token = choose(
                row,
                sampling=sampling,
                position=len(sequence.tokens),
                prompt=request.prompt,
                made=sequence.tokens[len(request.prompt) :],
                allowed=None if sequence.grammar is None else sequence.grammar.allowed(),
            )
            if sequence.grammar is not None:
                sequence.grammar.accept(token)
            sequence.tokens.append(token)
            made.append(_scored(logprobs[number], token, sampling.logprobs))
            finish = self._ended(sequence, token)
            right = number < len(guesses) and guesses[number] == token
            if finish is not None or not right:
                break
        if chunk.proposals:
            sequence.computed = base + len(made) - 1  # what was guessed wrong is computed anew
            sequence.guessed += chunk.proposals
            sequence.taken += len(made) - 1
            self.counters.guessed_tokens += chunk.proposals
            self.counters.taken_tokens += len(made) - 1
        self.counters.made_tokens += len(made)
        return made, finish

    @staticmethod
    def _ended(sequence: _Sequence, token: int) -> Finish | None:
        sampling = sequence.request.sampling
        if token in sampling.stop_tokens and not sampling.ignore_end:
            return "stop"
        if sequence.grammar is not None and sequence.grammar.ended:
            return "stop"
        return "length" if sequence.made >= sampling.max_tokens else None

    def _finish(self, sequence: _Sequence) -> None:
        self._running.pop(sequence.key)
        self._by_id.pop(sequence.request.id)
        self._let_go(sequence)


def _scored(row: np.ndarray, token: int, count: int) -> Scored:
    if count < 0:
        return Scored(token, 0.0)
    return Scored(token, float(row[token]), top_of(row, count))
