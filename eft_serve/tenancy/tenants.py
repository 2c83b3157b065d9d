"""Who may ask, and for what: the tenants file and the keys in an `Authorization` header.

Knows the file and its rules, not HTTP. A wrong key and a missing key are the same error, and no message repeats a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eft_serve.config_base import Name
from eft_serve.errors import AuthenticationError, ConfigError
from eft_serve.tenancy.keys import hash_key, same_hash
from eft_serve.yaml_file import DuplicateKeyError, read_yaml

ALL_RECIPES = "*"
KeyHash = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Tenant(_Frozen):
    """One customer of the server: keys, what they open, and how much of it."""

    name: Name
    keys: tuple[KeyHash, ...] = ()
    """Hashes of the keys that are this tenant's; several while one replaces another; empty to lock the tenant out."""
    recipes: tuple[Name | Annotated[str, Field(pattern=r"^\*$")], ...] = ()
    """Recipes and plain models that may be used; `*` for all."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests in any 60 seconds, per server process; not set: no limit."""
    max_concurrent_requests: int | None = Field(default=None, ge=1)
    """Choices generated at once (a request with `n: 3` is three), per server process; not set: no limit."""
    metrics: bool = False
    """Whether the keys open `/metrics`, which names every tenant."""

    def allows(self, recipe: str) -> bool:
        """Whether this tenant may use that recipe or plain model."""
        return ALL_RECIPES in self.recipes or recipe in self.recipes


ANONYMOUS = Tenant(name="anonymous", recipes=(ALL_RECIPES,), metrics=True)
"""Everybody, on a server without tenants, which answers loopback clients only."""


class Tenants(_Frozen):
    """All tenants of a server."""

    tenants: dict[Name, Tenant]

    @model_validator(mode="before")
    @classmethod
    def _name_each(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("tenants"), dict):
            return data
        for name, entry in data["tenants"].items():
            if isinstance(entry, dict) and "name" in entry:
                raise ValueError(f"tenants.{name}: unknown key 'name'; the key above is the name")
        named = {k: {"name": k, **v} if isinstance(v, dict) else v for k, v in data["tenants"].items()}
        return {**data, "tenants": named}

    @model_validator(mode="after")
    def _keys_are_of_one_tenant(self) -> Self:
        owners: dict[str, str] = {}
        for tenant in self.tenants.values():
            for key in tenant.keys:
                if owners.setdefault(key, tenant.name) != tenant.name:
                    raise ValueError(f"tenants {owners[key]!r} and {tenant.name!r} have a key in common")
        return self

    @classmethod
    def load(cls, path: Path) -> Tenants:
        """Read the tenants file.

        Raises:
            ConfigError: it is missing, is not YAML, or does not validate; the message names every mistake.
        """
        return cls.parse(read_data(path), source=str(path))

    @classmethod
    def parse(cls, data: Any, source: str = "tenants") -> Tenants:
        """Validate plain data; raises `ConfigError` that names every mistake, one a line."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            mistakes = [
                f"{source}: {'.'.join(str(p) for p in e['loc']) or '(top level)'}: {e['msg']}"
                for e in error.errors(include_input=False)
            ]
        raise ConfigError("\n".join(mistakes))

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant whose key an `Authorization: Bearer ...` header carries.

        Raises:
            AuthenticationError: there is none; the message is the same whatever the reason.
        """
        scheme, _, key = (authorization or "").partition(" ")
        presented = hash_key(key.strip()) if scheme.lower() == "bearer" else ""
        # Every key is compared, also after a match, so that the time does not reveal who or how many the tenants are.
        matches = [t for t in self.tenants.values() for stored in t.keys if same_hash(stored, presented)]
        if not matches:
            raise AuthenticationError("missing or invalid API key; send it as 'Authorization: Bearer eft-...'")
        return matches[0]


def read_data(path: Path) -> Any:
    """The file's plain data; raises `ConfigError` that names the line and repeats none of the file."""
    try:
        return read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except DuplicateKeyError as error:
        where, problem = _line(error), "a name is given twice"
    except yaml.MarkedYAMLError as error:
        where, problem = _line(error), error.problem or "not YAML"
    except (yaml.YAMLError, UnicodeDecodeError):
        where, problem = "somewhere", "not YAML"
    raise ConfigError(f"{path}: {where}: {problem}")


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}" if mark else "somewhere"
