"""The routes. They know text, fields and bodies; nothing of tensors or processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from shoal.serve.http import errors, pooled
from shoal.serve.http.answers import ClientGone, first_of, stream
from shoal.serve.http.completions import Chat, Completion, schema_for
from shoal.serve.http.errors import Refused
from shoal.serve.http.fields import (
    ChatFields,
    ClassifyFields,
    CompletionFields,
    DetokenizeFields,
    EmbeddingFields,
    ScoreFields,
    SwapFields,
    TokenizeFields,
)
from shoal.serve.http.guard import Guard
from shoal.serve.http.service import Service


def make_app(service: Service, *, keys: list[bytes], version: str) -> Any:
    """The ASGI application of a served model."""
    app = FastAPI(title="shoal", version=version, docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)

    async def answered(call: Completion | Chat, request: HttpRequest, streams: bool) -> Response:
        try:
            if not streams:
                return JSONResponse(await call.body(request.is_disconnected))
            lines = await first_of(call.lines(request.is_disconnected))
        except ClientGone:
            return Response(status_code=499)
        return StreamingResponse(stream(lines), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(fields: CompletionFields, request: HttpRequest) -> Response:
        return await answered(Completion(service, fields), request, bool(fields.stream))

    @app.post("/v1/chat/completions")
    async def chat(fields: ChatFields, request: HttpRequest) -> Response:
        call = Chat(service, fields, schema=await schema_for(service, fields))
        return await answered(call, request, bool(fields.stream))

    @app.post("/v1/embeddings")
    async def embeddings(fields: EmbeddingFields) -> Response:
        return JSONResponse(await pooled.embeddings(service, fields))

    @app.post("/classify")
    async def classify(fields: ClassifyFields) -> Response:
        return JSONResponse(await pooled.classes(service, fields))

    @app.post("/score")
    @app.post("/v1/score")
    async def score(fields: ScoreFields) -> Response:
        return JSONResponse(await pooled.scores(service, fields))

    @app.post("/admin/swap")
    async def swap(fields: SwapFields) -> dict[str, Any]:
        folder = None if fields.model is None else Path(fields.model)
        await service.swap(folder, fields.adapters)
        return {"model": str(service.folder), "adapters": service.adapters}

    _add_small(app, service, version=version)
    return Guard(app, keys=keys, limits=service.settings.limits)


def _add_small(app: FastAPI, service: Service, *, version: str) -> None:
    """Routes that compute nothing."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = [service.name, *service.adapters]
        return {"object": "list", "data": [_model(service, each) for each in names]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service, name)

    @app.post("/tokenize")
    async def tokenize(fields: TokenizeFields) -> dict[str, Any]:
        service.check_model(fields.model)
        tokens = service.encode(fields.prompt, special=fields.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.context}

    @app.post("/detokenize")
    async def detokenize(fields: DetokenizeFields) -> dict[str, Any]:
        service.check_model(fields.model)
        vocabulary = int(service.replicas.facts["vocabulary"])
        if any(token >= vocabulary for token in fields.tokens):
            raise Refused(f"tokens: they go from 0 to {vocabulary - 1}", param="tokens")
        text = service.tokenizer.decode(fields.tokens, skip_special_tokens=False)
        return {"prompt": text}

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if service.replicas.healthy() else 503)

    @app.get("/ready")
    async def ready() -> Response:
        return Response(status_code=200 if service.replicas.takes_requests() else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text())

    @app.get("/version")
    async def told_version() -> dict[str, str]:
        return {"version": version, "products": str(service.replicas.facts.get("products", ""))}


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "shoal",
        "root": str(service.name),
        "parent": None if name == service.name else service.name,
        "max_model_len": service.context,
    }
