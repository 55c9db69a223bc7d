"""An answer as its client sees it: text instead of tokens, ended by stop strings too.

Streams and whole answers are made of the same pieces, so they say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.serve.request import Event, Scored
from shoal.serve.text import Decoder, Detokeniser, Stops


@dataclass(frozen=True)
class Piece:
    """What one event added."""

    text: str = ""
    scored: tuple[Scored, ...] = ()
    """Tokens that count, with their scores."""
    prompt: tuple[Scored, ...] = ()
    finish: str | None = None


@dataclass
class Choice:
    """One of the answers to a prompt."""

    tokenizer: Decoder
    prompt: Sequence[int]
    stops: Sequence[str] = ()
    ends: Sequence[int] = ()
    """Tokens that end an answer and are no text."""
    num_tokens: int = 0
    cached_tokens: int = 0
    finish: str | None = None
    _text: Detokeniser = field(init=False)
    _stops: Stops = field(init=False)

    def __post_init__(self) -> None:
        self._text = Detokeniser(self.tokenizer, prompt=self.prompt)
        self._stops = Stops(self.stops)

    def add(self, event: Event) -> Piece:
        """The piece of an event. After a `finish` there is no more, whatever the engine says."""
        if self.finish is not None:
            return Piece()
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        shown, scored = "", []
        for number, each in enumerate(event.tokens):
            self.num_tokens += 1
            scored.append(each)
            last = event.finish == "stop" and number == len(event.tokens) - 1
            if last and each.token in self.ends:
                break  # the end token is no text, also where the tokenizer has some for it
            shown += self._stops.add(self._text.add(each.token))
            if self._stops.stopped:
                self.finish = "stop"
                return Piece(shown, tuple(scored), event.prompt, "stop")
        if event.finish is not None:
            self.finish = event.finish
            shown += self._stops.add(self._text.end())
            if self._stops.stopped:
                self.finish = "stop"
            else:
                shown += self._stops.end()
        return Piece(shown, tuple(scored), event.prompt, self.finish)
