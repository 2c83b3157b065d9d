"""`eft-serve bench context`: the engine's decode step against context length and against batch size.

A step must grow in proportion to the tokens that it attends to, at most: the exponent fitted to the upper half of every
series says whether it does.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from eft_serve.bench import report
from eft_serve.config import ModelConfig
from eft_serve.engine.engine import Engine
from eft_serve.types import SequenceStep

MODEL = "zoo:base-large"  # 4 layers of 192, context 4096
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
LENGTH_BATCHES = (1, 8)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
BATCH_LENGTH = 128
WARM_UP = 3
KV_CACHE_TOKENS = max(max(LENGTHS) * max(LENGTH_BATCHES), 2 * BATCH_LENGTH * max(BATCHES))

Series = dict[int, float]  # seconds of a step by length or by batch size


class Sequences:
    """A batch of sequences of one length that grow together."""

    def __init__(self, engine: Engine, batch: int) -> None:
        self._engine = engine
        self._names = [str(row) for row in range(batch)]
        self._num_tokens = 0

    def grow(self, num_tokens: int) -> None:
        """Prefill up to so many tokens."""
        self._forward(num_tokens - self._num_tokens)

    def decode(self, num_steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        seconds = []
        for _ in range(num_steps):
            started = time.perf_counter()
            self._forward(1)
            seconds.append(time.perf_counter() - started)
        return seconds

    def end(self) -> None:
        self._engine.free(self._names)

    def _forward(self, num_new: int) -> None:
        token_ids = torch.randint(2, 3000, (len(self._names), num_new)).tolist()
        steps = [SequenceStep(n, self._num_tokens, ids, 1) for n, ids in zip(self._names, token_ids, strict=True)]
        if any(output.logits is None for output in self._engine.forward(steps)):
            raise RuntimeError("the engine did not compute a step")
        self._num_tokens += num_new


def by_length(engine: Engine, batch: int, num_steps: int) -> dict[int, list[float]]:
    """Steps that end at every length, of one batch that grows through them all."""
    sequences = Sequences(engine, batch)
    seconds = {}
    for length in LENGTHS:
        sequences.grow(length - num_steps - WARM_UP)
        seconds[length] = sequences.decode(WARM_UP + num_steps)[WARM_UP:]
    sequences.end()
    return seconds


def by_batch(engine: Engine, num_steps: int) -> dict[int, list[float]]:
    """Steps that end at one length, of every batch size."""
    seconds = {}
    for batch in BATCHES:
        sequences = Sequences(engine, batch)
        sequences.grow(BATCH_LENGTH - num_steps - WARM_UP)
        seconds[batch] = sequences.decode(WARM_UP + num_steps)[WARM_UP:]
        sequences.end()
    return seconds


def growth_exponent(series: Series) -> float:
    """Slope of log(seconds) over log(x) on the upper half: 1 is linear, 2 quadratic, 0 constant."""
    upper = sorted(series.items())[len(series) // 2 :]
    logs = np.log(np.array(upper))
    return round(float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0]), 3)


def run(num_steps: int, rounds: int, plot: Path | None) -> None:
    """Measure in turns, print, draw; the last line is JSON."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    engine = Engine.load("bench", ModelConfig(path=MODEL, kv_cache_tokens=KV_CACHE_TOKENS))
    collected: dict[str, dict[int, list[float]]] = {}
    for _ in range(rounds):
        for batch in LENGTH_BATCHES:
            _collect(collected, f"context, batch {batch}", by_length(engine, batch, num_steps))
        _collect(collected, f"batch, context {BATCH_LENGTH}", by_batch(engine, num_steps))
    measured = {
        name: {x: statistics.median(each) for x, each in seconds.items()} for name, seconds in collected.items()
    }
    growth = {name: growth_exponent(series) for name, series in measured.items()}
    ms = {name: {str(x): round(s * 1e3, 3) for x, s in series.items()} for name, series in measured.items()}
    for name, series in ms.items():
        x_name = name.split(",")[0]
        report.show(f"Step by {name}: growth exponent {growth[name]}", [x_name, "ms, p50"], series.items())
    if plot is not None:
        draw(measured, plot)
    report.finish({"growth": growth, "ms": ms})


def _collect(collected: dict[str, dict[int, list[float]]], name: str, seconds: dict[int, list[float]]) -> None:
    for x, each in seconds.items():
        collected.setdefault(name, {}).setdefault(x, []).extend(each)


def draw(measured: dict[str, Series], path: Path) -> None:
    """A PNG of two panels: by context length, and by batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, x_name, unit in zip(panels, ("context", "batch"), ("tokens of context", "sequences"), strict=True):
        for name, series in measured.items():
            if name.startswith(f"{x_name},"):
                panel.plot(list(series), [s * 1e3 for s in series.values()], marker="o", label=name.split(", ")[1])
        panel.set(xlabel=unit, ylabel="decode step, ms", ylim=(0, None))
        panel.legend()
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
