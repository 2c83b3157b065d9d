"""A cluster on this machine for the duration of a `with` block: started, made ready, and stopped."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

import httpx
import psutil
import ray
from ray import serve
from ray.serve import RunTarget
from ray.serve.schema import ApplicationStatus

from eft_serve.config import AppConfig
from eft_serve.errors import DeadlineError, DeploymentError
from eft_serve.rayserve.app import build

APP_NAME = "eft-serve"
OBJECT_STORE_BYTES = 128 * 1024**2  # nothing large goes through Ray
READY_POLL_S = 0.1
STOP_TIMEOUT_S = 10.0
_STOPPING = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalApp:
    """A served application."""

    url: str  # of the HTTP API
    dashboard_url: str | None  # address for `ray job submit`; None without a dashboard


def free_port() -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def local_cluster(*, host: str, port: int, dashboard: bool) -> Iterator[str | None]:
    """Ray and Serve's HTTP proxy, without an application; yields the dashboard's URL, if any.

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
        _shut_down()


def _shut_down() -> None:
    """Stop Ray and return when its processes are gone: `ray.shutdown` does not wait for all of them."""
    started = [process for process in psutil.Process().children(recursive=True) if _is_rays(process)]
    ray.shutdown()
    _, alive = psutil.wait_procs(started, timeout=STOP_TIMEOUT_S)
    for process in alive:
        logger.warning("Ray's process %d does not end by itself; killing it", process.pid)
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)


def _is_rays(process: psutil.Process) -> bool:
    try:
        return "ray" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


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
            deadline = time.monotonic() + timeout_s
            _run(config, deadline)
            url = f"http://{_reachable(host)}:{port}"
            wait_ready(url, deadline)
            yield LocalApp(url, dashboard_url)
        finally:
            serve.delete(APP_NAME)  # replicas close their sockets, ranks and shared memory


def _unwind_on_signals() -> None:
    """Unwind on SIGTERM as on Ctrl-C, even if a shell ignored Ctrl-C; set after Ray, which installs its own."""

    def stop(signum: int, frame: FrameType | None) -> None:
        for number in _STOPPING:  # another one would interrupt the stop and leave processes behind
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in _STOPPING:
        signal.signal(number, stop)


def _run(config: AppConfig, deadline: float) -> None:
    """Deploy, and return when everything runs; a model that fits no node ends this at its deadline."""
    serve.run_many([RunTarget(build(config), name=APP_NAME)], wait_for_applications_running=False)
    while (app := serve.status().applications[APP_NAME]).status != ApplicationStatus.RUNNING:
        why = "\n".join(f"{name}: {d.message}" for name, d in app.deployments.items() if d.status != "HEALTHY")
        if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise DeploymentError(f"{app.message}\n{why}")
        if time.monotonic() > deadline:
            raise DeadlineError(f"not everything runs in time: {why}")
        time.sleep(READY_POLL_S)


def wait_ready(url: str, deadline: float) -> None:
    """Return when every model has answered a step.

    Raises:
        DeadlineError: not ready by `deadline`, in monotonic seconds; the message says what is missing.
    """
    while True:
        try:
            response = httpx.get(f"{url}/ready", timeout=30.0)
            missing = response.text
        except httpx.TransportError as error:
            missing = f"{type(error).__name__}: {error}"
        else:
            if response.status_code == 200:
                return
        if time.monotonic() > deadline:
            raise DeadlineError(f"not ready in time: {missing}")
        time.sleep(READY_POLL_S)


def _reachable(host: str) -> str:
    """The address by which a server that listens on `host` is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{host}]" if ":" in host else host
