"""`eft-serve bench all`: every benchmark in a process of its own, one after the other, and the page of them all."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from eft_serve.bench.page import Section, split_output, write_page
from eft_serve.bench.thresholds import THRESHOLDS

TIMEOUT_S = 420.0
STOP_TIMEOUT_S = 60.0
WIDTH = "110"  # of the tables


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A command, and what it is about."""

    name: str
    about: str
    options: str = ""


BENCHMARKS = (
    Benchmark(
        "fanout",
        "What a decode step costs beyond its slowest model: the real coordinator and transport over engines that only "
        "sleep. 1.0 would be free; one model after the other would be the sum of the latencies over the largest.",
    ),
    Benchmark(
        "coordinator",
        "What a decode step costs the coordinator: the real one and the real transport over three engines that answer "
        "at once with peaked logits; greedy, at T = 1, and at T = 0.7 with top-p 0.9. The floor copies the same logits "
        "once, on as many threads. Sides take turns; ratios are medians over the rounds.",
    ),
    Benchmark(
        "engine",
        "One model's step with one thread: the engine, stock transformers (SDPA, its dynamic cache), and the matrix "
        "products alone, as floor with attention's two and as weights without. Ratios are medians over steps that were "
        "taken in turn.",
    ),
    Benchmark(
        "context",
        "The engine's decode step with one thread against context length and batch size, on the embedded family's "
        "large base. The exponent is fitted to the upper half of each series: at most 1 means at most linear.",
    ),
    Benchmark(
        "speculate",
        "Speculative decoding, one engine process for each model: the embedded family's long answers one at a time by "
        "block length, models that sleep the paper's latencies beside the paper's own figures and under a JSON schema, "
        "and the default against plain decoding by batch size. Speed-ups are medians of ratios to plain decoding, "
        "taken in turn.",
        "--prompts 6",
    ),
    Benchmark(
        "serve",
        "The embedded family's emulated model over HTTP with Poisson arrivals that keep it full, beside what one would "
        "write without it: three transformers models in one process with as many threads as are quickest, static "
        "padded batches, no HTTP. Waiting for a free place counts in TTFT. Then running streams while long prompts "
        "arrive beside them, and prompts that are sent twice.",
        "--concurrency 16 --peer naive --requests 64 --long-prompt --repeated-prefix",
    ),
)


def run(output: Path) -> None:
    """Run them all and write the page; pictures go into a directory of the page's name.

    Raises:
        CalledProcessError: a benchmark failed; no page is written.
        TimeoutExpired: one did not end in time.
    """
    started = time.monotonic()
    figure = output.with_suffix("") / "context.png"
    sections = []
    for benchmark in BENCHMARKS:
        plot = ["--plot", str(figure)] if benchmark.name == "context" else []
        arguments = ["bench", benchmark.name, *shlex.split(benchmark.options), *plot]
        printed = _run(arguments)
        Console().file.write(printed)
        table, result = split_output(printed)
        shown = str(figure.relative_to(output.parent)) if plot else None
        command = shlex.join(["eft-serve", *arguments])
        sections.append(Section(benchmark.name, benchmark.about, command, table, result, shown))
    minutes = (time.monotonic() - started) / 60
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(write_page(sections, THRESHOLDS, datetime.now(UTC).date().isoformat(), minutes))


def _run(arguments: list[str]) -> str:
    """What the command printed."""
    command = [sys.executable, "-m", "eft_serve.cli", *arguments]
    environment = {**os.environ, "COLUMNS": WIDTH}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        printed, _ = process.communicate(timeout=TIMEOUT_S)
    except BaseException:
        process.terminate()  # it stops what it has started
        process.wait(STOP_TIMEOUT_S)
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, printed)
    return printed
