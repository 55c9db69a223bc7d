"""Talking to a model folder by its chat template: one conversation, answers as they are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import ModelError
from shoal.serve.generate import end_tokens, generated, room
from shoal.serve.reading import model_directory, read_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
        self._model = read_model(self._folder, auto_class="AutoModelForCausalLM")
        self._ends = end_tokens(self._folder, self._model.config)
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
        streamer = _Streamer(self._tokenizer, show=show)
        made = generated(
            self._model,
            ids=ids,
            tokens=min(tokens, room(self._model.config, taken=len(ids))),
            temperature=temperature,
            seed=self._seed + len(said),
            ends=self._ends,
            streamer=streamer,
        )
        answer = str(self._tokenizer.decode(made, skip_special_tokens=True)).strip()
        self.messages = [*said, {"role": "assistant", "content": answer}]
        return answer


class _Streamer:
    """What transformers' `generate` hands each token to; a piece is shown once it is whole."""

    def __init__(self, tokenizer: Tokenizer, *, show: Say) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._show = tokenizer, show
        self._stream = DecodeStream(skip_special_tokens=True)
        self._prompted = self._begun = False

    def put(self, value: Any) -> None:
        """The prompt first, then each token."""
        if not self._prompted:
            self._prompted = True
            return
        for token in value.reshape(-1).tolist():
            piece = self._stream.step(self._tokenizer, token)
            if piece and not self._begun:
                piece = piece.lstrip()
            if piece:
                self._begun = True
                self._show(piece)

    def end(self) -> None:
        """Nothing is kept back."""
