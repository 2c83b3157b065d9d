"""Every file in `deployments/` is one that Serve takes, without a key that it would ignore."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from strict_schemas import ROOT, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema, unknown_keys

from eft_serve.config_check import load_any
from eft_serve.config_check.files import APPLICATION_KEYS, DEPLOY_KEYS, HTTP_KEYS

FILES = sorted((ROOT / "deployments").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_deployment_file_is_valid_for_serve_and_for_us(path: Path) -> None:
    data = yaml.safe_load(path.read_text())
    deploy = ServeDeploySchema.model_validate(data)
    assert list(unknown_keys(ServeDeploySchema, data)) == []
    assert [app.import_path for app in deploy.applications] == ["deployments.eft:app"]
    config = load_any(path)
    assert config.recipes
    loopback = deploy.http_options.host == "127.0.0.1"
    assert loopback or config.server.tenants_file is not None, "beyond loopback without keys"


def test_the_files_asked_for_are_there() -> None:
    assert {"zoo", "zoo-interpolation", "llama2-70b", "falcon-40b"} <= {path.stem for path in FILES}


def test_the_keys_that_we_know_are_those_that_serve_knows() -> None:
    assert set(ServeDeploySchema.model_fields) == DEPLOY_KEYS
    assert set(HTTPOptionsSchema.model_fields) == HTTP_KEYS
    assert set(ServeApplicationSchema.model_fields) == APPLICATION_KEYS


@pytest.mark.parametrize("path", ["http_options.prot", "applications.0.rout_prefix", "proxi_location"])
def test_a_typo_that_serve_ignores_is_found(path: str) -> None:
    data: dict[str, Any] = copy.deepcopy(yaml.safe_load(FILES[0].read_text()))
    *parents, last = path.split(".")
    target: Any = data
    for parent in parents:
        target = target[int(parent) if isinstance(target, list) else parent]
    target[last] = "HeadOnly"
    ServeDeploySchema.model_validate(data)  # Serve says nothing
    assert list(unknown_keys(ServeDeploySchema, data)) == [path]


def test_an_unknown_key_of_a_deployments_actor_options_is_found() -> None:
    options = {"num_cpu": 1}
    data = {"applications": [{"import_path": "a:b", "deployments": [{"name": "d", "ray_actor_options": options}]}]}
    assert list(unknown_keys(ServeDeploySchema, data)) == ["applications.0.deployments.0.ray_actor_options.num_cpu"]
