"""Adding a tenant to the tenants file: atomic, readable by its owner only, one writer at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from eft_serve.errors import ConfigError
from eft_serve.tenancy.keys import generate_key, hash_key
from eft_serve.tenancy.tenants import ALL_RECIPES, Tenants, read_data


def create_tenant(
    path: Path,
    name: str,
    recipes: Sequence[str] = (ALL_RECIPES,),
    requests_per_minute: int | None = None,
    max_concurrent_requests: int | None = None,
    metrics: bool = False,
) -> str:
    """Add a tenant to the file, which is created if needed, and return its only key.

    The key is not stored and cannot be shown again. A running server reads the file when it starts.

    Raises:
        ConfigError: the name is taken, the file or an argument does not validate, or another process is writing it.
    """
    key = generate_key()
    entry: dict[str, Any] = {"keys": [hash_key(key)], "recipes": list(recipes)}
    limits = {"requests_per_minute": requests_per_minute, "max_concurrent_requests": max_concurrent_requests}
    entry |= {k: v for k, v in limits.items() if v is not None} | ({"metrics": True} if metrics else {})
    path = path.resolve()
    with _sole_writer(path.parent):
        data = read_data(path) if path.exists() else {"tenants": {}}
        tenants = Tenants.parse(data, source=str(path)).tenants
        if name in tenants:
            raise ConfigError(f"{path}: tenant {name!r} exists; choose another name")
        wanted = {"tenants": {**data["tenants"], name: entry}}
        Tenants.parse(wanted, source=str(path))
        _replace(path, _extended(path.read_text() if tenants else "", name, entry, wanted))
    return key


def _extended(text: str, name: str, entry: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The file with one more tenant: appended, so that comments are kept, or rewritten where its layout forbids it."""
    appended = text.rstrip() + "\n" + textwrap.indent(yaml.safe_dump({name: entry}, sort_keys=False), "  ")
    try:
        if yaml.safe_load(appended) == wanted:
            return appended
    except yaml.YAMLError:
        pass  # not the indentation that was assumed: rewritten below
    return yaml.safe_dump(wanted, sort_keys=False)


@contextmanager
def _sole_writer(directory: Path) -> Iterator[None]:
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConfigError(f"{directory}: another process is writing here; try again") from error
    finally:
        os.close(handle)


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
