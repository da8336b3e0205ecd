"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from covgrpo_kernels.grpo.checkpoint import write_atomically

from .arms import ABLATIONS, ALL_ARMS, ARMS
from .report import MEASURES, Study
from .summary import Summaries

COLOURS = dict(zip(ARMS, matplotlib.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
STYLE: Any = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
CURVES = {  # in study.json: panel, unit
    "reward": ("Reward", "share of sampled responses that are right"),
    "entropy": ("Entropy", "nats a token"),
    "pass@1": ("Held-out pass@1", "share of sampled responses"),
    "pass@8": ("Held-out pass@8", "share of problems"),
}


def save_figures(summaries: Summaries, folder: Path) -> None:
    """study_curves.png; study_differences.png and study_ablations.png where there are arms to compare."""
    study = Study(summaries)
    save_curves(summaries, folder / "study_curves.png")
    with matplotlib.rc_context(STYLE):
        for name, baseline, among in (("differences", "grpo", ARMS), ("ablations", "cw_grpo", ABLATIONS)):
            rows = {task: [arm for arm in study.arms(task, among) if arm != baseline] for task in study.tasks}
            if any(rows.values()):
                _save(
                    _differences(study, {task: arms for task, arms in rows.items() if arms}, baseline),
                    folder / f"study_{name}.png",
                )


def save_curves(summaries: Summaries, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        _save(_curves(Study(summaries)), path)


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _curves(study: Study) -> Figure:
    """Means over seeds; for GRPO and CW-GRPO also the range of the seeds."""
    figure = Figure(figsize=(14, 3.4 * len(study.tasks)), layout="constrained")
    grid = figure.subplots(len(study.tasks), len(CURVES), squeeze=False)
    for row, task in zip(grid, study.tasks, strict=True):
        for axes, (name, (title, unit)) in zip(row, CURVES.items(), strict=True):
            axes.set_title(f"{title}, {task}", fontweight="bold", loc="left", pad=18)
            axes.text(0, 1.02, unit, transform=axes.transAxes, color="0.4", fontsize=8)
            axes.set_xlabel("step")
            for arm in reversed(study.arms(task, ARMS)):  # GRPO on top
                _curve(axes, [run["curves"] for run in study.runs_of(task, arm)], name, arm)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _curve(axes: Axes, curves: Sequence[dict[str, Any]], name: str, arm: str) -> None:
    steps = curves[0]["evaluated" if name.startswith("pass") else "step"]
    seeds = list(zip(*(curve[name] for curve in curves), strict=True))
    chief = arm in ("grpo", "cw_grpo")
    style: dict[str, Any] = dict(linewidth=2.0) if chief else dict(linewidth=1.0, alpha=0.8)
    axes.plot(steps, [fmean(point) for point in seeds], color=COLOURS[arm], label=ALL_ARMS[arm].title, **style)
    if chief:
        low, high = [min(point) for point in seeds], [max(point) for point in seeds]
        axes.fill_between(steps, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)


def _differences(study: Study, rows: dict[str, list[str]], baseline: str) -> Figure:
    """Thick: the interval of each on its own; thin: with all of the table in mind."""
    longest = max(map(len, rows.values()))
    figure = Figure(figsize=(14, (1.2 + 0.32 * longest) * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(MEASURES), squeeze=False)
    for line, (task, arms) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(task, fontweight="bold")
        comparisons = len(arms) * len(MEASURES)
        for axes, (measure, heading) in zip(line, MEASURES.items(), strict=True):
            axes.set_title(heading, fontweight="bold", loc="left")
            axes.axvline(0, color="0.4", linewidth=1)
            axes.set_yticks(
                range(len(arms)), [ALL_ARMS[arm].title for arm in arms] if axes is line[0] else [""] * len(arms)
            )
            axes.invert_yaxis()
            for place, arm in enumerate(arms):
                found = study.difference(task, arm, baseline, measure, comparisons)
                colour = "#c44e52" if found.survives else "#dd8452" if found.sign else "0.45"
                axes.plot([found.low_all, found.high_all], [place, place], color=colour, linewidth=1)
                axes.plot([found.low, found.high], [place, place], color=colour, linewidth=3)
                axes.plot(found.mean, place, "o", color=colour, markersize=5)
    figure.supxlabel(f"difference to {ALL_ARMS[baseline].title}")
    return figure
