"""What holds for every test: quiet, local, offline."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import settings

REPOSITORY = Path(__file__).parent.parent

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".cache" / "torch_extensions"))
os.environ["RAY_AUTH_MODE"] = "disabled"  # a token file left by another Ray start would switch authentication on
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "eft_serve.rayserve.http_protocol:use_h11"

settings.register_profile("busy", deadline=None)  # the machine may be shared
settings.load_profile("busy")
