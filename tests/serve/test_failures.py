"""What cannot start says why, soon, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import yaml
from harness import ROOT, free_port, wait_until_said

from eft_serve.config_check import load_any


def serve(config: dict[str, Any], directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return subprocess.run(
        [sys.executable, "-m", "eft_serve.cli", "serve", str(path), "--port", str(free_port()), *options],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    """The command makes its own token."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}


def one_model(path: Path | str) -> dict[str, Any]:
    small = {"resources": {"num_cpus": 0.1}}
    return {"models": {"only": {"path": str(path), **small}}, "coordinator": small, "server": small}


def test_mistakes_are_named_before_anything_starts(tmp_path: Path) -> None:
    config = load_any(ROOT / "deployments" / "zoo.yaml").model_dump(mode="json")
    config["models"]["base-large"]["path"] = str(tmp_path / "nowhere")
    config["models"]["tuned-small"]["resources"]["num_cpus"] = 1000
    done = serve(config, tmp_path)
    assert done.returncode == 1
    assert "models.base-large.path" in done.stderr
    assert "num_cpus" in done.stderr
    assert "Traceback" not in done.stderr


def test_beyond_loopback_only_with_tenants(tmp_path: Path) -> None:
    done = serve(one_model("zoo:base-small"), tmp_path, "--host", "0.0.0.0")
    assert done.returncode == 1
    assert "tenants" in done.stderr


def test_a_model_that_dies_while_loading_fails_with_its_own_message(tmp_path: Path) -> None:
    """The check reads headers only; here the weights do not fit the config, which shows when they are loaded."""
    broken = tmp_path / "broken"
    shutil.copytree(load_any(ROOT / "deployments" / "zoo.yaml").deployments["base-small"].checkpoint, broken)
    config = (broken / "config.json").read_text()
    hidden = yaml.safe_load(config)["intermediate_size"]
    (broken / "config.json").write_text(
        config.replace(f'"intermediate_size": {hidden}', f'"intermediate_size": {hidden * 2}')
    )
    done = serve(one_model(broken), tmp_path, "--no-dashboard")
    assert done.returncode != 0
    assert "CheckpointError" in done.stderr
    assert str(broken) in done.stderr


def test_sigterm_stops_everything_like_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(one_model("zoo:base-small")))
    log = tmp_path / "log"
    command = [sys.executable, "-m", "eft_serve.cli", "serve", str(path), "--port", str(free_port()), "--no-dashboard"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=output, stderr=output)
        wait_until_said(process, log, "Ctrl-C stops everything.")
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
