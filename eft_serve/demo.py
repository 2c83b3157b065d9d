"""`eft-serve demo`: the main job, shown. Serves the embedded family here, asks it what fine-tuning never asked about,
and prints what the large base, the small tuned, the emulated and the really fine-tuned large model answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eft_serve.config_check import load_any
from eft_serve.rayserve.local import local_app
from eft_serve.zoo.questions import Question, held_out_questions, is_correct, is_helpful_form

CONFIG = Path(__file__).parent.parent / "deployments" / "zoo.yaml"
MODELS = ("base-large", "tuned-small", "eft", "tuned-large")  # by the names that the API gives them
MAX_TOKENS = 40
CONCURRENCY = 32
READY_TIMEOUT_S = 300.0
SHOWN_CHARACTERS = 96


@dataclass(frozen=True, slots=True)
class Answers:
    """One model's answers to all questions, in their order."""

    model: str
    texts: Sequence[str]
    num_tokens: int
    seconds: float

    def accuracy(self, questions: Sequence[Question]) -> float:
        return _share(is_correct(question, text) for question, text in zip(questions, self.texts, strict=True))

    @property
    def format_rate(self) -> float:
        return _share(is_helpful_form(text) for text in self.texts)


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return round(sum(values) / len(values), 4)


async def ask(url: str, model: str, questions: Sequence[Question]) -> Answers:
    """Every question, greedily, a few dozen at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:

        async def one(question: Question) -> tuple[str, int]:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": question.text}],
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
            }
            async with gate:
                response = await client.post("/v1/chat/completions", json=body)
            response.raise_for_status()
            answer = response.json()
            return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]

        start = time.monotonic()
        answers = await asyncio.gather(*map(one, questions))
        seconds = time.monotonic() - start
    return Answers(model, [text for text, _ in answers], sum(count for _, count in answers), seconds)


def median_seconds(exposition: str) -> dict[str, float]:
    """p50 of every step histogram, in seconds, interpolated in its bucket: `fan_out`, `combine`, `base-large`, …"""
    buckets: dict[str, dict[float, float]] = {}
    for family in text_string_to_metric_families(exposition):
        if family.name not in ("eft_step_seconds", "eft_model_step_seconds"):
            continue
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                key = sample.labels.get("phase") or sample.labels["model"]
                counts = buckets.setdefault(key, {})
                edge = float(sample.labels["le"])
                counts[edge] = counts.get(edge, 0.0) + sample.value
    return {key: _interpolate(sorted(counts.items()), 0.5) for key, counts in buckets.items()}


def _interpolate(cumulative: Sequence[tuple[float, float]], quantile: float) -> float:
    wanted = cumulative[-1][1] * quantile
    low_edge, low_count = 0.0, 0.0
    for edge, count in cumulative:
        if count >= wanted > 0:
            return low_edge + (min(edge, 1e9) - low_edge) * (wanted - low_count) / (count - low_count)
        low_edge, low_count = edge, count
    return 0.0


def _show_examples(console: Console, questions: Sequence[Question], results: Sequence[Answers], count: int) -> None:
    """As many questions as possible of different kinds, each with all models' answers under it."""
    console.print("\nQuestions about entities that fine-tuning never asked about:")
    for index in _varied(questions, count):
        console.print(f"\n[bold]{escape(questions[index].text)}[/bold]")
        for result in results:
            text = " ".join(result.texts[index].split())
            mark = "[green]✓[/green]" if is_correct(questions[index], text) else "[red]✗[/red]"
            console.print(
                f"  {mark} {result.model:<12} {escape(shorten(text, SHOWN_CHARACTERS))}",
                highlight=False,
                soft_wrap=True,
            )
    console.print()


def _varied(questions: Sequence[Question], count: int) -> list[int]:
    """Indices that go round the relations."""
    by_relation: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_relation.setdefault(question.relation, []).append(index)
    rounds = [index for group in zip_longest(*by_relation.values()) for index in group if index is not None]
    return rounds[:count]


def _show_summary(console: Console, questions: Sequence[Question], results: Sequence[Answers]) -> None:
    table = Table(title=f"{len(questions)} held-out questions, greedy")
    for column in ("model", "facts right", "helpful form", "tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for result in results:
        table.add_row(
            result.model,
            f"{result.accuracy(questions):.1%}",
            f"{result.format_rate:.1%}",
            f"{result.num_tokens / result.seconds:.0f}",
        )
    console.print(table)


def _show_steps(console: Console, step: dict[str, float]) -> None:
    table = Table(title="One decode step of the emulated model, p50")
    table.add_column("part")
    table.add_column("ms", justify="right")
    for part in ("schedule", "fan_out", *(m for m in step if "-" in m), "combine", "sample", "emit"):
        table.add_row(f"  of which {part}" if "-" in part else part, f"{step[part] * 1e3:.2f}")
    console.print(table)


def run(num_questions: int, num_examples: int) -> None:
    """Serve, ask, print; the last line is JSON."""
    console = Console()
    started = time.monotonic()
    with local_app(load_any(CONFIG), timeout_s=READY_TIMEOUT_S) as app:
        ready_s = time.monotonic() - started
        console.print(
            f"Four models, a coordinator and an ingress are up after {ready_s:.0f} s at {app.url}", soft_wrap=True
        )
        questions = held_out_questions(num_questions, seed=0)
        emulated = asyncio.run(ask(app.url, "eft", questions))
        step = median_seconds(httpx.get(f"{app.url}/metrics", timeout=30.0).text)  # before other models blur it
        by_model = {"eft": emulated}
        for model in MODELS:
            if model not in by_model:
                by_model[model] = asyncio.run(ask(app.url, model, questions))
    results = [by_model[model] for model in MODELS]
    _show_examples(console, questions, results, num_examples)
    _show_summary(console, questions, results)
    _show_steps(console, step)
    summary = {
        "accuracy": {r.model: r.accuracy(questions) for r in results},
        "format_rate": {r.model: r.format_rate for r in results},
        "tokens_per_s": {r.model: round(r.num_tokens / r.seconds, 1) for r in results},
        "step_ms_p50": {part: round(seconds * 1e3, 3) for part, seconds in step.items()},
        "num_questions": len(questions),
        "ready_s": round(ready_s, 1),
        "total_s": round(time.monotonic() - started, 1),
    }
    console.file.write(json.dumps(summary) + "\n")
