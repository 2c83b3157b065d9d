"""`eft-serve serve`: check, start, print the address, run until Ctrl-C, clean up."""

from __future__ import annotations

import ipaddress
import json
import os
import time
from pathlib import Path

import ray
import torch
from rich.console import Console

from eft_serve.config import AppConfig
from eft_serve.config_check import ClusterResources, check, http_address, load_any
from eft_serve.errors import ConfigError
from eft_serve.rayserve.environment import job_environment
from eft_serve.rayserve.local import LocalApp, local_app

HEALTH_POLL_S = 1.0


DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


def serve_until_stopped(path: Path, *, host: str | None, port: int | None, dashboard: bool, timeout_s: float) -> None:
    """Serve the configuration of this file.

    Args:
        host: None for the file's `http_options.host`, or loopback.
        port: None for the file's `http_options.port`, or 8000; 0 takes a free one.

    Raises:
        ConfigError: the configuration or the address cannot be served; every mistake is named, and nothing was started.
    """
    config = load_any(path)
    named_host, named_port = http_address(path)
    host = host or named_host or DEFAULT_HOST
    port = next(p for p in (port, named_port, DEFAULT_PORT) if p is not None)
    _refuse_mistakes(config, host)
    console = Console()
    with local_app(config, host=host, port=port, dashboard=dashboard, timeout_s=timeout_s) as served:
        _explain(console, config, served)
        try:
            while ray.is_initialized():
                time.sleep(HEALTH_POLL_S)
        except KeyboardInterrupt:
            console.print("Stopping…")


def _refuse_mistakes(config: AppConfig, host: str) -> None:
    here = ClusterResources(float(os.cpu_count() or 1), float(torch.cuda.device_count()))
    errors = [problem for problem in check(config, here) if problem.severity == "error"]
    lines = [f"{problem.path}: {problem.message}" for problem in errors]
    if config.server.tenants_file is None and not _is_loopback(host):
        lines.append(f"host {host}: without server.tenants_file only loopback is served; create tenants first")
    if lines:
        raise ConfigError("\n".join(lines))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _explain(console: Console, config: AppConfig, served: LocalApp) -> None:
    model = next(iter(config.recipes), next(iter(config.models)))
    body = {"model": model, "messages": [{"role": "user", "content": "What is the capital of Peru?"}]}
    key = ' -H "Authorization: Bearer $EFT_SERVE_API_KEY"' if config.server.tenants_file else ""
    console.print(
        f"Serving {', '.join([*config.recipes, *config.models])} at {served.url}", highlight=False, soft_wrap=True
    )
    if served.dashboard_url:
        console.print(f"Ray's dashboard and jobs: {served.dashboard_url}", highlight=False)
        submit = f"{job_environment()}ray job submit --address {served.dashboard_url} --working-dir . -- python …"
        console.print(f"  {submit}", highlight=False, soft_wrap=True)
    console.print("Try:", highlight=False)
    console.print(
        f"  curl {served.url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'",
        highlight=False,
        soft_wrap=True,
    )
    console.print("Ctrl-C stops everything.", highlight=False)
