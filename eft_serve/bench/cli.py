"""`eft-serve bench …`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from eft_serve.extras import require
from eft_serve.rayserve.options import REPLICA_ENVIRONMENT

app = typer.Typer(no_args_is_help=True, help="Benchmarks: a table, then one line of JSON.")


@app.callback()
def bench() -> None:
    """Benchmarks: a table, then one line of JSON."""


@app.command()
def fanout(
    latency_ms: Annotated[str, typer.Option(help="Of base, tuned and reference.")] = "107,36,36",
    vocab: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 32_000,
    batch: Annotated[str, typer.Option(help="Requests at a time.")] = "1,16",
    steps: Annotated[int, typer.Option(help="Decode steps of each measurement.")] = 20,
    rounds: Annotated[int, typer.Option(help="Times that the measurements are interleaved.")] = 3,
) -> None:
    """What a decode step costs beyond its slowest model."""
    _become_like_a_replica()
    from eft_serve.bench.fanout import run

    run([float(ms) for ms in latency_ms.split(",")], vocab, [int(b) for b in batch.split(",")], steps, rounds)


@app.command()
def coordinator(
    vocab: Annotated[str, typer.Option(help="Tokens in the vocabulary, each measured by itself.")] = (
        "32000,128256,151936"
    ),
    batch: Annotated[str, typer.Option(help="Requests at a time.")] = "1,16,64",
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of each measurement.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Times that the sides take turns.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of the coordinator's math.")] = 1,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also log-probabilities, penalties and a grammar.")
    ] = False,
) -> None:
    """What a step costs the coordinator, greedy and sampled, beside copying its logits once."""
    _become_like_a_replica()
    from eft_serve.bench.coordinator import run

    run([int(v) for v in vocab.split(",")], [int(b) for b in batch.split(",")], steps, rounds, threads, controls)


@app.command()
def engine(
    steps: Annotated[int, typer.Option(min=1, help="Decode steps at each batch size.")] = 60,
    prefills: Annotated[int, typer.Option(min=1, help="Prompts of 512 tokens.")] = 15,
) -> None:
    """A model's step beside stock transformers, and beside its matrix products alone."""
    _become_like_a_replica()
    from eft_serve.bench.engine import run

    run(steps, prefills)


@app.command()
def context(
    steps: Annotated[int, typer.Option(min=1, help="Decode steps at each point.")] = 15,
    rounds: Annotated[int, typer.Option(min=1, help="Times that the series take turns.")] = 3,
    plot: Annotated[Path | None, typer.Option(help="Where to draw it, a PNG.")] = None,
) -> None:
    """The engine's step against context length and batch size."""
    if plot is not None:
        require("bench")
    _become_like_a_replica()
    from eft_serve.bench.context import run

    run(steps, rounds, plot)


@app.command()
def speculate(
    part: Annotated[list[str] | None, typer.Option(help="zoo, simulated, schema, batched; all when not given.")] = None,
    simulate: Annotated[str, typer.Option(help="Milliseconds of base, tuned and reference.")] = "107,36,36",
    acceptance: Annotated[float, typer.Option(min=0, max=1, help="How often simulated models agree.")] = 0.9,
    prompts: Annotated[int, typer.Option(min=1, help="Questions asked of the embedded family.")] = 12,
    batch: Annotated[str, typer.Option(help="Requests at a time, in part batched.")] = "1,2,4,8,16,32",
) -> None:
    """What speculative decoding gains."""
    _become_like_a_replica()
    from eft_serve.bench.speculate import PARTS, run

    parts = part or PARTS
    if unknown := sorted(set(parts) - {*PARTS}):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}", param_hint="--part")
    run(parts, [float(ms) for ms in simulate.split(",")], acceptance, prompts, [int(b) for b in batch.split(",")])


@app.command()
def serve(
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at most.")] = 16,
    peer: Annotated[Literal["naive", "none"], typer.Option(help="What to compare with.")] = "naive",
    requests: Annotated[int, typer.Option(min=0, help="Of one round; 0 for none of the load.")] = 96,
    requests_per_s: Annotated[
        float | None, typer.Option(min=0.01, help="Arrivals; as many as keep the places full when not given.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that the sides take turns.")] = 2,
    ttft_target_ms: Annotated[float, typer.Option(help="A good request's first token comes by then.")] = 1000.0,
    itl_target_ms: Annotated[float, typer.Option(help="A good request's mean time per further token.")] = 50.0,
    proxy: Annotated[Literal["haproxy", "python"], typer.Option(help="Ray Serve's HTTP proxy.")] = "haproxy",
    long_prompt: Annotated[bool, typer.Option("--long-prompt", help="Also: one beside running streams.")] = False,
    repeated_prefix: Annotated[bool, typer.Option("--repeated-prefix", help="Also: a prompt sent twice.")] = False,
) -> None:
    """The embedded family under load, over HTTP, against static batches in plain transformers."""
    from eft_serve.rayserve.environment import prepare

    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if proxy == "haproxy" else "0"
    prepare()
    from eft_serve.bench.serve import LoadPlan, run

    plan = LoadPlan(requests, concurrency, requests_per_s, rounds, ttft_target_ms / 1e3, itl_target_ms / 1e3)
    run(plan, with_peer=peer == "naive", long_prompt=long_prompt, repeated_prefix=repeated_prefix)


@app.command(name="all")
def run_all(
    output: Annotated[Path, typer.Option(help="The page to write; pictures go into a directory of its name.")],
) -> None:
    """Every benchmark, and a page of their results."""
    require("bench")
    from eft_serve.bench.suite import run

    run(output)


def _become_like_a_replica() -> None:
    """Start again with the environment that a served coordinator has, one math thread included."""
    environment = {**REPLICA_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **environment})  # noqa: S606
