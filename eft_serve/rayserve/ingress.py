"""The ingress's deployment: the FastAPI app over this application's deployment handles."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from eft_serve.api.app import create_app
from eft_serve.config import AppConfig
from eft_serve.errors import ConfigError
from eft_serve.rayserve.service import ServeService


class IngressReplica:
    """HTTP in, deltas out."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: AppConfig, coordinator: DeploymentHandle[Any], models: dict[str, DeploymentHandle[Any]]
    ) -> None:
        _require_tenants_behind_haproxy(config)
        self.service = ServeService(config, coordinator, models)
        self.watch = asyncio.create_task(self.service.watch())

    def check_health(self) -> None:
        """Raises when the receiver or the watch over the coordinators has died, so that Serve replaces the replica."""
        self.service.client.check()
        if self.watch.done() and (error := self.watch.exception()):
            raise RuntimeError("the watch over the coordinators died") from error

    def __del__(self) -> None:
        if service := getattr(self, "service", None):
            service.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self.service, show_request_id=False)  # Serve sends the same header
        gc.collect()
        gc.freeze()  # modules and tokenizers stay for good; going over them at each collection stalls every stream
        return app


def _require_tenants_behind_haproxy(config: AppConfig) -> None:
    """Require tenants with HAProxy: it does not forward the client's address, so every client looks like loopback."""
    if config.server.tenants_file is None and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise ConfigError("server.tenants_file: needed with RAY_SERVE_ENABLE_HA_PROXY=1", param="server.tenants_file")
