"""The command line: `eft-serve COMMAND`. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from eft_serve.bench.cli import app as bench_app
from eft_serve.config_cli import app as config_app
from eft_serve.errors import EftServeError
from eft_serve.evaluation.cli import app as eval_app
from eft_serve.tenancy.cli import app as tenant_app
from eft_serve.zoo.cli import app as zoo_app


class Commands(TyperGroup):
    """Domain errors end a command with their message, which is written for its caller, and not with a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except EftServeError as error:
            typer.echo(error.message, err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help=__doc__
)
app.add_typer(config_app, name="config")
app.add_typer(tenant_app, name="tenant")
app.add_typer(zoo_app, name="zoo")
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")


@app.command()
def demo(
    questions: Annotated[int, typer.Option(help="Held-out questions to ask each model.")] = 240,
    examples: Annotated[int, typer.Option(help="Of those, how many to print with their answers.")] = 8,
) -> None:
    """Serve the embedded family, ask held-out questions, print the evidence, stop everything."""
    _prepare()
    from eft_serve.demo import run

    run(questions, examples)


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="A deployments/ YAML, or a bare configuration.")],
    host: Annotated[
        str | None, typer.Option(help="Where HTTP listens; the file's, or loopback. Beyond it only with tenants.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="The file's, or 8000; 0 takes a free one.")] = None,
    dashboard: Annotated[bool, typer.Option(help="Ray's dashboard and job server, on loopback.")] = True,
    timeout_s: Annotated[float, typer.Option(help="Everything must be ready within this.")] = 600.0,
) -> None:
    """Serve a configuration on this machine until Ctrl-C."""
    _prepare()
    from eft_serve.rayserve.serve_command import serve_until_stopped

    serve_until_stopped(config, host=host, port=port, dashboard=dashboard, timeout_s=timeout_s)


def _prepare() -> None:
    """For a command that starts a cluster."""
    from eft_serve.rayserve.environment import prepare

    prepare()


if __name__ == "__main__":
    app()
