"""A cluster on this machine for as long as a `with` block lasts: started, made ready, and cleared away."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import httpx
import ray
from ray import serve

from eft_serve.config import AppConfig
from eft_serve.errors import DeadlineError, DeploymentError
from eft_serve.rayserve.app import build

APP_NAME = "eft-serve"
OBJECT_STORE_BYTES = 128 * 1024**2  # nothing large goes through Ray
READY_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class LocalApp:
    """A served application."""

    url: str  # of the HTTP API
    dashboard_url: str | None  # where `ray job submit` goes; None when it was not asked for


def free_port() -> int:
    """A TCP port that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def local_cluster(*, host: str, port: int, dashboard: bool) -> Iterator[str | None]:
    """Ray and Serve's HTTP proxy, without an application; gives the dashboard's URL if one was asked for.

    `eft_serve.rayserve.environment.prepare` must have run.
    """
    context = ray.init(
        include_dashboard=dashboard,
        dashboard_host="127.0.0.1",
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _unwind_on_signals()
    try:
        serve.start(http_options={"host": host, "port": port})  # the proxy first: loading models would starve it
        yield f"http://{context.dashboard_url}" if dashboard else None
    finally:
        ray.shutdown()


@contextmanager
def local_app(
    config: AppConfig, *, host: str = "127.0.0.1", port: int = 0, dashboard: bool = False, timeout_s: float = 600.0
) -> Iterator[LocalApp]:
    """Serve this configuration here; ready when the block begins, and gone when it ends.

    Raises:
        DeploymentError: a deployment failed; the message carries its own traceback.
        DeadlineError: not ready in time.
    """
    port = port or free_port()
    with local_cluster(host=host, port=port, dashboard=dashboard) as dashboard_url:
        try:
            _run(config)
            url = f"http://127.0.0.1:{port}"
            wait_ready(url, timeout_s)
            yield LocalApp(url, dashboard_url)
        finally:
            serve.delete(APP_NAME)  # replicas close by themselves: sockets, ranks, shared memory


def _unwind_on_signals() -> None:
    """SIGTERM unwinds like Ctrl-C, and Ctrl-C also where a shell had it ignored; after Ray, which takes the first."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _run(config: AppConfig) -> None:
    try:
        serve.run(build(config), name=APP_NAME)
    except RuntimeError as error:  # it names the deployments that failed, and says nothing of why
        deployments = serve.status().applications[APP_NAME].deployments
        why = [f"{name}: {d.message}" for name, d in deployments.items() if d.message and d.status != "HEALTHY"]
        raise DeploymentError("\n".join([str(error), *why])) from error


def wait_ready(url: str, timeout_s: float) -> None:
    """Return when every model has answered a step; raises `DeadlineError` with what is missing."""
    deadline = time.monotonic() + timeout_s
    while True:
        response = httpx.get(f"{url}/ready", timeout=30.0)
        if response.status_code == 200:
            return
        if time.monotonic() > deadline:
            raise DeadlineError(f"not ready after {timeout_s:g} s: {response.text}")
        time.sleep(READY_POLL_S)
