"""The documents hold together: links lead somewhere, and the index of decisions says what the records say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DECISIONS = ROOT / "docs" / "decisions"
RECORDS = sorted(DECISIONS.glob("[0-9]*.md"))
PAGES = [
    page
    for pages in (ROOT.glob("*.md"), (ROOT / "docs").rglob("*.md"), (ROOT / "eft_serve").rglob("*.md"))
    for page in sorted(pages)
    if not page.name.endswith(".template.md")  # links of a page that is made from it, and lies elsewhere
]

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
_RECORD = re.compile(
    r"# (?P<number>\d{4}): (?P<title>.+)\n\n- Date: (?P<date>\d{4}-\d\d-\d\d)\n- Status: (?P<status>.+)\n\n"
    r"## Context\n\n[\s\S]+\n\n## Decision\n\n[\s\S]+\n\n## Consequences\n\n[\s\S]+",
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    broken = [target for target in _LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert broken == []


def test_the_index_of_decisions_lists_every_record_with_its_date_and_status() -> None:
    rows = []
    for record in RECORDS:
        found = _RECORD.match(record.read_text())
        assert found, f"{record.name}: not of the form that CONTRIBUTING.md shows"
        assert record.name.startswith(f"{found['number']}-")
        rows.append(f"| [{found['number']}]({record.name}) | {found['date']} | {found['title']} | {found['status']} |")
    index = [line for line in (DECISIONS / "README.md").read_text().splitlines() if line.startswith("| [")]
    assert index == rows


def test_records_of_decisions_are_numbered_without_gaps() -> None:
    assert [int(record.name[:4]) for record in RECORDS] == list(range(1, len(RECORDS) + 1))


# The map of the code: paths in `code`, and in brackets after a path the names that are defined there.
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
_PATH = re.compile(r"(?<![\[(/.\w])([a-z_]+(?:/[a-z_0-9]+)*(?:/|\.(?:py|md|json)))(?![\w/])")  # links are tested above
_NAME = re.compile(r"`([^`]+)`")
_PLACE = re.compile(r"`(?P<path>[a-z_/]+\.py)`\s+\((?P<names>`\w+(?:\.\w+)?`(?:, `\w+(?:\.\w+)?`)*)\)")


def _located(path: str) -> Path | None:
    return next((found for base in (ROOT / "eft_serve", ROOT) if (found := base / path).exists()), None)


def _defined(path: Path) -> set[str]:
    """Functions and classes, and methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {node.name} | {f"{node.name}.{each.name}" for each in node.body if isinstance(each, FUNCTIONS)}
        elif isinstance(node, FUNCTIONS):
            names.add(node.name)
    return names


def test_every_path_that_the_architecture_names_exists() -> None:
    paths = set(_PATH.findall(ARCHITECTURE))
    assert len(paths) > 50
    assert sorted(path for path in paths if _located(path) is None) == []


def test_every_function_that_the_architecture_places_is_defined_there() -> None:
    places = [
        (found["path"], name) for found in _PLACE.finditer(ARCHITECTURE) for name in _NAME.findall(found["names"])
    ]
    assert len(places) > 50
    missing = [f"{path}: {name}" for path, name in places if name not in _defined(_located(path) or ROOT / path)]
    assert missing == []


def test_the_architecture_names_every_package() -> None:
    packages = [each.parent.name for each in (ROOT / "eft_serve").glob("*/__init__.py")]
    assert packages
    assert [name for name in packages if f"`{name}/`" not in ARCHITECTURE] == []
