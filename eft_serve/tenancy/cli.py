"""`eft-serve tenant`: make and list tenants."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from eft_serve.errors import ConfigError
from eft_serve.tenancy.store import create_tenant
from eft_serve.tenancy.tenants import ALL_RECIPES, Tenants

app = typer.Typer(help="Make and list the tenants of a server.", no_args_is_help=True)
TenantsFile = Annotated[Path, typer.Argument(help="The tenants file, as server.tenants_file names it.")]


@app.command()
def create(
    file: TenantsFile,
    name: Annotated[str, typer.Argument(help="Name of the new tenant.")],
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe or model it may use; repeat; all if none.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="No limit if not given.")] = None,
    max_concurrent_requests: Annotated[int | None, typer.Option(min=1, help="No limit if not given.")] = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="The key opens /metrics too.")] = False,
) -> None:
    """Add a tenant and print its key, this once; the file keeps only a hash of it."""
    try:
        key = create_tenant(file, name, recipe or [ALL_RECIPES], requests_per_minute, max_concurrent_requests, metrics)
    except ConfigError as error:
        raise _failed(error) from error
    typer.echo(key)
    typer.echo(
        f"This is the only time the key is shown. Use it as 'Authorization: Bearer <key>' or OPENAI_API_KEY.\n"
        f"Servers read {file} when they start.",
        err=True,
    )


@app.command("list")
def list_tenants(file: TenantsFile) -> None:
    """Show the tenants and their limits; keys are only counted."""
    try:
        tenants = Tenants.load(file).tenants.values()
    except ConfigError as error:
        raise _failed(error) from error
    table = Table("tenant", "keys", "recipes", "requests/min", "concurrent", "metrics")
    for t in tenants:
        limits = ("-" if v is None else str(v) for v in (t.requests_per_minute, t.max_concurrent_requests))
        table.add_row(t.name, str(len(t.keys)), ", ".join(t.recipes), *limits, "yes" if t.metrics else "no")
    Console().print(table)


def _failed(error: ConfigError) -> typer.Exit:
    typer.echo(error.message, err=True)
    return typer.Exit(1)
