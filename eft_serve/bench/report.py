"""What every benchmark ends with: a table for people, and one last line of JSON. Knows nothing that is measured."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def machine() -> dict[str, Any]:
    """What the figures were taken on; `threads` are torch's in this process."""
    return {
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """One table; all columns but the first are numbers."""
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


def finish(result: Mapping[str, Any]) -> None:
    """The last line: the figures and the machine."""
    Console().file.write(json.dumps({**result, "machine": machine()}) + "\n")


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except FileNotFoundError:
        found = None
    return found[1] if found else platform.machine()
