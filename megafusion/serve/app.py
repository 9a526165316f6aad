"""The routes of a server."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.serve.answers import Chat
from megafusion.serve.bodies import (
    ChatBody,
    ImageBody,
    Reader,
    is_image_field,
    read_form_value,
    read_json,
)
from megafusion.serve.config import ServeConfig
from megafusion.serve.drawings import Drawings
from megafusion.serve.errors import Refusal
from megafusion.serve.gate import Gate
from megafusion.serve.metrics import Metrics
from megafusion.serve.worker import Worker

MAX_FIELDS = 100
"""Fields of a form."""


class _EventStream(StreamingResponse):
    """Server-sent events, whose generation ends when they are not sent to their end."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]):
        super().__init__(events, headers={"cache-control": "no-store"})

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


def make_app(pipeline: TransfusionPipeline, config: ServeConfig, name: str, keys: Sequence[str]) -> FastAPI:
    """The application of a pipeline. name: of the model. keys: one of which each request must bear, if any.

    `app.state.worker` generates, from the application's start to its end.
    """
    worker = Worker(pipeline, config, Metrics())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.end)

    app = FastAPI(title="megafusion", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker = worker
    app.add_middleware(Gate, worker=worker, config=config, keys=keys)
    app.add_exception_handler(Refusal, lambda _, error: error.response())
    app.add_exception_handler(UserError, lambda _, error: Refusal(400, str(error)).response())
    app.add_exception_handler(Exception, lambda _, error: Refusal(500, f"{type(error).__name__}").response())
    app.add_exception_handler(
        HTTPException, lambda _, error: Refusal(error.status_code, error.detail, error.headers).response()
    )
    _add_state_routes(app, worker, name)
    _add_generating_routes(app, worker, Reader(pipeline, config, name))
    routes = [route for route in app.routes if isinstance(route, Route)]
    for path in ("/v1{rest:path}", "/health", "/metrics"):  # before a page's, which takes all others
        app.router.routes.append(Route(path, _NoRoute(routes)))
    return app


class _NoRoute:
    """ASGI application that refuses what no route of the API answers: other paths, and other methods."""

    def __init__(self, routes: Sequence[Route]):
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = f"{scope['method']} {scope['path']:.80}"
        known = [route for route in self.routes if route.path_regex.match(scope["path"])]
        if known:
            methods = ", ".join(sorted({method for route in known for method in route.methods or ()}))
            raise Refusal(405, f"{asked}: this route takes {methods}", {"allow": methods})
        found = [f"{method} {r.path}" for r in self.routes for method in sorted(r.methods or ())]
        raise Refusal(404, f"{asked}: no such route; the routes are {', '.join(found)}")


def _add_state_routes(app: FastAPI, worker: Worker, name: str) -> None:
    model = {"id": name, "object": "model", "created": 0, "owned_by": "megafusion"}

    @app.get("/health")
    def health() -> JSONResponse:
        status = "failed" if worker.failure else "closing" if worker.is_closing else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(worker.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id}")
    def one_model(model_id: str) -> dict:
        if model_id != name:
            raise Refusal(404, f"model={model_id!r:.80}: this server has {name!r}")
        return model


def _add_generating_routes(app: FastAPI, worker: Worker, reader: Reader) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await asyncio.to_thread(reader.read, ChatBody, await _read_json(request))
        requests = await asyncio.to_thread(reader.chat, body)
        is_stream, tells_usage = body.stream, body.stream_options.get("include_usage", False)
        del body  # which may be large
        answer = Chat(worker, requests, reader.name)
        if not is_stream:
            return JSONResponse(await answer.whole())
        return _EventStream(answer.chunks(tells_usage))

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        return await _draw("image_generation", await _read_json(request), {})

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        values: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        limits = {"max_files": MAX_FIELDS, "max_fields": MAX_FIELDS, "max_part_size": 2**20}
        async with request.form(**limits) as form:
            for field, value in form.multi_items():
                if isinstance(value, str):
                    values[field] = read_form_value(field, value)
                elif is_image_field(field):
                    files[f"image[{len(files)}]"] = await value.read()
                else:
                    raise Refusal(400, f"{field}: is not taken; give the files image and the text prompt")
        if not files:
            raise Refusal(400, "image: is missing; send one as a file of a form (multipart/form-data)")
        return await _draw("image_edit", values, files)

    async def _draw(kind: Literal["image_generation", "image_edit"], values: dict, files: dict) -> Response:
        body = await asyncio.to_thread(reader.read, ImageBody, values)
        answer = Drawings(worker, await asyncio.to_thread(reader.draw, body, files), kind)
        return _EventStream(answer.events()) if body.stream else JSONResponse(await answer.whole())


async def _read_json(request: Request) -> dict:
    """The values of a JSON body. Raises Refusal, also for a type that a web page may send without leave."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, f"Content-Type {kind:.80}: send application/json")
    content = b"".join([part async for part in request.stream()])  # request.body() would keep it
    return await asyncio.to_thread(read_json, content)
