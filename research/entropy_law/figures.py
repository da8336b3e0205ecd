"""What was found, as a picture: entropy_law.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from covgrpo_kernels.grpo.checkpoint import write_atomically

from .law import OPTIMIZERS, STATES, UPDATES
from .report import between
from .statistics import chosen, middle, reported, stage_of

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3")


def draw(results: dict[str, Any]) -> Figure:
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(15, 8), layout="constrained")
        law, own, fresh, orders, correlations, parts = figure.subplots(2, 3).flat
        _draw_law(law, results["stages"][0]["logits"])
        _draw_scatter(own, results, "own", "The batch's own states")
        _draw_scatter(fresh, results, "fresh", "Fresh states")
        _draw_orders(orders, results)
        _draw_correlations(correlations, results)
        _draw_parts(parts, results)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def _title(axes: Axes, title: str, what: str) -> None:
    axes.set_title(title, fontweight="bold", loc="left", pad=18)
    axes.text(0, 1.02, what, transform=axes.transAxes, color="0.4", fontsize=8)


def _legend(axes: Axes, **place: Any) -> None:
    axes.legend(frameon=False, fontsize=7, **place).set_in_layout(False)


def _after(stage: dict[str, Any]) -> str:
    return f"after {stage['grpo_steps']} steps"


def _draw_law(axes: Axes, logits: dict[str, Any]) -> None:
    _title(axes, "The law in the logits", "error of dH = -Cov(log p, dz), root mean square, nats")
    for (name, law), colour in zip(logits["laws"].items(), COLOURS, strict=False):
        axes.loglog(logits["step"], law["change"], color=colour, linestyle=":")
        axes.loglog(
            logits["step"], law["error"], color=colour, marker="o", markersize=4,
            label=f"{name}: step^{law['slope']:.2f}",
        )  # fmt: skip
    axes.set_xlabel("step; dotted: the change itself")
    _legend(axes)


def _draw_scatter(axes: Axes, results: dict[str, Any], states: str, title: str) -> None:
    step = middle(results, "AdamW")
    _title(axes, title, f"one AdamW step of {step:g}, change in 1e-3 nats")
    for stage, colour in zip(reported(results), COLOURS, strict=False):
        [row] = [
            r for r in stage["changes"] if (r["optimizer"], r["step"], r["update"]) == ("AdamW", step, "all")
        ]  # fmt: skip
        [found] = chosen(results, "laws", **stage_of(stage), optimizer="AdamW", states=states, law="covariance")
        label = f"{_after(stage)}: r = {between(found['correlation'])}"
        axes.scatter(stage["predicted"]["covariance"], [1000 * v for v in row[states]], s=12, color=colour, label=label)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("minus the mean covariance of the batch")
    _legend(axes)


def _draw_orders(axes: Axes, results: dict[str, Any]) -> None:
    _title(axes, "How far the first order reaches", "error of the gradient in the parameters, of the change")
    for stage, style in zip(reported(results), ("-", "--", ":"), strict=False):
        for optimizer, colour in zip(OPTIMIZERS, COLOURS, strict=False):
            rows = [r for r in stage["changes"] if (r["optimizer"], r["update"]) == (optimizer, "all")]
            errors = [
                np.abs(np.subtract(r["own"], r["own, first order"])).mean() / np.abs(r["own"]).mean() for r in rows
            ]
            steps = [r["step"] for r in rows]
            axes.loglog(
                steps, errors, style, color=colour, marker="o", markersize=4, label=f"{optimizer}, {_after(stage)}"
            )
    axes.set_xlabel("step size")
    _legend(axes)


def _draw_correlations(axes: Axes, results: dict[str, Any]) -> None:
    step = middle(results, "AdamW")
    _title(axes, "What tells the change", f"correlation over batches, AdamW {step:g}")
    marks = [(stage, states) for stage in reported(results) for states in STATES]
    for i, (stage, states) in enumerate(marks):
        rows = list(chosen(results, "laws", **stage_of(stage), optimizer="AdamW", states=states))
        axes.set_yticks(range(len(rows)), [row["law"] for row in rows])
        label = f"{states}, {_after(stage)}"
        _dots(axes, [row["correlation"] for row in rows], i, len(marks), label)
    axes.invert_yaxis()
    axes.axvline(0, color="0.6", linewidth=0.8)
    _legend(axes, loc="lower left")


def _draw_parts(axes: Axes, results: dict[str, Any]) -> None:
    step = middle(results, "AdamW")
    _title(axes, "Which tokens move it", f"own states, AdamW {step:g}, change in 1e-3 nats")
    for i, stage in enumerate(reported(results)):
        rows = list(chosen(results, "updates", **stage_of(stage), optimizer="AdamW", states="own"))
        axes.set_yticks(range(len(rows)), [UPDATES[row["update"]] for row in rows])
        changes = [[1000 * v for v in row["change"]] for row in rows]
        _dots(axes, changes, i, len(reported(results)), _after(stage))
    axes.invert_yaxis()
    axes.axvline(0, color="0.6", linewidth=0.8)
    _legend(axes)


def _dots(axes: Axes, found: list[list[float]], i: int, of: int, label: str) -> None:
    values, low, high = np.array(found).T
    places = np.arange(len(found)) + (i - (of - 1) / 2) * 0.6 / of
    axes.errorbar(
        values, places, xerr=[values - low, high - values], fmt="o", markersize=4, color=COLOURS[i], label=label
    )


def save_figure(results: dict[str, Any], out: Path) -> None:
    write_atomically(out / "entropy_law.png", lambda file: draw(results).savefig(file, format="png", dpi=110))
