"""The routes of a server."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.serve.config import ServeConfig
from megafusion.serve.metrics import Metrics
from megafusion.serve.worker import Worker


def make_app(pipeline: TransfusionPipeline, config: ServeConfig, name: str, keys: Sequence[str]) -> FastAPI:
    """The application of a pipeline. name: of the model. keys: one of which each request must bear, if any.

    `app.state.worker` generates, from the application's start to its end.
    """
    worker = Worker(pipeline, config, Metrics())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.end()

    app = FastAPI(title="megafusion", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker = worker
    model = {"id": name, "object": "model", "created": 0, "owned_by": "megafusion"}

    @app.get("/health")
    def health() -> JSONResponse:
        status = "closing" if worker.is_closing else "ok" if worker.is_alive else "failed"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(worker.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [model]}

    return app
