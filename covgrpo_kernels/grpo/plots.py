"""report.png: what happened in one run, or in several side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .checkpoint import RunFolder, write_atomically

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3")
# Metric, title, and pairs of metrics that bound bands around it.
PANELS: dict[str, tuple[str, dict[str, str]]] = {
    "reward/mean": ("Reward: share of sampled responses that are right", {}),
    "eval/accuracy": ("Held-out accuracy: most likely responses", {}),
    "entropy": ("Entropy, nats per token", {}),
    "covariance/q50": (
        "Covariance of log-prob and advantage:\nmedian, 20-80% and 1-99% of the tokens",
        {"covariance/q01": "covariance/q99", "covariance/q20": "covariance/q80"},
    ),
    "weight/ess": ("Token weights: effective share of tokens,\nsmallest to largest", {"weight/min": "weight/max"}),
    "rows/live_fraction": ("Share of tokens that the backward pass uses", {}),
}


def save_report(run: RunFolder, runs: Mapping[str, list[dict[str, Any]]]) -> None:
    """One picture of the metrics of each run, by name."""
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(13, 7), layout="constrained")
        for axes, (metric, (title, bands)) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
            axes.set_title(title, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel("step")
            if metric.startswith("covariance/"):
                axes.set_yscale("symlog", linthresh=0.1)
            for (name, steps), colour in zip(runs.items(), COLOURS, strict=False):
                _draw(axes, name, steps, colour, metric, bands)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
        mark = {"Description": f"covgrpo run {run.id}"}
        write_atomically(
            run.path / "report.png", lambda file: figure.savefig(file, format="png", dpi=130, metadata=mark)
        )


def _draw(axes: Axes, name: str, rows: list[dict], colour: str, metric: str, bands: dict[str, str]) -> None:
    """The steps that have the metric: every one pale, and their running mean strong."""
    rows = [row for row in rows if row.get(metric) is not None]
    steps, values = [row["step"] for row in rows], [row[metric] for row in rows]
    for low, high in bands.items():
        axes.fill_between(
            steps, [row[low] for row in rows], [row[high] for row in rows], color=colour, alpha=0.15, linewidth=0
        )
    window = max(len(values) // 10, 1)
    means = [sum(part) / len(part) for part in (values[max(i - window, 0) : i] for i in range(1, len(values) + 1))]
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axes.plot(steps, means, color=colour, linewidth=1.8, label=name, marker="o", markersize=4 if len(steps) < 12 else 0)
