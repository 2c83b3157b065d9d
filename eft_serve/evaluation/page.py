"""The page of results: prose from a template, every figure from the JSON of a run. Knows both shapes; measures nothing.

A `section` is one family's tables of a part; the template asks for a part and gets all families.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from eft_serve.evaluation.claims import CLAIMS

TEMPLATE = Path(__file__).parent / "data" / "results.template.md"
FIGURES_NAME = "figures.json"

Section = Callable[[Mapping[str, Any]], str]


def write(output: Path, figures: Mapping[str, Any]) -> None:
    """The page, and beside it, in a directory of its name, the figures that it was made from."""
    directory = output.with_suffix("")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FIGURES_NAME).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    output.write_text(render(figures), encoding="utf-8")


def render(figures: Mapping[str, Any]) -> str:
    """The template filled; KeyError where the figures lack something that the template asks for."""
    sections = {part: _by_family(figures[part], section) for part, section in SECTIONS.items()}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        sections, run=_run(figures), claims=_claims(figures), **figures["questions"]
    )


def tables(part: str, figures: Mapping[str, Any]) -> str:
    """One part's tables, for a terminal."""
    return _by_family(figures[part], SECTIONS[part])


def headline(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The main figures, by family."""
    return {
        family: {
            "up_scaled_gain": figures["grid"][family]["gain"]["up-scaled"]["correct"],
            "up_scaled_normalised": figures["grid"][family]["normalised"]["up-scaled"]["correct"],
            "down_scaled_normalised": figures["grid"][family]["normalised"]["down-scaled"]["correct"],
            "control_over_eft": figures["knobs"][family]["control"]["1"]["gain"]["correct"],
            "greedy_acceptance": figures["tokens"][family]["greedy"]["acceptance"],
            "classic_acceptance": figures["tokens"][family]["1"]["classic"],
            "keyed_acceptance": figures["tokens"][family]["1"]["coupled"],
        }
        for family in figures["grid"]
    } | {"minutes": figures["minutes"]}


def _by_family(found: Mapping[str, Any], section: Section) -> str:
    return "\n\n".join(f"**{family.capitalize()}**\n\n{section(each)}" for family, each in found.items())


def _run(figures: Mapping[str, Any]) -> str:
    machine = figures["machine"]
    cost = " and ".join(f"{minutes:g}" for minutes in figures["core_minutes"].values())
    return (
        f"Run on {figures['date']} in {figures['minutes']:g} minutes by the clock, {cost} minutes of computing in one "
        f"process for each family, on {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"Python {machine['python']}"
    )


def _claims(figures: Mapping[str, Any]) -> str:
    families = list(figures["grid"])
    rows = []
    for claim in CLAIMS:
        cells = []
        for family in families:
            own = {part: figures[part][family] for part in SECTIONS}
            cells += [_number(claim.measured(own)), claim.verdict(own)]
        rows.append([claim.text, claim.wanted, *cells])
    heads = [head for family in families for head in (family.capitalize(), "verdict")]
    return _table(["claim", "wanted", *heads], rows)


def _grid(found: Mapping[str, Any]) -> str:
    shares = _shares("system", found["shares"])
    measures = list(found["gap"])
    rows = [["gap: both large - both small", *(_points(found["gap"][m]) for m in measures)]]
    for name in found["gain"]:
        rows.append([f"{name}: gain over both small", *(_points(found["gain"][name][m]) for m in measures)])
        rows.append([f"{name}: normalised", *(_number(found["normalised"][name][m]) for m in measures)])
    return shares + "\n\n" + _table(["", *measures], rows)


def _frontier(found: Mapping[str, Any]) -> str:
    curves = found["curves"]
    measures = list(next(iter(next(iter(curves.values())).values())))
    rows = [
        [helpful, *(_percent(curves[name][helpful][m]) for name in curves for m in measures)]
        for helpful in next(iter(curves.values()))
    ]
    return _table(["λ", *(f"{name}: {m}" for name in curves for m in measures)], rows)


def _knobs(found: Mapping[str, Any]) -> str:
    labels = {"scale": "scale β =", "weight": "weight α =", "control": "no reference, α ="}
    rows = [
        [
            f"{labels[name]} {knob}",
            *(_percent(estimate) for estimate in row["shares"].values()),
            *(_points(estimate) for estimate in row["gain"].values()),
        ]
        for name, series in found.items()
        for knob, row in series.items()
    ]
    measures = list(found["scale"]["1"]["shares"])
    return _table(["knob (the others 1)", *measures, *(f"{m}: gain over EFT" for m in measures)], rows)


def _truncation(found: Mapping[str, Any]) -> str:
    rows = []
    for scale, series in found.items():
        for top_p, row in series.items():
            gains = [*row["gain"].values(), row["correct_over_eft"]]
            rows.append([scale, top_p, *map(_percent, row["shares"].values()), *map(_points, gains)])
    measures = list(found["1"]["none"]["shares"])
    return _table(
        ["scale β", "p", *measures, *(f"{m}: gain over none" for m in measures), "correct: gain over EFT at 1"], rows
    )


def _tokens(found: Mapping[str, Any]) -> str:
    greedy, sampled = found["greedy"], {name: row for name, row in found.items() if name != "greedy"}
    names = {
        "share_near": "total variation below 0.1",
        "share_far": "total variation above 0.5",
        "classic": "accepted, classic (1 - total variation)",
        "coupled": "accepted, keyed draw (expected)",
        "drawn": "accepted, keyed draw (drawn)",
    }
    rows = [["tokens", f"{greedy['num_tokens']:,}", *(f"{row['num_tokens']:,}" for row in sampled.values())]]
    rows.append(["total variation: mean", "", *(f"{row['mean']:.3f}" for row in sampled.values())])
    rows.append(["total variation: median", "", *(f"{row['median']:.4f}" for row in sampled.values())])
    rows += [[label, "", *(_percent(row[key]) for row in sampled.values())] for key, label in names.items()]
    rows.append(["accepted, greedy", _percent(greedy["acceptance"]), *[""] * len(sampled)])
    for block in (4, 8):
        per_step = _number(greedy[f"tokens_per_verification_{block}"])
        rows.append([f"tokens per verification, block of {block}", per_step, *[""] * len(sampled)])
    return _table(["", "greedy", *(f"temperature {temperature}" for temperature in sampled)], rows)


def _perplexity(found: Mapping[str, Any]) -> str:
    systems = list(next(iter(found.values()))["perplexity"])
    rows = [
        [name, *(_number(row[key][name], 3) for row in found.values() for key in ("perplexity", "over_tuned_small"))]
        for name in systems
    ]
    heads = [
        head
        for name, row in found.items()
        for head in (f"{name} ({row['num_tokens']:,} tokens)", "as a multiple of tuned-small's")
    ]
    return _table(["system", *heads], rows)


def _shares(label: str, rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    measures = list(next(iter(rows.values())))
    return _table([label, *measures], [[name, *(_percent(row[m]) for m in measures)] for name, row in rows.items()])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(estimate: Sequence[float]) -> str:
    value, low, high = (100 * each for each in estimate)
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def _points(estimate: Sequence[float]) -> str:
    value, low, high = (100 * each for each in estimate)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _number(estimate: Sequence[float] | None, digits: int = 2) -> str:
    if estimate is None:
        return "—"
    value, low, high = estimate
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


SECTIONS: Mapping[str, Section] = {
    "grid": _grid,
    "frontier": _frontier,
    "knobs": _knobs,
    "truncation": _truncation,
    "tokens": _tokens,
    "perplexity": _perplexity,
}
