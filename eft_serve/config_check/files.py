"""The two shapes of a configuration file: the configuration itself, and Ray Serve's deploy file around it.

`serve deploy` ignores unknown keys, and YAML ignores the first of two equal keys; here both are errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from eft_serve.config import AppConfig
from eft_serve.errors import ConfigError
from eft_serve.yaml_file import read_yaml

DEPLOY_KEYS = frozenset(
    {
        "proxy_location",
        "http_options",
        "grpc_options",
        "controller_options",
        "logging_config",
        "tracing_config",
        "applications",
        "target_capacity",
    }
)
HTTP_KEYS = frozenset(
    {
        "host",
        "port",
        "root_path",
        "request_timeout_s",
        "keep_alive_timeout_s",
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_keyfile_password",
        "ssl_ca_certs",
    }
)
APPLICATION_KEYS = frozenset(
    {
        "name",
        "route_prefix",
        "import_path",
        "runtime_env",
        "host",
        "port",
        "deployments",
        "autoscaling_policy",
        "args",
        "logging_config",
        "external_scaler_enabled",
    }
)
ARGS_KEYS = frozenset({"config"})


def load_any(path: Path) -> AppConfig:
    """Read a configuration from a YAML file of either shape.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not validate; the message names every mistake.
    """
    data = _read(path)
    if not is_deploy_file(data):
        return AppConfig.parse(data, source=str(path))
    mistakes = list(_wrapping_mistakes(data, str(path)))
    config = None
    try:
        inner = _deployed(data)
        if isinstance(inner, str):
            config = _load_named(path, Path(inner))
        elif inner is not None:
            config = AppConfig.parse(inner, source=f"{path}: applications.0.args.config")
    except ConfigError as error:
        mistakes.append(error.message)
    if mistakes or config is None:
        raise ConfigError("\n".join(mistakes))
    return config


def http_address(path: Path) -> tuple[str | None, int | None]:
    """Where a deploy file has HTTP listen, host and port; None for what it does not say.

    Raises:
        ConfigError: the file cannot be read, or has settings that only `serve deploy` applies.
    """
    data = _read(path)
    if not is_deploy_file(data):
        return None, None
    options = data.get("http_options") or {}
    others = [f"http_options.{key}" for key in options if key not in ("host", "port")]
    others += [key for key in data if key not in ("applications", "http_options", "proxy_location")]
    if others:
        raise ConfigError(f"{path}: {', '.join(others)}: only `serve deploy` applies these; leave them out here")
    return options.get("host"), options.get("port")


def is_deploy_file(data: Any) -> bool:
    """Whether this is Ray Serve's deploy file rather than a configuration."""
    return isinstance(data, dict) and "applications" in data


def _load_named(path: Path, named: Path) -> AppConfig:
    inner = _read(named)
    if is_deploy_file(inner) and isinstance(_deployed(inner), str):
        raise ConfigError(f"{path}: config: {named} names another file again; name the last one directly")
    return load_any(named)


def _deployed(data: dict[str, Any]) -> Any:
    """The `config` argument of the one application: plain data, a file's name, or None where there is none."""
    match data:
        case {"applications": [{"args": {"config": config}}]}:
            return config
    return None


def _wrapping_mistakes(data: dict[str, Any], source: str) -> Iterator[str]:
    """Every mistake in a deploy file outside its configuration."""
    yield from _unknown(data, DEPLOY_KEYS, source, "(top level)")
    yield from _unknown(data.get("http_options", {}), HTTP_KEYS, source, "http_options")
    applications = data["applications"]
    if not isinstance(applications, list) or len(applications) != 1:
        yield f"{source}: applications: must be a list of exactly one application; deploy others from their own file"
        return
    (application,) = applications
    yield from _unknown(application, APPLICATION_KEYS, source, "applications.0")
    args = application.get("args", {}) if isinstance(application, dict) else {}
    yield from _unknown(args, ARGS_KEYS, source, "applications.0.args")
    if _deployed(data) is None:
        yield f"{source}: applications.0.args.config: missing; give the configuration, or the name of a file with it"


def _unknown(data: Any, known: frozenset[str], source: str, where: str) -> Iterator[str]:
    if not isinstance(data, dict):
        yield f"{source}: {where}: must be a mapping"
        return
    for key in data:
        if key not in known:
            yield f"{source}: {where}: unknown key {key!r}; known are {sorted(known)}"


def _read(path: Path) -> Any:
    try:
        return read_yaml(path)
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: an invalid date or encoding
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
