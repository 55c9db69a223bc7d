"""Routes whose answer is numbers: embeddings, classes of texts, scores of pairs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import struct
import uuid
from collections.abc import Sequence
from typing import Any

from shoal.serve.http.errors import Refused
from shoal.serve.http.fields import ClassifyFields, EmbeddingFields, ScoreFields
from shoal.serve.http.service import Service
from shoal.serve.request import Request, Sampling

Encoded = tuple[list[int], list[int]]
"""Tokens, and which of two texts each is of (empty where the model does not ask)."""


async def embeddings(service: Service, fields: EmbeddingFields) -> dict[str, Any]:
    """A vector of length 1 for each input, in OpenAI's form. Raises Refused."""
    _want(service, "generate", "embed", route="/v1/embeddings")
    given: Any = fields.input
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    prompts = [
        _encoded(service, each) if isinstance(each, str) else (list(each), []) for each in given
    ]
    found = await _asked(service, prompts, adapter=service.check_model(fields.model))
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _as_base64(values) if fields.encoding_format == "base64" else values,
        }
        for index, values in enumerate(map(_of_length_one, found))
    ]
    return {"object": "list", "data": data, "model": fields.model, "usage": _used(prompts)}


async def classes(service: Service, fields: ClassifyFields) -> dict[str, Any]:
    """The likeliest class of each text and the probabilities of all, in vLLM's form."""
    _want(service, "classify", route="/classify")
    texts = [fields.input] if isinstance(fields.input, str) else fields.input
    service.check_model(fields.model)
    prompts = [_encoded(service, each) for each in texts]
    data = []
    for index, logits in enumerate(await _asked(service, prompts)):
        probabilities = service.probabilities(logits)
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        data.append(
            {
                "index": index,
                "label": service.labels[best],
                "probs": probabilities,
                "num_classes": len(probabilities),
            }
        )
    return _listed(service, "classify", data, prompts)


async def scores(service: Service, fields: ScoreFields) -> dict[str, Any]:
    """Of each pair of texts the score of a cross-encoder, or the cosine of their embeddings."""
    _want(service, "classify", "embed", "generate", route="/score")
    adapter = service.check_model(fields.model)
    left = [fields.text_1] if isinstance(fields.text_1, str) else fields.text_1
    right = [fields.text_2] if isinstance(fields.text_2, str) else fields.text_2
    pairs = list(zip(left * (len(right) if len(left) == 1 else 1), right, strict=True))
    if service.kind == "classify":
        if len(service.labels) != 1:
            raise Refused(
                f"/score: {service.name} has {len(service.labels)} classes; a model that scores "
                "pairs has one output. Use /classify",
                param="model",
            )
        prompts = [_encoded(service, first, second) for first, second in pairs]
        found = [service.probabilities(each)[0] for each in await _asked(service, prompts)]
    else:
        texts = list(dict.fromkeys([*left, *right]))
        prompts = [_encoded(service, each) for each in texts]
        made = await _asked(service, prompts, adapter=adapter)
        vectors = dict(zip(texts, map(_of_length_one, made), strict=True))
        found = [
            math.fsum(a * b for a, b in zip(vectors[first], vectors[second], strict=True))
            for first, second in pairs
        ]
    data = [{"index": at, "object": "score", "score": each} for at, each in enumerate(found)]
    return _listed(service, "score", data, prompts)


def _want(service: Service, *kinds: str, route: str) -> None:
    if service.kind not in kinds:
        raise service.not_for(route)


def _encoded(service: Service, text: str, other: str | None = None) -> Encoded:
    found = service.tokenizer.encode(text, other)
    types = list(found.type_ids) if service.wants_types else []
    return list(found.ids), types


async def _asked(
    service: Service, prompts: Sequence[Encoded], *, adapter: str | None = None
) -> list[tuple[float, ...]]:
    """The numbers of each prompt."""

    async def one(tokens: list[int], types: list[int]) -> tuple[float, ...]:
        request = Request(
            id=uuid.uuid4().hex,
            prompt=tuple(tokens),
            sampling=Sampling(max_tokens=0),
            adapter=adapter,
            pooled=True,
            types=tuple(types),
        )
        async with contextlib.aclosing(service.events(request)) as events:
            async for event in events:
                if event.hidden:
                    return event.hidden
        raise Refused("nothing was computed", status=500)

    return list(await asyncio.gather(*(one(*each) for each in prompts)))


def _listed(
    service: Service, kind: str, data: list[dict[str, Any]], prompts: Sequence[Encoded]
) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": service.now(),
        "model": service.name,
        "data": data,
        "usage": {**_used(prompts), "completion_tokens": 0, "prompt_tokens_details": None},
    }


def _used(prompts: Sequence[Encoded]) -> dict[str, int]:
    count = sum(len(tokens) for tokens, _ in prompts)
    return {"prompt_tokens": count, "total_tokens": count}


def _of_length_one(values: tuple[float, ...]) -> list[float]:
    length = sum(value * value for value in values) ** 0.5 or 1.0
    return [value / length for value in values]


def _as_base64(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
