"""Files are read in every shape that Ray Serve and Kubernetes give them, and refused where they are unclear."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from eft_serve.config import AppConfig
from eft_serve.config_check import http_address, load_any
from eft_serve.errors import ConfigError

INNER: dict[str, Any] = {"models": {"m": {"path": "x"}}}


def deploy(*applications: Any, **more: Any) -> dict[str, Any]:
    return {"applications": list(applications), **more}


def application(config: Any, **more: Any) -> dict[str, Any]:
    return {"name": "eft-serve", "import_path": "deployments.eft:app", "args": {"config": config}, **more}


def write(path: Path, data: Any) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def test_every_shape_of_a_file_is_read(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.yaml", INNER)
    inline = write(tmp_path / "inline.yaml", deploy(application(INNER), http_options={"port": 1}))
    named = write(tmp_path / "named.yaml", deploy(application(str(bare))))
    assert load_any(bare) == load_any(inline) == load_any(named) == AppConfig.parse(INNER)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (deploy(), "exactly one application"),
        (deploy(application(INNER), application(INNER)), "exactly one application"),
        (deploy({"name": "a", "import_path": "deployments.eft:app"}), "applications.0.args.config: missing"),
        (deploy(application(None)), "applications.0.args.config: missing"),
        (deploy(application(INNER), http_option={}), "unknown key 'http_option'"),
        (deploy(application(INNER), http_options={"prot": 1}), "http_options: unknown key 'prot'"),
        (deploy(application(INNER, rout_prefix="/")), "applications.0: unknown key 'rout_prefix'"),
        (deploy("app"), "applications.0: must be a mapping"),
        (deploy(application({"model": {}})), "applications.0.args.config: model: Extra inputs"),
        (deploy(application("nowhere.yaml")), "nowhere.yaml: cannot be read"),
        (["models"], "(top level)"),
    ],
)
def test_a_file_that_is_none_of_them_says_what_is_wanted(tmp_path: Path, data: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_any(write(tmp_path / "file.yaml", data))


def test_mistakes_around_the_configuration_and_in_it_are_named_together(tmp_path: Path) -> None:
    data = deploy(application({**INNER, "model": {}}, rout_prefix="/"), http_option={})
    with pytest.raises(ConfigError) as caught:
        load_any(write(tmp_path / "file.yaml", data))
    assert [name in caught.value.message for name in ("'http_option'", "'rout_prefix'", "config: model:")] == [True] * 3


def test_a_file_that_names_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    with pytest.raises(ConfigError, match="names another file again"):
        load_any(write(path, deploy(application(str(path)))))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {m: {path: x}, m: {path: y}}", "'m' is given twice"),
        ("models: [", "cannot be read as YAML"),
        ("models: 2026-13-45", "cannot be read as YAML"),
        ("\ud800", "cannot be read as YAML"),
    ],
)
def test_yaml_that_says_nothing_clear_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ConfigError, match=said):
        load_any(path)


def test_anchors_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("models:\n  a: &a {path: x, dtype: float32}\n  b: {<<: *a, path: y}\n  c: {<<: *a, path: z}\n")
    config = load_any(path)
    assert [(m.path, m.dtype) for m in config.deployments.values()] == [(p, "float32") for p in "xyz"]


def test_the_address_is_the_deploy_files_and_a_bare_configuration_has_none(tmp_path: Path) -> None:
    options = {"host": "127.0.0.2", "port": 8101}
    named = write(tmp_path / "named.yaml", deploy(application(INNER), http_options=options, proxy_location="HeadOnly"))
    assert http_address(named) == ("127.0.0.2", 8101)
    assert http_address(write(tmp_path / "bare.yaml", INNER)) == (None, None)
    assert http_address(write(tmp_path / "none.yaml", deploy(application(INNER)))) == (None, None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"http_options": {"port": 1, "root_path": "/x"}}, "http_options.root_path"),
        ({"logging_config": {"encoding": "JSON"}}, "logging_config"),
    ],
)
def test_what_a_local_server_does_not_apply_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"{named}: only `serve deploy` applies"):
        http_address(write(tmp_path / "file.yaml", deploy(application(INNER), **settings)))
