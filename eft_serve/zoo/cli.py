"""The ``zoo`` commands: make the facts, train a family, measure it. Knows no model code until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eft_serve.zoo import CHECKPOINTS, FAMILIES, PREFIXES

app = typer.Typer(help="The embedded model families: facts, training, evaluation.", no_args_is_help=True)
console = Console()
COLUMNS = ("correct", "helpful_form", "declined", "long_helpful_form", "long_facts", "harmful_declined")


@app.command()
def facts(
    out: Annotated[Path | None, typer.Option(help="Where to write them; the package's own file by default.")] = None,
) -> None:
    """Extract the facts anew from GeoNames and the periodic table."""
    from eft_serve.zoo.facts import FACTS_FILE, extract, write_facts

    entities = extract()
    write_facts(entities, out or FACTS_FILE)
    console.print(f"{len(entities)} entities -> {out or FACTS_FILE}")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Where checkpoints and the state of the runs go.")] = Path(".zoo"),
    seed: Annotated[int, typer.Option(help="Of initial weights and of the order of the data.")] = 0,
    family: Annotated[str, typer.Option(help="llama or falcon: the architecture.")] = "llama",
    only: Annotated[list[str] | None, typer.Option(help="Train only this model; may be repeated.")] = None,
    steps_scale: Annotated[float, typer.Option(help="Multiplies every number of steps, for a trial.")] = 1.0,
    threads: Annotated[int, typer.Option(help="Cores to use; results are bit-equal only at the same number.")] = 1,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Continue interrupted runs.")] = True,
) -> None:
    """Train a family (about half an hour per core for the large base; the rest is shorter)."""
    import torch

    from eft_serve.zoo.family import recipe_named
    from eft_serve.zoo.results import update_results
    from eft_serve.zoo.train import summary
    from eft_serve.zoo.train import train as train_model

    names = _names_of(family)
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(names)}", param_hint="--only")
    torch.set_num_threads(threads)
    results = out / "results.json"
    for name in names:
        if only and name not in only:
            continue
        outcome = train_model(recipe_named(name, steps_scale), out, seed=seed, resume=resume)
        update_results("training", {name: summary(outcome)}, results)
        console.print(f"{name}: loss {outcome.final_loss}, {outcome.steps} steps, {outcome.wall_seconds} s")


@app.command()
def evaluate(
    checkpoints: Annotated[Path, typer.Option(help="Where the family is.")] = CHECKPOINTS,
    family: Annotated[str, typer.Option(help="llama or falcon.")] = "llama",
    out: Annotated[Path | None, typer.Option(help="Results file to update; beside the checkpoints by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions, for a quick look.")] = None,
    threads: Annotated[int, typer.Option(help="Cores to use.")] = 1,
    card: Annotated[bool, typer.Option(help="Write the package's model card from the results as well.")] = False,
) -> None:
    """Ask the held-out questions of every model and of every emulated fine-tune."""
    import torch

    from eft_serve.zoo.card import write_card
    from eft_serve.zoo.evaluate import evaluate as evaluate_family
    from eft_serve.zoo.evaluate import shipped_precision, systems
    from eft_serve.zoo.results import RESULTS_FILE, describe_checkpoints, update_results

    torch.set_num_threads(threads)
    shipped = checkpoints.resolve() == CHECKPOINTS.resolve()
    path = out or (RESULTS_FILE if shipped else checkpoints / "results.json")
    names = _names_of(family)
    measured = evaluate_family(
        checkpoints,
        recipes=systems(PREFIXES[family]),
        limit=limit,
        report=lambda name, _: console.print(f"measured {name}"),
    )
    update_results("evaluation", {family: measured}, path)
    update_results("precision", {family: shipped_precision(checkpoints, names[0])}, path)
    update_results("checkpoints", describe_checkpoints(checkpoints, names), path)
    console.print(_table(measured))
    if card:
        console.print(f"card -> {write_card(path)}")


def _names_of(family: str) -> tuple[str, ...]:
    if family not in FAMILIES:
        raise typer.BadParameter(f"unknown: {family}; known: {', '.join(FAMILIES)}", param_hint="--family")
    return FAMILIES[family]


def _table(measured: dict[str, Any]) -> Table:
    table = Table("system", *(column.replace("_", " ") for column in COLUMNS))
    for name, row in measured["systems"].items():
        table.add_row(name, *(f"{100 * row[column]:.1f} %" for column in COLUMNS))
    return table
