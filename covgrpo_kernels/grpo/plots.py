"""report.png: what happened in one run, or in several side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .checkpoint import read_metrics, write_atomically

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3")
SMOOTH = 9  # steps of the running mean


class Run:
    def __init__(self, name: str, metrics: Path, colour: str) -> None:
        self.name, self.colour, self.rows = name, colour, read_metrics(metrics)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values, without the steps that have none."""
        points = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]


def save_report(runs: Mapping[str, Path], path: Path) -> None:
    """One picture of the metrics.jsonl of each run, by name."""
    loaded = [Run(name, metrics, colour) for (name, metrics), colour in zip(runs.items(), COLOURS, strict=False)]
    panels: list[tuple[str, str, Callable[[Axes, Run], Any]]] = [
        (
            "Reward",
            "share of sampled responses that are right",
            lambda ax, run: _noisy(ax, run, "reward/mean"),
        ),
        ("Held-out accuracy", "greedy, problems never trained on", _accuracy),
        ("Entropy", "nats a token", lambda ax, run: _noisy(ax, run, "entropy")),
        ("Covariance of log-prob and advantage", "median, 20-80% and 1-99% of the tokens", _covariance),
        ("Token weights", "effective share of tokens, and smallest to largest weight", _weights),
        (
            "Live rows",
            "share of tokens that cost a backward pass",
            lambda ax, run: _noisy(ax, run, "rows/live_fraction"),
        ),
    ]
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(13, 7), layout="constrained")
        for axes, (title, what, draw) in zip(figure.subplots(2, 3).flat, panels, strict=True):
            axes.set_title(title, fontweight="bold", loc="left", pad=18)
            axes.text(0, 1.02, what, transform=axes.transAxes, color="0.4", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel("step")
            for run in loaded:
                draw(axes, run)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _noisy(axes: Axes, run: Run, key: str) -> None:
    """Every step pale, their running mean strong."""
    steps, values = run.series(key)
    axes.plot(steps, values, color=run.colour, alpha=0.25, linewidth=1)
    means = []
    for i in range(len(values)):
        window = values[max(i - SMOOTH + 1, 0) : i + 1]
        means.append(sum(window) / len(window))
    axes.plot(steps, means, color=run.colour, linewidth=1.8, label=run.name)


def _accuracy(axes: Axes, run: Run) -> None:
    axes.plot(*run.series("eval/accuracy"), color=run.colour, marker="o", markersize=4)


def _covariance(axes: Axes, run: Run) -> None:
    axes.set_yscale("symlog", linthresh=0.1)
    for low, high, alpha in (("q01", "q99", 0.12), ("q20", "q80", 0.3)):
        steps, bottom = run.series(f"covariance/{low}")
        axes.fill_between(
            steps, bottom, run.series(f"covariance/{high}")[1], color=run.colour, alpha=alpha, linewidth=0
        )
    axes.plot(*run.series("covariance/q50"), color=run.colour, linewidth=1.5)


def _weights(axes: Axes, run: Run) -> None:
    steps, smallest = run.series("weight/min")
    axes.fill_between(steps, smallest, run.series("weight/max")[1], color=run.colour, alpha=0.15, linewidth=0)
    axes.plot(*run.series("weight/ess"), color=run.colour, linewidth=1.8)
