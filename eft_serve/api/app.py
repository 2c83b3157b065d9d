"""The FastAPI application: endpoints, errors and middleware over a `Service`. Knows no Ray, sockets or models."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from eft_serve import __version__
from eft_serve.api import cors, errors, openapi
from eft_serve.api.auth import Access
from eft_serve.api.batch_client import open_storage
from eft_serve.api.context import Context
from eft_serve.api.metrics import ApiMetrics
from eft_serve.api.middleware import RequestMiddleware
from eft_serve.api.prompts import PromptRenderer
from eft_serve.api.routers import batches, chat, completions, files, models, ops, responses, score, tokenize
from eft_serve.api.service import Service
from eft_serve.batches.watch import TIMING, Timing
from eft_serve.tenancy.limits import AdmissionLimits
from eft_serve.tenancy.tenants import Tenants
from eft_serve.tenancy.usage import UsageCounters


def create_app(
    service: Service,
    renderer: PromptRenderer | None = None,
    registry: CollectorRegistry | None = None,
    show_request_id: bool = True,
    timing: Timing = TIMING,
) -> FastAPI:
    """The OpenAI-compatible application.

    Args:
        service: runs the requests.
        renderer: the models' tokenizers; read from their directories when not given.
        registry: for this process's metrics; a new one when not given.
        show_request_id: whether responses carry `x-request-id`; false behind a proxy that adds it itself.
        timing: of batches, see `Timing`.

    Raises:
        ConfigError: the tenants file is missing or wrong, or files cannot be kept where the configuration says.
        CheckpointError: a model has no tokenizer.
    """
    app = FastAPI(title="eft-serve", version=__version__, openapi_url=None, redirect_slashes=False, lifespan=_lifespan)
    registry = registry or CollectorRegistry()
    server = service.config.server
    access = Access(Tenants.load(server.tenants_file) if server.tenants_file else None, server.cors_origins)
    context = Context(
        service=service,
        renderer=renderer or PromptRenderer.load(service.config, service.max_model_len),
        access=access,
        limits=AdmissionLimits(),
        metrics=ApiMetrics(registry),
        usage=UsageCounters(registry),
        registry=registry,
        started=int(time.time()),
        storage=open_storage(service.config.server, access, app, timing),
    )
    app.state.context = context
    app.add_middleware(RequestMiddleware, metrics=context.metrics, show_id=show_request_id)
    cors.install(app, server.cors_origins)
    errors.install(app)
    openapi.install(app, has_tenants=server.tenants_file is not None)
    for module in (models, chat, completions, responses, score, tokenize, files, batches, ops):
        app.include_router(module.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    storage = app.state.context.storage
    if storage is None:
        yield
        return
    async with storage.running():
        yield
