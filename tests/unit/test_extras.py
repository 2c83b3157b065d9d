"""Commands whose extra is not installed say what to install, before they start any work."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eft_serve.cli import app
from eft_serve.extras import PACKAGES, require

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("bench", "all", "--output", "page.md"), "bench"),
        (("bench", "context", "--plot", "context.png"), "bench"),
        (("eval", "all", "--output", "page.md"), "evaluation"),
        (("eval", "page", "--output", "page.md"), "evaluation"),
        (("zoo", "facts", "--out", "facts.jsonl"), "zoo"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_a_command_without_its_extra_names_it(
    arguments: Sequence[str], extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for package in PACKAGES[extra]:
        monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr == f"{', '.join(PACKAGES[extra])} is needed for this: pip install 'eft-serve[{extra}]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra", PACKAGES)
def test_an_extra_brings_the_packages_that_are_asked_for_and_the_server_does_not(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brought = {_name(requirement) for requirement in project["optional-dependencies"][extra]}
    assert brought == set(PACKAGES[extra])
    assert brought.isdisjoint(map(_name, project["dependencies"]))
    require(extra)  # the development environment has all


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]
