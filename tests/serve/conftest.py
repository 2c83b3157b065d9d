"""One served application for all tests here: the real command in a process of its own, on loopback, with tenants."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from harness import ROOT, Served, free_port, stop, wait_until_said, write_config, write_tenants

from eft_serve.config_check import load_any


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    keys = write_tenants(directory / "tenants.yaml")
    config = write_config(directory, directory / "tenants.yaml")
    port = free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": str(ROOT),
    }
    shm_before = set(os.listdir("/dev/shm"))
    log = (directory / "serve.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "eft_serve.cli", "serve", str(config), "--port", str(port)],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until_said(process, directory / "serve.log", "Ctrl-C stops everything.")
        said = (directory / "serve.log").read_text()
        dashboard = next(line.split()[-1] for line in said.splitlines() if line.startswith("Ray's dashboard"))
        application = Served(f"http://127.0.0.1:{port}", dashboard, process, load_any(config), keys, environment)
        yield application
        for client in application.clients.values():
            client.close()
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        stop(process)
        log.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, f"left running: {[p.cmdline() for p in alive]}"
    assert not any("torch" in name or "ray" in name for name in set(os.listdir("/dev/shm")) - shm_before)
    assert process.returncode == 0, (directory / "serve.log").read_text()
