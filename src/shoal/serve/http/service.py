"""What the routes ask: text to tokens and back, requests to the replicas and their events back."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from shoal.config.serve import ServeSection
from shoal.errors import DataError, UserError
from shoal.serve.grammar import Grammars
from shoal.serve.http.errors import Refused
from shoal.serve.http.fields import Drawn
from shoal.serve.http.metrics import Metrics
from shoal.serve.lately import Lately
from shoal.serve.request import Event, Request, Sampling
from shoal.serve.router import Busy

_MOST_SEED = 2**63


class Replicas(Protocol):
    """Where requests are served (launch/serving.py)."""

    facts: dict[str, Any]
    restarts: int
    lately: Lately

    def submit(self, request: Request, told: Callable[[Event], None]) -> None: ...
    def cancel(self, name: str) -> None: ...
    def healthy(self) -> bool: ...
    def takes_requests(self) -> bool: ...
    def swap(self, folder: Path, adapters: Mapping[str, str]) -> None: ...
    def states(self) -> dict[int, dict[str, Any]]: ...
    def counts(self) -> dict[str, int]: ...
    @property
    def replays(self) -> int: ...


class Service:
    """A model by its name, its tokenizer and template, and the replicas that serve it."""

    def __init__(self, folder: Path, *, settings: ServeSection, replicas: Replicas) -> None:
        """Raises ModelError for a folder without a tokenizer."""
        from shoal.data.tokenize import load_tokenizer

        self.settings, self.replicas = settings, replicas
        self.adapters = dict(settings.adapters)
        self.name = settings.name or folder.resolve().name
        self.tokenizer = load_tokenizer(folder)
        self._read(folder)
        self._grammars: Grammars | None = None
        self.created = int(time.time())
        self.metrics = Metrics(self.name, replicas=replicas)

    def _read(self, folder: Path) -> None:
        from shoal.data.conversations import chat_template_of, special_texts
        from shoal.models.huggingface import read_config
        from shoal.serve.generate import end_tokens
        from shoal.serve.reading import kind_of
        from shoal.tasks.templates import Template

        self.folder = folder
        found = chat_template_of(folder)
        self.template = None if found is None else Template(found[0], tokens=special_texts(folder))
        config: Any = read_config(path=folder)
        self.ends = end_tokens(folder, config)
        self.kind = kind_of(folder)
        self.wants_types = getattr(config, "type_vocab_size", 0) > 1
        self.labels = [str(config.id2label[n]) for n in range(len(config.id2label))]
        self._one_each = config.problem_type == "multi_label_classification"
        self._is_number = config.problem_type == "regression"

    async def swap(self, folder: Path | None, adapters: Mapping[str, str] | None) -> None:
        """Serve another model, or other adapters, under the same name. Raises Refused, ShoalError.

        It must have the same tokenizer: prompts are tokens when they wait.
        """
        from shoal.serve.reading import kind_of, model_directory

        after = self.folder if folder is None else model_directory(folder)
        named = self.adapters if adapters is None else dict(adapters)
        files = [each / "tokenizer.json" for each in (self.folder, after)]
        if not files[1].is_file() or files[0].read_bytes() != files[1].read_bytes():
            raise Refused(
                f"{after}: its tokenizer is another than that of {self.folder}; start a server of "
                "its own for it",
                param="model",
                code="other_tokenizer",
            )
        if kind_of(after) != self.kind:
            raise Refused(f"{after}: it is of another kind than {self.folder}", param="model")
        before = self.adapters
        self.adapters = {name: path for name, path in before.items() if name in named}
        try:
            await asyncio.to_thread(self.replicas.swap, after, named)
        except BaseException:
            self.adapters = before
            raise
        self.adapters = named
        self._read(after)

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer."""
        return int(self.replicas.facts["context"])

    def check_model(self, name: str | None) -> str | None:
        """The adapter that `name` asks for; None: the model itself. Raises Refused."""
        if name in (None, self.name):
            return None
        if name in self.adapters:
            return name
        known = ", ".join([self.name, *self.adapters])
        raise Refused(
            f"there is no model {name!r} here; there is {known}",
            status=404,
            param="model",
            code="model_not_found",
        )

    def not_for(self, route: str) -> Refused:
        """What is said at a route that this kind of model does not serve."""
        routes = {
            "generate": "/v1/chat/completions, /v1/completions, /v1/embeddings and /score",
            "classify": "/classify" + (" and /score" if len(self.labels) == 1 else ""),
            "embed": "/v1/embeddings and /score",
        }
        text = f"{route}: {self.name} is asked at {routes[self.kind]}"
        return Refused(text, param="model", code="wrong_kind_of_model")

    @staticmethod
    def now() -> int:
        """Seconds since 1970."""
        return int(time.time())

    def probabilities(self, logits: Sequence[float]) -> list[float]:
        """Of each class: of a softmax, or each by itself; a regression's number as it is."""
        if self._is_number:
            return list(logits)
        if self._one_each or len(logits) == 1:
            return [0.5 * (1 + math.tanh(each / 2)) for each in logits]
        highest = max(logits)
        weights = [math.exp(each - highest) for each in logits]
        return [each / math.fsum(weights) for each in weights]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def token_text(self, token: int) -> str:
        """One token by itself."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    def chat_prompt(self, messages: Sequence[dict[str, Any]], *, tools: Any) -> list[int]:
        """Tokens of a conversation, up to where its answer begins. Raises Refused."""
        if self.template is None:
            raise Refused(
                f"{self.name} has no chat template, so it holds no conversations; use "
                "/v1/completions",
                param="messages",
                code="no_chat_template",
            )
        told = [_checked(each, number) for number, each in enumerate(messages)]
        try:
            text = self.template.render(told, tools=tools, prompt=True)
        except DataError as error:
            raise Refused(f"messages: {error}", param="messages") from None
        return self.encode(text, special=False)

    def sampling(
        self,
        fields: Drawn,
        *,
        prompt_tokens: int,
        max_tokens: int | None,
        logprobs: int,
        prompt_logprobs: int = -1,
        schema: str | None = None,
    ) -> Sampling:
        """The settings of a request with its limits checked. Raises Refused."""
        if self.kind != "generate":
            raise self.not_for("completions")
        limits = self.settings.limits
        room = self.context - prompt_tokens
        if room < (1 if max_tokens is None else max_tokens):
            raise Refused(
                f"the prompt has {prompt_tokens} tokens and {max_tokens or 'some'} more were asked "
                f"for, but the context is {self.context} tokens; shorten the prompt or max_tokens",
                param="max_tokens" if room > 0 else "prompt",
                code="context_length_exceeded",
            )
        stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        for name, value, most in (
            ("n", fields.n or 1, limits.answers),
            ("logprobs", max(logprobs, 0), limits.logprobs),
            ("stop", len(stops), limits.stop_strings),
            ("stop", max(map(len, stops), default=0), limits.stop_characters),
        ):
            if value > most:
                raise Refused(f"{name}: {value} is more than {most}", param=name)
        seed = secrets.randbits(62) if fields.seed is None else fields.seed % _MOST_SEED
        temperature = 1.0 if fields.temperature is None else fields.temperature
        return Sampling(
            max_tokens=room if max_tokens is None else max_tokens,
            temperature=temperature,
            top_k=max(0, fields.top_k or 0),
            top_p=1.0 if fields.top_p is None else fields.top_p,
            min_p=fields.min_p or 0.0,
            presence_penalty=fields.presence_penalty or 0.0,
            frequency_penalty=fields.frequency_penalty or 0.0,
            repetition_penalty=fields.repetition_penalty or 1.0,
            logit_bias=self._bias(fields.logit_bias or {}),
            seed=seed,
            stop_tokens=(*self.ends, *(fields.stop_token_ids or ())),
            ignore_end=fields.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            schema=schema,
        )

    async def schema(self, schema: str, *, param: str) -> str:
        """A schema that compiles within the limits; empty: any JSON. Raises Refused."""
        limits = self.settings.limits
        if len(schema) > limits.schema_bytes:
            raise Refused(f"{param}: it is larger than {limits.schema_bytes} bytes", param=param)
        if self._grammars is None:
            vocabulary = int(self.replicas.facts["vocabulary"])
            self._grammars = Grammars(self.folder, vocabulary=vocabulary, ends=self.ends)
        try:
            work = asyncio.to_thread(self._grammars.compile, schema)
            await asyncio.wait_for(work, limits.schema_seconds)
        except TimeoutError:
            seconds = limits.schema_seconds
            raise Refused(f"{param}: not compiled within {seconds:g} s", param=param) from None
        except UserError as error:
            raise Refused(f"{param}: {error}", param=param, code="invalid_schema") from None
        return schema

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        vocabulary = int(self.replicas.facts["vocabulary"])
        found = {}
        for key, value in given.items():
            if not key.isdigit() or int(key) >= vocabulary:
                raise Refused(
                    f"logit_bias: {key!r} is not a token; they go from 0 to {vocabulary - 1}",
                    param="logit_bias",
                )
            found[int(key)] = value
        return found

    async def events(self, request: Request) -> AsyncGenerator[Event, None]:
        """Serve one request; leaving the loop early cancels it. Raises Busy and Refused."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def told(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        watch = self.metrics.begin(request)
        limit = self.settings.limits.request_seconds
        try:
            self.replicas.submit(request, told)
        except Busy:
            watch.refused()
            raise
        finish = "abort"
        try:
            async with asyncio.timeout(limit):
                while True:
                    event = await queue.get()
                    watch.saw(event)
                    if event.finish is not None:
                        finish = event.finish
                    if event.finish == "error":
                        raise Refused(event.problem)
                    yield event
                    if event.finish is not None:
                        return
        except TimeoutError:
            raise Refused(f"the answer took longer than {limit:g} s", status=504) from None
        finally:
            watch.end(finish)
            if finish == "abort":
                self.replicas.cancel(request.id)


_ROLES = ("system", "developer", "user", "assistant", "tool")


def _checked(message: dict[str, Any], number: int) -> dict[str, Any]:
    """A message with its parts of text joined. Raises Refused."""
    where = f"messages.{number}"
    if message.get("role") not in _ROLES:
        roles = ", ".join(_ROLES)
        raise Refused(f"{where}.role: expected one of {roles}", param=f"{where}.role")
    content = message.get("content")
    if isinstance(content, list):
        texts = [each.get("text") for each in content if isinstance(each, dict)]
        kinds = {each.get("type") if isinstance(each, dict) else None for each in content}
        if kinds - {"text"} or not all(isinstance(each, str) for each in texts):
            raise Refused(f"{where}.content: only parts of text are read", param=f"{where}.content")
        content = "".join(map(str, texts))
    if content is not None and not isinstance(content, str):
        raise Refused(f"{where}.content: expected text", param=f"{where}.content")
    if content is None and not message.get("tool_calls"):
        raise Refused(f"{where}.content is missing", param=f"{where}.content")
    return {**message, "content": content or ""}
