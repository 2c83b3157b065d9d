"""Keys and the tenants file: every mistake is named, no key is ever shown."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eft_serve.errors import AuthenticationError, ConfigError
from eft_serve.tenancy.cli import app
from eft_serve.tenancy.keys import generate_key, hash_key, same_hash
from eft_serve.tenancy.store import create_tenant
from eft_serve.tenancy.tenants import ANONYMOUS, Tenants

HASH = "sha256:" + "0" * 64


def load(tmp_path: Path, text: str) -> Tenants:
    path = tmp_path / "tenants.yaml"
    path.write_text(text)
    return Tenants.load(path)


def test_keys_are_long_random_and_stored_as_a_hash() -> None:
    keys = {generate_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(k.startswith("eft-") and len(k) == 4 + 43 for k in keys)
    assert hash_key("abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert same_hash(HASH, HASH)
    assert not same_hash(HASH, hash_key("x"))


def test_a_created_tenant_authenticates_and_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    acme, globex = create_tenant(path, "acme", ["up"], requests_per_minute=5), create_tenant(path, "globex")
    tenants = Tenants.load(path)
    tenant = tenants.authenticate(f"Bearer {acme}")
    assert (tenant.name, tenant.requests_per_minute, tenant.max_concurrent_requests) == ("acme", 5, None)
    assert tenant.allows("up")
    assert not tenant.allows("down")
    assert not tenant.allows("*")
    assert tenants.authenticate(f"bearer  {globex} ").allows("anything")
    messages = set()
    for header in (None, "", acme, f"Basic {acme}", "Bearer", "Bearer ", f"Bearer {acme}x", f"Bearer {HASH}"):
        with pytest.raises(AuthenticationError) as caught:
            tenants.authenticate(header)
        messages.add(caught.value.message)
    assert len(messages) == 1
    assert acme not in path.read_text()
    assert ANONYMOUS.allows("anything")


def test_the_file_is_private_whole_and_keeps_what_was_in_it(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(f"# ours\ntenants:\n  old:  # keep\n    keys: ['{HASH}']\n    recipes: ['*']\n")
    create_tenant(path, "new", ["up"], max_concurrent_requests=2, metrics=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "# ours" in path.read_text()
    assert "# keep" in path.read_text()
    assert set(Tenants.load(path).tenants) == {"old", "new"}
    assert Tenants.load(path).tenants["new"].metrics
    assert [p.name for p in tmp_path.iterdir()] == ["tenants.yaml"]


def test_another_layout_is_rewritten_rather_than_broken(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(f"tenants: {{old: {{keys: ['{HASH}'], recipes: ['*']}}}}\n")
    create_tenant(path, "new")
    path.write_text(path.read_text().replace("  ", "    "))
    create_tenant(path, "newer")
    assert set(Tenants.load(path).tenants) == {"old", "new", "newer"}


@pytest.mark.parametrize("arguments", [{"name": "acme"}, {"name": "a b"}, {"name": "b", "requests_per_minute": 0}])
def test_what_cannot_be_created_leaves_the_file_alone(tmp_path: Path, arguments: dict[str, object]) -> None:
    path = tmp_path / "tenants.yaml"
    create_tenant(path, "acme")
    before = path.read_text()
    with pytest.raises(ConfigError, match=str(path)):
        create_tenant(path, **arguments)  # type: ignore[arg-type]
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tenants:\n  a: {keys: [eft-plaintext], recipes: ['*']}", r"tenants\.a\.keys\.0"),
        ("tenants:\n  a: {kees: [], recipes: []}", r"tenants\.a\.kees"),
        ("tenants:\n  a: {requests_per_minute: 0}", r"tenants\.a\.requests_per_minute"),
        ("tenants:\n  a: {name: b}", "unknown key 'name'"),
        ("tenants:\n  a: 3", r"tenants\.a"),
        ("tenants:\n  a: {recipes: ['**']}", r"tenants\.a\.recipes\.0"),
        ("tenants:\n  a: {}\n  a: {}", "line 3: a name is given twice"),
        (f"tenants:\n  a: {{keys: ['{HASH}']}}\n  b: {{keys: ['{HASH}']}}", "'a' and 'b' have a key in common"),
        ("tenants: [", "line 1"),
        ("- 1", "top level"),
        ("", "top level"),
        ("tenants: {}\nlimits: {}", "limits"),
    ],
)
def test_mistakes_in_the_file_are_named_and_not_repeated(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load(tmp_path, text)
    assert "eft-plaintext" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_tenant_without_keys_is_locked_out(tmp_path: Path) -> None:
    tenants = load(tmp_path, "tenants:\n  a: {recipes: ['*']}")
    for header in ("Bearer ", "Bearer", None):
        with pytest.raises(AuthenticationError):
            tenants.authenticate(header)


def test_the_command_prints_the_key_once_and_lists_without_it(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    created = CliRunner().invoke(app, ["create", str(path), "acme", "--recipe", "up", "--requests-per-minute", "7"])
    assert created.exit_code == 0
    key = created.stdout.strip()
    assert Tenants.load(path).authenticate(f"Bearer {key}").recipes == ("up",)
    assert key not in created.stderr
    again = CliRunner().invoke(app, ["create", str(path), "acme"])
    assert again.exit_code == 1
    assert "exists" in again.stderr
    listed = CliRunner().invoke(app, ["list", str(path)])
    assert "acme" in listed.stdout
    assert "7" in listed.stdout
    assert "sha256" not in listed.stdout
    assert CliRunner().invoke(app, ["list", str(tmp_path / "none.yaml")]).exit_code == 1
