"""Checks the HTTP side: whether the tenants file can be read. `tenancy` checks its contents."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from eft_serve.config import ServerConfig
from eft_serve.config_check.problem import Problem
from eft_serve.yaml_file import DuplicateKeyError, read_yaml


def server_problems(server: ServerConfig) -> Iterator[Problem]:
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
