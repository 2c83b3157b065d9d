"""The FastAPI application: endpoints, errors and middleware over a `Service`. Knows no Ray, sockets or models."""

from __future__ import annotations

import time

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from eft_serve import __version__
from eft_serve.api import cors, errors, openapi
from eft_serve.api.auth import Access
from eft_serve.api.context import Context
from eft_serve.api.metrics import ApiMetrics
from eft_serve.api.middleware import RequestMiddleware
from eft_serve.api.prompts import PromptRenderer
from eft_serve.api.routers import chat, completions, models, ops, responses, score
from eft_serve.api.service import Service
from eft_serve.tenancy.limits import AdmissionLimits
from eft_serve.tenancy.tenants import Tenants
from eft_serve.tenancy.usage import UsageCounters


def create_app(
    service: Service,
    renderer: PromptRenderer | None = None,
    registry: CollectorRegistry | None = None,
    show_request_id: bool = True,
) -> FastAPI:
    """The OpenAI-compatible application.

    Args:
        service: runs the requests.
        renderer: the models' tokenizers; read from their directories when not given.
        registry: for this process's metrics; a new one when not given.
        show_request_id: whether responses carry `x-request-id`; false behind a proxy that adds it itself.

    Raises:
        ConfigError: the tenants file is missing or wrong.
        CheckpointError: a model has no tokenizer.
    """
    registry = registry or CollectorRegistry()
    server = service.config.server
    context = Context(
        service=service,
        renderer=renderer or PromptRenderer.load(service.config, service.max_model_len),
        access=Access(Tenants.load(server.tenants_file) if server.tenants_file else None, server.cors_origins),
        limits=AdmissionLimits(),
        metrics=ApiMetrics(registry),
        usage=UsageCounters(registry),
        registry=registry,
        started=int(time.time()),
    )
    app = FastAPI(title="eft-serve", version=__version__, openapi_url=None, redirect_slashes=False)
    app.state.context = context
    app.add_middleware(RequestMiddleware, metrics=context.metrics, show_id=show_request_id)
    cors.install(app, server.cors_origins)
    errors.install(app)
    openapi.install(app, has_tenants=server.tenants_file is not None)
    for module in (models, chat, completions, responses, score, ops):
        app.include_router(module.router)
    return app
