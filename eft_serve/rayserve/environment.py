"""Environment variables that Ray reads only once: `prepare` must run before anything imports Ray."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path


def prepare() -> None:
    """Set the defaults, for a cluster that this process is going to start."""
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported before its environment was prepared")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ten rounds a second took an eighth of a core from the models on the same machine.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    # Ray's workers have niceness 15 by default: beside busy processes of others they get 3 % of a core.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Its default parser drops the bodies of requests that offer HTTP/2.
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "eft_serve.rayserve.http_protocol:use_h11")
    # Ray's own exporter listens on every interface without a token; our metrics do not use it.
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # A submitted job's `python` is this one.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray's own ports listen on every interface: they require this run's token.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_write_token())


def job_environment() -> str:
    """Shell variables for `ray job submit` from another shell on this machine; contains no secret."""
    if os.environ.get("RAY_AUTH_MODE") == "token" and (path := os.environ.get("RAY_AUTH_TOKEN_PATH")):
        return f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={path} "
    return ""


def _write_token() -> Path:
    """The file of a random token that only this user can read; removed when this process ends."""
    directory = Path(tempfile.mkdtemp(prefix="eft-serve-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    path = directory / "ray-token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path
