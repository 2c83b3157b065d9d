"""`eft-serve eval …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eft_serve.extras import require
from eft_serve.zoo import FAMILIES

app = typer.Typer(no_args_is_help=True, help="The method's claims, measured on the embedded families.")

Families = Annotated[list[str] | None, typer.Option("--family", help="llama or falcon; both when not given.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many questions of each kind, for a quick look.")]


@app.callback()
def evaluation() -> None:
    """The method's claims, measured on the embedded families: tables, then one line of JSON."""


def _add(part: str, about: str) -> None:
    def command(family: Families = None, limit: Limit = None) -> None:
        _measure(part, family, limit)

    app.command(name=part, help=about)(command)


for _part, _about in {
    "grid": "Pre-training scale against fine-tuning scale: factual accuracy and helpfulness.",
    "frontier": "Helpful against harmless, over the weights between two fine-tunings, at both scales.",
    "knobs": "Scale, weight, and the control without a reference.",
    "truncation": "Up-scaling only inside the tuned model's nucleus.",
    "tokens": "How far the small tuned model is from EFT, token by token, and how much it could draft.",
    "perplexity": "Of the large tuned model's answers and of true ones, under every system.",
}.items():
    _add(_part, _about)


@app.command(name="all")
def run_all(
    output: Annotated[
        Path, typer.Option(help="The page to write; pictures and figures go into a directory beside it.")
    ],
    limit: Limit = None,
) -> None:
    """Every part on both families, and the page of them."""
    require("evaluation")
    from datetime import UTC, datetime

    from eft_serve.bench import report
    from eft_serve.evaluation import page, plots, suite

    figures = suite.run(list(FAMILIES), list(suite.PARTS), limit)
    figures |= {"date": datetime.now(UTC).date().isoformat(), "machine": report.machine()}
    page.write(output, figures)
    plots.draw_all(figures, output.with_suffix(""))
    for part in suite.PARTS:
        typer.echo(f"{page.tables(part, figures)}\n")
    report.finish(page.headline(figures))


@app.command(name="page")
def write_page(
    output: Annotated[Path, typer.Option(help="The page; its figures are read from the directory beside it.")],
) -> None:
    """Write the page and its pictures anew from the figures of the last run."""
    require("evaluation")
    import json

    from eft_serve.evaluation import page, plots

    figures = json.loads((output.with_suffix("") / page.FIGURES_NAME).read_text(encoding="utf-8"))
    page.write(output, figures)
    plots.draw_all(figures, output.with_suffix(""))


def _measure(part: str, families: list[str] | None, limit: int | None) -> None:
    from eft_serve.bench import report
    from eft_serve.evaluation import page, suite

    if unknown := sorted(set(families or ()) - set(FAMILIES)):
        raise typer.BadParameter(f"unknown: {unknown[0]}; known: {', '.join(FAMILIES)}", param_hint="--family")
    figures = suite.run(families or list(FAMILIES), [part], limit)
    typer.echo(page.tables(part, figures))
    report.finish(figures)
