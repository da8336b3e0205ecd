"""From the runs to study.json: a line for each run, all that the report and its figures are made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any

from covgrpo_kernels.grpo.checkpoint import TrainingError, write_atomically

from .arms import ALL_ARMS
from .run import Results, RunSpec, read_run

POINTS = 25  # of a curve
Line = dict[str, Any]


def summary(results: Results) -> Line:
    """Six digits of everything. "Last" is the last tenth of the steps, "late" their last half."""
    settings, (before, *steps) = results.settings, results.steps
    last, late = steps[-max(len(steps) // 10, 1) :], steps[-max(len(steps) // 2, 1) :]
    first = steps[: len(last)]

    def over(rows: Sequence[dict[str, Any]], name: str) -> float:
        return fmean(row[name] for row in rows)

    line = {
        **{name: settings[name] for name in ("task", "arm", "seed")},
        "steps": len(steps),
        "seconds": results.whole["seconds"],
        "lr": results.whole["lr"],
        "tokens": sum(row["response/tokens"] for row in steps),
        "reward first": over(first, "reward/mean"),
        "reward": over(last, "reward/mean"),
        "entropy first": over(first, "entropy"),
        "entropy last": over(last, "entropy"),
        "entropy": over(late, "entropy"),
        "entropy variance": pvariance([row["entropy"] for row in late]),
        "gradient norm": over(steps, "optim/grad_norm"),
        "largest gradient norm": max(row["optim/grad_norm"] for row in steps),
        "advantages kept": over(steps, "advantages/kept"),
        "smallest weight": min(row["weight/min"] for row in steps),
        "largest weight": max(row["weight/max"] for row in steps),
        "effective share": over(steps, "weight/ess"),
        **{name: steps[-1][f"eval/{name}"] for name in ("pass@1", "pass@8")},
        **{f"{name} before": before[f"eval/{name}"] for name in ("pass@1", "pass@8")},
        **results.whole["covariance"],
        "covariance spread": over(steps, "covariance/std"),
        "curves": {
            "step": binned(steps, "step"),
            "reward": binned(steps, "reward/mean"),
            "entropy": binned(steps, "entropy"),
            "evaluated": [row["step"] for row in results.steps if "eval/pass@1" in row],
            **{k: [row[f"eval/{k}"] for row in results.steps if f"eval/{k}" in row] for k in ("pass@1", "pass@8")},
        },
    }
    return six_digits(line)


def binned(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Means over at most `POINTS` stretches of the steps."""
    size = -(-len(rows) // POINTS)
    return [fmean(row[name] for row in rows[i : i + size]) for i in range(0, len(rows), size)]


def six_digits(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: six_digits(part) for name, part in value.items()}
    if isinstance(value, list):
        return [six_digits(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Summaries:
    """The file study.json."""

    tasks: dict[str, dict[str, Any]]  # options of the runs, but for the learning rate, and how they were evaluated
    runs: list[Line]
    sweep: list[Line] = field(default_factory=list)  # "arm", "lr" and the "reward" at the end of a short run with it


def write_summaries(specs: Sequence[RunSpec], path: Path, sweep: Sequence[Line] = ()) -> Summaries:
    """A run a line. Runs of the file that are not among these stay in it, if they have the same options and the same
    start, and those of one arm the same learning rate: then seeds can be compared across them. Raises TrainingError if
    they have not."""
    tasks: dict[str, dict[str, Any]] = {}
    runs: dict[tuple[str, str, int], Line] = {}
    if path.exists():
        before = read_summaries(path)
        tasks, runs = before.tasks, {_key(line): line for line in before.runs}
    for spec in specs:
        results = read_run(spec.path)
        line, task = summary(results), {name: dict(results.settings[name]) for name in ("options", "evaluation")}
        del task["options"]["lr"]  # in the line: arms may differ in it
        others = [line, *(other for other in runs.values() if other["task"] == spec.task)]
        starts = {_start(other) for other in others}
        rates = {other["lr"] for other in others if other["arm"] == spec.arm and spec.after is None}
        if tasks.setdefault(spec.task, task) != task or len(starts) > 1 or len(rates) > 1:
            raise TrainingError(
                f"{path} has runs of {spec.task} with other options, another start or another learning rate of "
                f"{spec.arm}: choose a folder"
            )
        runs[_key(line)] = line
    order = {arm: place for place, arm in enumerate(ALL_ARMS)}
    lines = sorted(runs.values(), key=lambda line: (line["seed"], list(tasks).index(line["task"]), order[line["arm"]]))
    text = ",\n".join(map(json.dumps, lines))
    found = Summaries(tasks, lines, six_digits(list(sweep)))
    swept = f', "sweep": {json.dumps(found.sweep)}' if sweep else ""
    text = f'{{"tasks": {json.dumps(tasks)}{swept}, "runs": [\n{text}\n]}}\n'
    write_atomically(path, lambda file: file.write(text.encode()))
    return found


def _start(line: Line) -> tuple[float, float]:
    """Of the same problems, with the same random numbers."""
    return line["pass@1 before"], line["pass@8 before"]


def _key(line: Line) -> tuple[str, str, int]:
    return line["task"], line["arm"], line["seed"]


def read_summaries(path: Path) -> Summaries:
    return Summaries(**json.loads(path.read_text()))
