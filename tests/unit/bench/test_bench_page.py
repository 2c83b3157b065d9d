"""The page of results, and the commands that it is made of."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from eft_serve.bench import suite
from eft_serve.bench.page import Section, split_output, write_page
from eft_serve.bench.thresholds import THRESHOLDS, Threshold

MACHINE = {"cpu": "A CPU", "cores": 2, "threads": 1, "torch": "2", "python": "3.11"}


def section(name: str = "engine", **result: Any) -> Section:
    return Section(name, "What it is.", f"eft-serve bench {name}", "a table", {**result, "machine": MACHINE}, "x/y.png")


def test_output_is_a_table_and_a_last_line() -> None:
    assert split_output('one\ntwo\n{"a": 1}\n') == ("one\ntwo", {"a": 1})


@pytest.mark.parametrize("output", ["", "a table\n", "a table\n[1]\n"])
def test_output_without_a_json_object_is_refused(output: str) -> None:
    with pytest.raises(ValueError, match=r"JSON|Expecting"):
        split_output(output)


def test_a_page_has_verdicts_tables_and_json() -> None:
    thresholds = [
        Threshold("engine", ("over_floor", "1"), 1.6),
        Threshold("engine", ("over_floor", "8"), 1.35),
        Threshold("engine", ("speedup",), 1.3, at_most=False),
    ]
    page = write_page([section(over_floor={"1": 1.6, "8": 1.36}, speedup=1.3)], thresholds, "2030-01-02", 7.25)
    assert "| engine | `over_floor.1` | ≤ 1.6 | 1.6 | yes |" in page
    assert "| engine | `over_floor.8` | ≤ 1.35 | 1.36 | **no** |" in page
    assert "| engine | `speedup` | ≥ 1.3 | 1.3 | yes |" in page
    assert "2030-01-02 in 7.2 minutes on A CPU, 2 cores, torch 2, Python 3.11" in page
    assert "```\na table\n```" in page
    assert "![engine](x/y.png)" in page
    assert "eft-serve bench engine" in page
    line = page.partition("```json\n")[2].partition("\n```")[0]
    assert json.loads(line)["over_floor"] == {"1": 1.6, "8": 1.36}


def test_a_figure_that_is_missing_is_an_error() -> None:
    with pytest.raises(KeyError, match="ratio"):
        write_page([section("serve")], [Threshold("serve", ("ratio",), 2.0)], "2030-01-02", 1.0)


def test_every_threshold_is_of_a_benchmark_that_runs() -> None:
    assert {threshold.benchmark for threshold in THRESHOLDS} == {benchmark.name for benchmark in suite.BENCHMARKS}


def test_a_benchmark_that_fails_fails_the_suite(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        suite._run(["bench", "no-such-benchmark"])
    assert "no-such-benchmark" in capfd.readouterr().err
