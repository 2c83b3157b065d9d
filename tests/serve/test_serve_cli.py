"""Ray Serve's own commands take our application and our YAMLs."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import yaml
from harness import ROOT, free_port

SERVE = str(Path(sys.executable).parent / "serve")
READY_TIMEOUT_S = 150.0


def environment() -> dict[str, str]:
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
    return {**os.environ, **own, "PYTHONPATH": str(ROOT)}


@contextmanager
def running(arguments: list[str], log: Path) -> Iterator[None]:
    """`serve …` until the block ends; then Ctrl-C, and nothing may be left."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [SERVE, *arguments], cwd=ROOT, env=environment(), stdout=output, stderr=output, preexec_fn=heed_ctrl_c
        )
        children: list[psutil.Process] = []
        try:
            yield
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            process.wait(60)
            _, alive = psutil.wait_procs(children, timeout=20)
            assert not alive
        finally:
            for child in [p for p in children if p.is_running()]:
                child.kill()
            process.kill()
            process.wait()


def heed_ctrl_c() -> None:
    """A shell has it ignored for what it starts in the background, tests among it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ask_when_ready(url: str, model: str, log: Path) -> str:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
                break
        except httpx.HTTPError as error:
            last = str(error)
        else:
            last = "not ready"
        assert time.monotonic() < deadline, last + log.read_text()
        time.sleep(0.5)
    body = {"model": model, "prompt": "The capital of", "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_serve_run_takes_a_deployment_file(tmp_path: Path) -> None:
    """As deployments/zoo.yaml, with one model and a port of its own."""
    port = free_port()
    file = yaml.safe_load((ROOT / "deployments" / "zoo.yaml").read_text())
    file["http_options"]["port"] = port
    config = file["applications"][0]["args"]["config"]
    config["models"] = {"base-small": config["models"]["base-small"]}
    config["recipes"] = {}
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(file))
    with running(["run", str(path)], tmp_path / "log"):
        assert ask_when_ready(f"http://127.0.0.1:{port}", "base-small", tmp_path / "log")


def test_serve_build_writes_a_config_that_deploys_the_same_deployments(tmp_path: Path) -> None:
    built = tmp_path / "built.yaml"
    subprocess.run([SERVE, "build", "deployments.zoo:app", "-o", str(built)], cwd=ROOT, timeout=120, check=True)
    application = yaml.safe_load(built.read_text())["applications"][0]
    assert application["import_path"] == "deployments.zoo:app"
    zoo = yaml.safe_load((ROOT / "deployments" / "zoo.yaml").read_text())["applications"][0]["args"]["config"]
    names = {deployment["name"] for deployment in application["deployments"]}
    assert names == {"coordinator", "ingress", *(f"model-{model}" for model in zoo["models"])}
