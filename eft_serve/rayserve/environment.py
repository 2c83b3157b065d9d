"""What Ray reads from the environment, and reads only once: `prepare` must run before anything imports Ray."""

from __future__ import annotations

import os
import secrets
import sys


def prepare() -> None:
    """Set what is not set yet, for a cluster that this process is going to start."""
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported before its environment was prepared")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray's own ports listen on every interface: they open to this run's token only.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
