"""What a client may send: the fields of OpenAI's interface that are served, and some of vLLM's.

A field that is not here is an error with its name: nothing is ignored silently.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Number = Annotated[float, Field(allow_inf_nan=False)]
Stop = str | list[str] | None
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(_Fields):
    """What a stream says besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Drawn(_Fields):
    """Settings that completions and chats have alike."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    user: str | None = None
    """Accepted; it changes nothing."""
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _streams(self) -> Drawn:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self


class CompletionFields(Drawn):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1)]
    )
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None


class JsonSchema(_Fields):
    """A schema with its name."""

    name: str = "schema"
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Fields):
    """How an answer must look."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(_Fields):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Fields):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Fields):
    """Which function must be called."""

    name: str


class NamedTool(_Fields):
    """Which tool must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatFields(Drawn):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class EmbeddingFields(_Fields):
    """POST /v1/embeddings."""

    model: str
    input: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


Texts = str | Annotated[list[str], Field(min_length=1)]


class ClassifyFields(_Fields):
    """POST /classify, as vLLM has it."""

    model: str
    input: Texts
    user: str | None = None


class ScoreFields(_Fields):
    """POST /score, as vLLM has it: one text beside one or many, or as many beside as many."""

    model: str
    text_1: Texts
    text_2: Texts
    user: str | None = None

    @model_validator(mode="after")
    def _pairs(self) -> ScoreFields:
        left, right = (
            1 if isinstance(each, str) else len(each) for each in (self.text_1, self.text_2)
        )
        if left not in (1, right):
            raise ValueError("text_1 is one text, or as many as text_2 has")
        return self


class SwapFields(_Fields):
    """POST /admin/swap: what is served from now on; what is left out stays."""

    model: str | None = None
    """A model folder on the server's machine."""
    adapters: dict[str, str] | None = None


class TokenizeFields(_Fields):
    """POST /tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeFields(_Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


KNOWN = sorted(
    {
        *CompletionFields.model_fields,
        *ChatFields.model_fields,
        *EmbeddingFields.model_fields,
        *ScoreFields.model_fields,
    }
)
"""Names that errors propose."""
