"""The page of results: every figure on it comes from the run that wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eft_serve.bench.thresholds import Threshold

INTRODUCTION = """\
# Benchmarks

`make bench` runs all of this and writes this page, in under ten minutes on two cores. Every benchmark is a command of
its own as well, prints its table and ends with one line of JSON. Sides that are compared take turns; figures are
medians; clocks are monotonic and never compared across processes.
"""


@dataclass(frozen=True, slots=True)
class Section:
    """One benchmark and what it printed."""

    name: str
    about: str  # what it measures, and how
    command: str
    table: str
    result: Mapping[str, Any]  # its last line
    figure: str | None = None  # a picture, relative to the page


def split_output(output: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark printed: its table, and the JSON of its last line.

    Raises:
        ValueError: the last line is no JSON object.
    """
    table, _, last = output.rstrip().rpartition("\n")
    result = json.loads(last)
    if not isinstance(result, dict):
        raise ValueError(f"the last line is no JSON object: {last[:200]}")
    return table.strip("\n"), result


def write_page(sections: Sequence[Section], thresholds: Sequence[Threshold], date: str, minutes: float) -> str:
    """Markdown; KeyError when a section lacks a figure that has a threshold."""
    return "\n".join(
        [
            INTRODUCTION,
            f"Run on {date} in {minutes:.1f} minutes on {_machine(sections[0].result['machine'])}.\n",
            "## Wanted and measured\n",
            _verdicts({section.name: section.result for section in sections}, thresholds),
            *map(_section, sections),
        ]
    )


def _machine(facts: Mapping[str, Any]) -> str:
    return f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, Python {facts['python']}"


def _verdicts(results: Mapping[str, Any], thresholds: Sequence[Threshold]) -> str:
    rows = [
        f"| {t.benchmark} | `{'.'.join(t.path)}` | {t.wanted} | {t.measured(results):g} | "
        f"{'yes' if t.met(results) else '**no**'} |"
        for t in thresholds
    ]
    return "\n".join(["| benchmark | figure | wanted | measured | met |", "|---|---|---|---|---|", *rows, ""])


def _section(section: Section) -> str:
    threads = section.result["machine"]["threads"]
    parts = [
        f"## {section.name}\n",
        f"{section.about}\n",
        f"```sh\n{section.command}  # torch threads of this process: {threads}\n```\n",
        f"```\n{section.table}\n```\n",
        *([f"![{section.name}]({section.figure})\n"] if section.figure else []),
        f"```json\n{json.dumps(section.result)}\n```\n",
    ]
    return "\n".join(parts)
