"""`eft-serve config`: check a configuration file and explain what is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from eft_serve.config_check import ClusterResources, check, load_any
from eft_serve.config_check.problem import Problem
from eft_serve.config_check.resources import total
from eft_serve.errors import ConfigError

app = typer.Typer(help="Check configurations.", no_args_is_help=True)
COLOURS = {"error": "red", "warning": "yellow"}


@app.callback()
def _group() -> None:
    """Check configurations."""


@app.command("check")
def check_file(
    file: Annotated[Path, typer.Argument(help="A configuration, or a Ray Serve deploy file with one in it.")],
    cpus: Annotated[float | None, typer.Option(min=0, help="CPUs of the cluster; not compared if not given.")] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of the cluster; not compared if not given.")] = None,
) -> None:
    """Print every problem; the exit code is 1 when one is an error."""
    console = Console(soft_wrap=True)
    try:
        config = load_any(file)
    except ConfigError as error:
        for line in error.message.splitlines():
            console.print(f"[red]error[/red] {escape(line)}", highlight=False)
        raise typer.Exit(1) from error
    problems = check(config, ClusterResources(_or_enough(cpus), _or_enough(gpus)))
    for problem in problems:
        console.print(_line(problem), highlight=False)
    errors = sum(problem.severity == "error" for problem in problems)
    needed = total(config)
    console.print(
        f"{'[red]not ok[/red]' if errors else '[green]ok[/green]'} {escape(str(file))}: {len(config.models)} models, "
        f"{len(config.recipes)} recipes, {needed.num_cpus:g} CPUs, {needed.num_gpus:g} GPUs; {errors} errors, "
        f"{len(problems) - errors} warnings",
        highlight=False,
    )
    if errors:
        raise typer.Exit(1)


def _or_enough(count: float | None) -> float:
    return math.inf if count is None else count


def _line(problem: Problem) -> str:
    colour = COLOURS[problem.severity]
    return f"[{colour}]{problem.severity}[/{colour}] [bold]{escape(problem.path)}[/bold]: {escape(problem.message)}"
