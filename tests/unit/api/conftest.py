"""A file store, and a server over one."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from api_fakes import make_config
from batch_fakes import Server


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "file" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(make_config(tmp_path, files_url=str(tmp_path / "store")))
