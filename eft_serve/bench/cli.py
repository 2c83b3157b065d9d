"""`eft-serve bench …`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

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


def _become_like_a_replica() -> None:
    """Start again with the environment that a served coordinator has, one math thread included."""
    environment = {**REPLICA_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **environment})  # noqa: S606
