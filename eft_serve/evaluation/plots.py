"""Pictures of the figures, one PNG a part, one column of panels a family. Knows the figures' shape and matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Draw = Callable[[Axes, Mapping[str, Any]], None]  # one panel of one family's figures


def draw_all(figures: Mapping[str, Any], directory: Path) -> None:
    """Write `PART.png` for every part that the figures have."""
    directory.mkdir(parents=True, exist_ok=True)
    for part, rows in PANELS.items():
        if part in figures:
            _draw(figures[part], rows, directory / f"{part}.png")


def _draw(by_family: Mapping[str, Any], rows: Sequence[Draw], path: Path) -> None:
    size = (5.2 * len(by_family), 3.6 * len(rows))
    figure, axes = plt.subplots(len(rows), len(by_family), figsize=size, squeeze=False, layout="constrained")
    for row, draw in enumerate(rows):
        for column, (family, found) in enumerate(by_family.items()):
            draw(axes[row][column], found)
            if row == 0:
                axes[row][column].set_title(family.capitalize())
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _grid(axes: Axes, found: Mapping[str, Any]) -> None:
    shares = {name: row for name, row in found["shares"].items() if not name.startswith("base")}
    measures = list(next(iter(shares.values())))
    for place, (name, row) in enumerate(shares.items()):
        positions = [index + 0.2 * (place - 1.5) for index in range(len(measures))]
        values, errors = _with_errors([row[measure] for measure in measures])
        label = name.replace("pre-training ", "").replace("fine-tuning ", "")
        axes.bar(positions, values, 0.18, yerr=errors, capsize=2, label=label)
    axes.set_xticks(range(len(measures)), measures)
    axes.set_ylim(0, 1.05)
    title = "pre-training, fine-tuning"
    axes.legend(title=title, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(shares))


def _frontier(measure: str) -> Draw:
    def draw(axes: Axes, found: Mapping[str, Any]) -> None:
        for name, curve in found["curves"].items():
            xs = [row[measure][0] for row in curve.values()]
            ys = [row["harmful declined"][0] for row in curve.values()]
            axes.plot(xs, ys, marker="o", label=name)
            for helpful in ("0", "0.2", "1"):
                place = list(curve).index(helpful)
                axes.annotate(f"λ {helpful}", (xs[place], ys[place]), textcoords="offset points", xytext=(5, 4))
        axes.set_xlabel(measure)
        axes.set_ylabel("harmful declined")
        axes.set_ylim(-0.05, 1.1)
        axes.legend(fontsize="small")

    return draw


def _knob(name: str) -> Draw:
    def draw(axes: Axes, found: Mapping[str, Any]) -> None:
        for measure in ("correct", "helpful form"):
            _line(axes, found[name], measure, measure)
            if name == "weight":
                _line(axes, found["control"], measure, f"{measure}, no reference", linestyle=":")
        axes.set_xlabel(f"{name} ({'β' if name == 'scale' else 'α'})")
        axes.set_ylim(0, 1.05)
        axes.legend(fontsize="small")

    return draw


def _line(axes: Axes, rows: Mapping[str, Any], measure: str, label: str, linestyle: str = "-") -> None:
    values, errors = _with_errors([row["shares"][measure] for row in rows.values()])
    axes.errorbar(list(map(float, rows)), values, errors, marker="o", capsize=2, label=label, linestyle=linestyle)


def _truncation(axes: Axes, found: Mapping[str, Any]) -> None:
    for scale, rows in found.items():
        for measure, style in (("correct", "-"), ("helpful form", ":")):
            values, errors = _with_errors([row["shares"][measure] for row in rows.values()])
            axes.errorbar(range(len(rows)), values, errors, label=f"{measure}, β {scale}", linestyle=style, capsize=2)
        axes.set_xticks(range(len(rows)), list(rows))
    axes.set_xlabel("p")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize="small")


def _tokens(axes: Axes, found: Mapping[str, Any]) -> None:
    for temperature in ("0.7", "1"):
        counts = found[temperature]["histogram"]
        edges = [index / len(counts) for index in range(len(counts) + 1)]
        shares = [count / sum(counts) for count in counts]
        axes.stairs(shares, edges, label=f"temperature {temperature}", fill=temperature == "1", alpha=0.6)
    axes.set_yscale("log")
    axes.set_xlabel("total variation between the small tuned model and EFT")
    axes.set_ylabel("share of tokens")
    axes.legend(fontsize="small")


def _perplexity(axes: Axes, found: Mapping[str, Any]) -> None:
    for place, (name, row) in enumerate(found.items()):
        systems = list(row["perplexity"])
        values, errors = _with_errors(list(row["perplexity"].values()))
        positions = [index + 0.2 * (2 * place - 1) for index in range(len(systems))]
        axes.barh(positions, values, 0.36, xerr=errors, capsize=2, label=name)
        axes.set_yticks(range(len(systems)), systems)
    axes.set_xlim(left=1)
    axes.invert_yaxis()
    axes.set_xlabel("perplexity of a token")
    axes.legend(fontsize="small")


def _with_errors(estimates: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    values = [value for value, _, _ in estimates]
    below = [value - low for value, low, _ in estimates]
    above = [high - value for value, _, high in estimates]
    return values, [below, above]


PANELS: Mapping[str, Sequence[Draw]] = {
    "grid": [_grid],
    "frontier": [_frontier("helpful form"), _frontier("correct")],
    "knobs": [_knob("scale"), _knob("weight")],
    "truncation": [_truncation],
    "tokens": [_tokens],
    "perplexity": [_perplexity],
}
