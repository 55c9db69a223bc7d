"""Talking to a model folder by its chat template: one conversation, answers as they are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shoal.errors import ModelError
from shoal.serve.generate import end_tokens, room, writer_of
from shoal.serve.reading import model_directory
from shoal.serve.text import Detokeniser

Say = Callable[[str], None]


class Conversation:
    """A model, and what was said so far."""

    def __init__(
        self, path: Path, *, system: str | None = None, seed: int = 0, say: Say = lambda phase: None
    ) -> None:
        """Read the folder. Raises ModelError, also for one without a chat template."""
        from shoal.data.conversations import chat_template_of, special_texts
        from shoal.data.tokenize import load_tokenizer
        from shoal.tasks.templates import Template

        self._folder = model_directory(path)
        found = chat_template_of(self._folder)
        if found is None:
            raise ModelError(
                f"{self._folder}: it has no chat template, so it does not know who speaks\n"
                "    train it on conversations (task.kind=chat), or use shoal generate"
            )
        say(f"reading {self._folder}")
        self._tokenizer = load_tokenizer(self._folder)
        self._template = Template(found[0], tokens=special_texts(self._folder))
        self._writer = writer_of(self._folder)
        self._ends = end_tokens(self._folder, self._writer.config)
        self._system, self._seed = system, seed
        self.messages: list[dict[str, str]] = []
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, text: str, *, tokens: int, temperature: float, show: Say) -> str:
        """What the model says to `text`; `show` gets it piece by piece. Kept in `messages`.

        Raises UserError when the conversation has grown too long for the model, and DataError when
        its template refuses it.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        shown = self._template.render(said, prompt=True)
        ids = self._tokenizer.encode(shown, add_special_tokens=False).ids
        pieces = _Shown(Detokeniser(self._tokenizer, prompt=ids), show=show)
        made = self._writer.write(
            ids,
            tokens=min(tokens, room(self._writer.config, taken=len(ids))),
            temperature=temperature,
            seed=self._seed + len(said),
            ends=self._ends,
            told=pieces.add,
        )
        pieces.end()
        answer = str(self._tokenizer.decode(made, skip_special_tokens=True)).strip()
        self.messages = [*said, {"role": "assistant", "content": answer}]
        return answer


class _Shown:
    """Hands an answer's text on as it comes, without blanks before its first word."""

    def __init__(self, text: Detokeniser, *, show: Say) -> None:
        self._text, self._show, self._begun = text, show, False

    def add(self, token: int) -> None:
        """One token more."""
        self._piece(self._text.add(token))

    def end(self) -> None:
        """What was held back."""
        self._piece(self._text.end())

    def _piece(self, piece: str) -> None:
        if not self._begun:
            piece = piece.lstrip()
        if piece:
            self._begun = True
            self._show(piece)
