"""Batch inference against a running server: `python -m eft_serve.jobs.batch --input in.jsonl --output out.jsonl`.

Files in OpenAI's batch format; answers are written in order of completion. Started again after it was stopped for any
reason, it resumes. Knows the HTTP API only, so it runs anywhere: a shell, a Ray job, a Kubernetes Job.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from eft_serve.batches.client import UnreachedError, ask, body_of
from eft_serve.batches.lines import INVALID_LINE, Line, answer, failure
from eft_serve.errors import ConfigError
from eft_serve.jobs.batch_file import UNREACHED, OutputFile, input_keys, read_lines

# A traceback with local variables would show the key.
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass(slots=True)
class Summary:
    """Counts of a batch."""

    lines: int = 0  # in the input
    kept: int = 0  # answered by an earlier run
    succeeded: int = 0  # answered now, with status 200
    failed: int = 0  # answered now, with another status
    invalid: int = 0  # not a request
    unreached: int = 0  # no answer in time
    seconds: float = 0.0


async def run_batch(
    input_file: Path, output_file: Path, client: httpx.AsyncClient, *, concurrency: int, timeout_s: float
) -> Summary:
    """Answer every line of the input that has no answer in the output.

    Raises:
        ConfigError: a file cannot be used; nothing was sent.
    """
    started = time.monotonic()
    keys = input_keys(input_file)
    with OutputFile(output_file, keys) as output:
        summary = Summary(lines=len(keys), kept=len(output.done))
        lines = (line for line in read_lines(input_file) if line.key not in output.done)
        unreached: list[dict[str, Any]] = []
        async with asyncio.TaskGroup() as workers:
            for _ in range(concurrency):
                workers.create_task(_work(lines, output, client, timeout_s, summary, unreached))
        for line in unreached:
            output.append(line)
    summary.unreached = len(unreached)
    summary.seconds = round(time.monotonic() - started, 3)
    return summary


async def _work(
    lines: Iterator[Line],
    output: OutputFile,
    client: httpx.AsyncClient,
    timeout_s: float,
    summary: Summary,
    unreached: list[dict[str, Any]],
) -> None:
    """Process lines until there are none."""
    for line in lines:
        if line.mistake is not None:
            output.append(failure(line, INVALID_LINE, line.mistake))
            summary.invalid += 1
            continue
        try:
            response = await ask(client, line.url, line.body, timeout_s)
        except UnreachedError as error:
            unreached.append(failure(line, UNREACHED, str(error)))
            continue
        output.append(answer(line, response.status_code, response.headers.get("x-request-id"), body_of(response)))
        if response.status_code == httpx.codes.OK:
            summary.succeeded += 1
        else:
            summary.failed += 1


async def _main(
    input_file: Path, output_file: Path, url: str, key: str | None, concurrency: int, timeout_s: float
) -> Summary:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=concurrency)
    # No proxy from the environment: the key goes to this server only. `ask` has the deadline.
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=limits, trust_env=False) as client:  # noqa: S113
        return await run_batch(input_file, output_file, client, concurrency=concurrency, timeout_s=timeout_s)


def _check_url(base_url: str) -> None:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--base-url: {error}") from error
    if url.scheme not in ("http", "https") or not url.host or url.path.rstrip("/").endswith("/v1"):
        raise ConfigError(f"--base-url: {base_url!r} must be http(s)://host:port, without /v1")


def _key(variable: str) -> str | None:
    key = os.environ.get(variable)
    if key and not all("!" <= c <= "~" for c in key):  # if sent, the error message would repeat it
        raise ConfigError(f"{variable}: contains a blank, a newline or another invalid character; set it again")
    return key


@app.command()
def main(
    input_file: Annotated[Path, typer.Option("--input", help="Requests, one per line.")],
    output_file: Annotated[Path, typer.Option("--output", help="Answers; resumed when it exists.")],
    base_url: Annotated[
        str, typer.Option(envvar="EFT_SERVE_URL", help="URL of the server, without /v1.")
    ] = "http://127.0.0.1:8000",
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 16,
    api_key_env: Annotated[str, typer.Option(help="The environment variable with the key.")] = "EFT_SERVE_API_KEY",
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Per request, retries included.")] = 600.0,
) -> None:
    """Answer a file of requests. Exit code: 0 all have an answer, 1 some could not be reached, 2 nothing was sent."""
    try:
        _check_url(base_url)
        summary = asyncio.run(_main(input_file, output_file, base_url, _key(api_key_env), concurrency, timeout_s))
    except ConfigError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps(asdict(summary)))
    if summary.unreached:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
