"""The documents hold together: links lead somewhere, and the index of decisions says what the records say."""

from __future__ import annotations

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
