"""The settings of `shoal serve`: how a model is served, and what a client may ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from shoal.config.section import Auto, Count, Rate, Section
from shoal.config.yaml_text import parse
from shoal.errors import ConfigError, Problem, UserError, nearest

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
OF_EVERY_ENGINE = frozenset(
    {"engine", "program", "arguments", "name", "host", "port", "keys"}
    | {"replicate", "threads", "limits"}
)
"""Settings that mean something whoever computes."""
_LIMITS_OF_EVERY = frozenset({"body_bytes", "body_seconds"})


class Limits(Section):
    """Most that one request may ask for; beyond it the answer is an error that names the field."""

    body_bytes: Count = 4 << 20
    answers: Count = 16
    """`n`."""
    logprobs: Annotated[int, Field(ge=0)] = 20
    stop_strings: Count = 8
    stop_characters: Count = 256
    schema_bytes: Count = 65536
    schema_seconds: Rate = 5.0
    """To compile a schema."""
    body_seconds: Rate = 30.0
    """For a client to send its body."""
    request_seconds: Rate | None = None
    """For a whole answer; None: no limit."""


class ServeSection(Section):
    """How a model is served."""

    name: str | None = None
    """What clients call the model; None: the name of its folder."""
    host: str = "127.0.0.1"
    """Any other address than loopback needs `keys`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0: any free one."""
    keys: str | None = None
    """A file with one API key per line; None: whoever reaches the port is served."""
    replicate: Count | Auto = "auto"
    """Replicas, each a process with a copy of the model; auto: timed at the first start."""
    threads: Count | Auto = "auto"
    """Cores that one replica computes with; auto: what is fastest, or all, divided by replicas."""
    tensor: Count = 1
    """Ranks that hold a part of every layer of one replica: threads of its process."""
    pieces: Count | Auto = "auto"
    """Of sums over a layer's inputs, added in order: an answer has the same bits under every
    `tensor` that divides them. auto: as many as `tensor`."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of weights, products and the cache."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where torch has it, else the CPU. Replicas take the devices by turns."""
    weights: Literal["full", "int8"] = "full"
    """int8: the layers' products have weights and rows of whole numbers of 8 bits; a quarter of the
    bytes to read, and exact."""
    exact: Literal["auto", "off"] = "auto"
    """auto: products in which the probe sees no bit depend on who else is served."""
    block_tokens: Annotated[int, Field(ge=32, le=512, multiple_of=32)] = 64
    """Tokens of a block of the cache."""
    cache_bytes: Count | Auto = "auto"
    """Of each replica's cache; auto: 16 sequences of the model's context, at most 2 GiB."""
    step_tokens: Count = 128
    """Rows of one forward: what is made, and parts of prompts beside it."""
    max_running: Count = 64
    """Requests that one replica works on at once."""
    queue_requests: Count = 256
    """Requests that may wait; further ones are told to come again (429)."""
    queue_tokens: Count = 1 << 20
    """Tokens that may wait."""
    share_prefixes: bool = True
    """Keep blocks for requests that begin alike."""
    guesses: Annotated[int, Field(ge=0, le=16)] = 4
    """Tokens guessed from the text so far and checked in one step; 0: none."""
    record: str | None = None
    """A folder for what `shoal page` shows of the server: counts and times, no texts."""
    silence_seconds: Rate = 10.0
    """A replica that has work and says nothing for so long, and 15 times as long as its steps
    take, is taken for stuck: it is ended, and what it was doing is done by another."""
    adapters: Mapping[str, str] = Field(default_factory=dict)
    """LoRA adapters by the name that clients ask for: folders in peft's format."""
    limits: Limits = Limits()
    engine: Literal["shoal", "vllm", "llamacpp"] = "shoal"
    """Whose engine answers. Another's runs in processes of its own, from its own environment, and
    is passed on to; that its answers do not depend on company is then not proved."""
    program: str | None = None
    """Of another engine: its program; None: `vllm` or `llama-server`, as PATH has it."""
    arguments: tuple[str, ...] = ()
    """Of another engine: what its program is given besides model, name, address and threads."""

    @model_validator(mode="after")
    def _of_another_engine(self) -> ServeSection:
        given = set(self.model_fields_set)
        if self.engine == "shoal":
            if idle := sorted(given & {"program", "arguments"}):
                raise ValueError(f"{idle[0]} is of another engine; set engine, or leave it out")
            return self
        idle = sorted(given - OF_EVERY_ENGINE)
        idle += [f"limits.{k}" for k in sorted(self.limits.model_fields_set - _LIMITS_OF_EVERY)]
        if idle:
            raise ValueError(
                f"engine {self.engine} takes no {idle[0]}: {self.engine} decides that itself; "
                "leave it out, or give what its program has for it in `arguments`"
            )
        return self

    @property
    def sum_pieces(self) -> int:
        """`pieces` as a number."""
        return self.tensor if self.pieces == "auto" else self.pieces

    @model_validator(mode="after")
    def _divided(self) -> ServeSection:
        pieces = self.sum_pieces
        if pieces % self.tensor:
            raise ValueError(
                f"tensor: {self.tensor} does not divide pieces: {pieces}, so no rank has whole "
                "pieces; give a multiple of it, or leave pieces out"
            )
        if pieces > 1 and self.exact == "off":
            raise ValueError("exact: off goes with tensor: 1 and pieces: 1; leave exact at auto")
        if pieces > 1 and self.adapters:
            raise ValueError("adapters are served whole; leave tensor and pieces at 1")
        return self

    @model_validator(mode="after")
    def _safe(self) -> ServeSection:
        if self.weights == "int8" and (self.precision != "float32" or self.exact == "off"):
            raise ValueError(
                "weights: int8 goes with precision: float32 and exact: auto; leave them at that"
            )
        if self.host not in _LOOPBACK and self.keys is None:
            raise ValueError(
                f"host {self.host} can be reached by others: give `keys`, a file with one API key "
                "per line, or serve on 127.0.0.1"
            )
        return self


def serve_settings(
    overrides: Iterable[str], *, tree: Mapping[str, Any] | None = None
) -> ServeSection:
    """Settings from a `serve:` section and KEY=VALUE overrides. Raises ConfigError."""
    content: dict[str, Any] = dict(tree or {})
    problems: list[Problem] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        path = key.strip().removeprefix("serve.").split(".")
        if not equals or not path[0]:
            problems.append(Problem(text[:60], "expected key=value, such as replicate=2"))
            continue
        try:
            value = parse(raw) if raw.strip() else None
        except (yaml.YAMLError, UserError):
            problems.append(Problem(key, f"{raw[:60]!r} is not a valid value"))
            continue
        here = content
        for part in path[:-1]:
            below = here.get(part)
            here[part] = dict(below) if isinstance(below, Mapping) else {}
            here = here[part]
        here[path[-1]] = value
    if problems:
        raise ConfigError(problems, source="the overrides")
    try:
        return ServeSection.model_validate(content)
    except ValidationError as error:
        raise ConfigError([_problem(each) for each in error.errors()], source="serve") from None


def _problem(detail: Any) -> Problem:
    where = ".".join(["serve", *map(str, detail["loc"])])
    if detail["type"] == "extra_forbidden":
        known = Limits.model_fields if len(detail["loc"]) > 1 else ServeSection.model_fields
        return Problem(where, "unknown key", nearest(str(detail["loc"][-1]), known))
    got = "" if detail["type"] == "value_error" else f", got {str(detail['input'])[:60]!r}"
    return Problem(where, detail["msg"].removeprefix("Value error, ") + got)
