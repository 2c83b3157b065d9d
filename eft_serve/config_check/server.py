"""Checks the HTTP side: that files can be kept and the tenants file be read. `tenancy` checks its contents."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import yaml
from fsspec.core import split_protocol
from fsspec.registry import get_filesystem_class

from eft_serve.config import ServerConfig
from eft_serve.config_check.problem import Problem
from eft_serve.yaml_file import DuplicateKeyError, read_yaml


def server_problems(server: ServerConfig) -> Iterator[Problem]:
    """What the server would not start with."""
    yield from _tenants_problems(server)
    yield from _files_problems(server)


def _files_problems(server: ServerConfig) -> Iterator[Problem]:
    """Looks, and writes nothing; the URL is not repeated, since it may hold a password."""
    if server.files_url is None:
        return
    where = "server.files_url"
    protocol, path = split_protocol(server.files_url)
    try:
        get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        yield Problem(where, f"cannot be used: {error}")
        return
    if protocol in (None, "file", "local"):
        existing = next(each for each in (Path(path), *Path(path).parents) if each.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            yield Problem(where, f"{path} cannot be made or written; name a directory of the server's user")


def _tenants_problems(server: ServerConfig) -> Iterator[Problem]:
    """The tenants file; its contents are never repeated."""
    if server.tenants_file is None:
        return
    where = "server.tenants_file"
    try:
        data = read_yaml(server.tenants_file)
    except OSError as error:
        message = f"{server.tenants_file} cannot be read: {error.strerror}; make it with 'eft-serve tenant create'"
        yield Problem(where, message)
    except DuplicateKeyError:
        yield Problem(where, f"{server.tenants_file}: a name is given twice; remove one of the two")
    except (yaml.YAMLError, ValueError):
        yield Problem(where, f"{server.tenants_file} is not YAML; create it again with 'eft-serve tenant create'")
    else:
        if not isinstance(data, dict):
            yield Problem(where, f"{server.tenants_file} holds no tenants; add one with 'eft-serve tenant create'")
