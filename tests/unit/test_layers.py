"""Imports go downwards only, and packages on one floor do not know one another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FLOORS = [
    {"config", "config_base", "config_recipes", "ensemble", "errors", "extras", "types", "yaml_file"},
    {"numerics", "checkpoints", "grammars", "batches"},
    {"engine", "coordinator", "transport", "tenancy", "api", "zoo", "config_check"},
    {"serving"},
    {"rayserve"},
    {"jobs", "bench", "evaluation", "testing", "deployments", "demo", "config_cli"},
    {"cli"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SAME_FLOOR_ALLOWED = {0, 5}  # plain data may know plain data; the top is glue
API_ON_TENANCY = ("api", "tenancy")  # tenants are the HTTP surface's own business


def _sources() -> Iterator[Path]:
    yield from sorted((ROOT / "eft_serve").rglob("*.py"))
    yield from sorted((ROOT / "deployments").rglob("*.py"))


def _unit(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "deployments" else (parts[1] if len(parts) > 1 else "__init__")


def imported_modules(source: str) -> set[str]:
    """Dotted names of every import, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "eft_serve"}
    return found


def violations(unit: str, source: str) -> list[str]:
    """What this source may not import from where it stands."""
    bad = []
    for module in imported_modules(source):
        top, _, rest = module.partition(".")
        target = "deployments" if top == "deployments" else rest.partition(".")[0] if top == "eft_serve" else None
        if not target or target == unit or target not in FLOOR_OF or (unit, target) == API_ON_TENANCY:
            continue
        here, there = FLOOR_OF[unit], FLOOR_OF[target]
        if there > here or (there == here and here not in SAME_FLOOR_ALLOWED):
            bad.append(f"{unit} imports {module}")
    return bad


@pytest.mark.parametrize("path", list(_sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    unit = _unit(path)
    if unit == "__init__":
        return
    assert unit in FLOOR_OF, f"{unit} has no floor: place it in FLOORS"
    assert violations(unit, path.read_text()) == []


def test_only_rayserve_imports_ray_and_one_module_imports_deepspeed() -> None:
    deepspeed = []
    for path in _sources():
        tops = {module.partition(".")[0] for module in imported_modules(path.read_text())}
        if "ray" in tops:
            assert _unit(path) in {"rayserve", "deployments"}, path
        if "deepspeed" in tops:
            deepspeed.append(path.name)
    assert deepspeed == ["model_runner.py"]


def test_the_rule_itself_catches_an_upward_and_a_sideways_import() -> None:
    assert violations("engine", "from eft_serve.rayserve import model") == ["engine imports eft_serve.rayserve"]
    assert violations("coordinator", "def f():\n    import eft_serve.engine.engine") == [
        "coordinator imports eft_serve.engine.engine"
    ]
    assert violations("coordinator", "from eft_serve import engine") == ["coordinator imports eft_serve.engine"]
    assert violations("rayserve", "from eft_serve.engine import engine") == []
