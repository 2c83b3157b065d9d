"""Writes the model card from the measured results. Knows the template; every number comes from the results file."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from eft_serve.zoo import FAMILIES, PREFIXES
from eft_serve.zoo.facts import load_facts
from eft_serve.zoo.family import RECIPES
from eft_serve.zoo.results import load_results

TEMPLATE = Path(__file__).parent / "data" / "card.template.md"
CARD = Path(__file__).parent / "README.md"


def write_card(results: Path, card: Path = CARD) -> Path:
    """Fills the template."""
    card.write_text(render(load_results(results)), encoding="utf-8")
    return card


def render(results: dict[str, Any]) -> str:
    """The card's text."""
    llama, falcon = (results["evaluation"][family]["systems"] for family in FAMILIES)
    counts = {key: results["evaluation"]["llama"][key] for key in ("num_short", "num_long", "num_harmful")}
    entities = load_facts()
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        counts,
        models=_models(results),
        table=_table(llama),
        falcon_table=_table(falcon),
        relations=_relations(llama),
        **_shown(llama),
        **{f"falcon_{key}": value for key, value in _shown(falcon, PREFIXES["falcon"]).items()},
        countries=sum(e.kind == "country" for e in entities),
        cities=sum(e.kind == "city" for e in entities),
        elements=sum(e.kind == "element" for e in entities),
        bfloat16=results["precision"]["llama"]["bfloat16_max_abs_logprob_change"],
        megabytes=f"{sum(c['bytes'] for c in results['checkpoints'].values()) / 1e6:.1f}",
    )


def _shown(rows: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """What the prose quotes of one family."""
    tuned, emulated, upper = (rows[name]["correct"] for name in (f"{prefix}tuned-small", "EFT", f"{prefix}tuned-large"))
    harmless = rows[f"{prefix}tuned-small-harmless"]
    return {
        "gain": f"{100 * (emulated - tuned):.1f}",
        "closed": f"{100 * (emulated - tuned) / (upper - tuned):.0f}",
        "form": _percent(rows["EFT"]["helpful_form"]),
        "base_form": _percent(rows[f"{prefix}base-large"]["helpful_form"]),
        "refused": _percent(harmless["harmful_declined"]),
        "over_refused": _percent(harmless["declined"]),
    }


def _models(results: dict[str, Any]) -> str:
    lines = ["| model | parameters | shape | trained from | steps | tokens | last loss | seconds |", "|---" * 8 + "|"]
    for name, run in results["training"].items():
        recipe = RECIPES[name]
        shape = recipe.architecture
        sizes = f"{shape.hidden} wide, {shape.layers} layers, {shape.heads} heads" if shape else "its parent's"
        if shape and shape.falcon_groups:
            sizes += f" in {shape.falcon_groups} groups"
        lines.append(
            f"| `{name}` | {run['parameters']:,} | {sizes} | {recipe.parent or 'scratch'} | {run['steps']:,} "
            f"| {run['tokens'] / 1e6:.2f} M | {run['final_loss']:.3f} | {run['wall_seconds']:,.0f} |"
        )
    return "\n".join(lines)


def _table(rows: dict[str, Any]) -> str:
    columns = ("correct", "helpful_form", "declined", "long_helpful_form", "long_facts", "harmful_declined")
    lines = [
        "| system | " + " | ".join(column.replace("_", " ") for column in columns) + " | tokens of a long answer |"
    ]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name, row in rows.items():
        cells = " | ".join(_percent(row[column]) for column in columns)
        lines.append(f"| {name} | {cells} | {row['long_tokens']:.0f} |")
    return "\n".join(lines)


def _relations(rows: dict[str, Any]) -> str:
    chosen = ("tuned-small", "base-large", "EFT", "tuned-large")
    lines = ["| relation | " + " | ".join(chosen) + " |", "|---" * (len(chosen) + 1) + "|"]
    for relation in rows["EFT"]["correct_by_relation"]:
        cells = " | ".join(_percent(rows[name]["correct_by_relation"][relation]) for name in chosen)
        lines.append(f"| {relation.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
