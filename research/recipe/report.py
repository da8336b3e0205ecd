"""The report: what training and the benchmarks gave, beside what was published. Every number from a run's files."""

from __future__ import annotations

import math
from pathlib import Path

from covgrpo_kernels.grpo.checkpoint import write_atomically

from .config import Recipe
from .data import read_lines
from .evaluate import score, standard_error
from .train import LOG

FOLLOWED = {
    "reward": "reward",
    "rewards/accuracy_reward/mean": "accuracy",
    "rewards/format_reward/mean": "format",
    "entropy": "entropy (nats)",
    "completions/mean_length": "length (tokens)",
    "weight/min": "smallest weight",
    "weight/max": "largest weight",
}


def write_report(recipe: Recipe, out: Path, *, dry_run: bool) -> Path:
    lines = [f"# {recipe.model.name}, {recipe.trainer['output_dir']}", ""]
    if dry_run:
        lines = ["# Dry run", "", "A tiny model with random weights on made-up problems: the numbers mean nothing.", ""]
    lines += _training(out) + _benchmarks(recipe, out)
    text = "\n".join(lines) + "\n"
    write_atomically(out / "report.md", lambda file: file.write(text.encode()))
    return out / "report.md"


def _training(out: Path) -> list[str]:
    rows = [row for row in read_lines(out / LOG) if "reward" in row]
    share = max(len(rows) // 10, 1)
    lines = ["## Training", "", f"| mean over steps | first {share} | last {share} |", "|---|---|---|"]
    for key, name in FOLLOWED.items():
        if rows and all(key in row for row in rows):
            first, last = (sum(row[key] for row in part) / share for part in (rows[:share], rows[-share:]))
            lines.append(f"| {name} | {first:.4g} | {last:.4g} |")
    return [*lines, ""]


def _benchmarks(recipe: Recipe, out: Path) -> list[str]:
    benchmarks = recipe.evaluation.benchmarks
    published = list(dict.fromkeys(row for benchmark in benchmarks.values() for row in benchmark.paper))
    header = ["benchmark", "problems x samples", "before", "after", "change", *(f"published: {p}" for p in published)]
    table, notes, averages = [header, ["---"] * len(header)], [], []
    for name, benchmark in benchmarks.items():
        before, after = (score(out / "evaluation" / when / f"{name}.jsonl") for when in ("before", "after"))
        change = [b - a for a, b in zip(before.correct, after.correct, strict=True)]
        averages.append([before.pass_at_1, after.pass_at_1, *(benchmark.paper.get(p, math.nan) for p in published)])
        table.append(
            [
                name,
                f"{after.problems} x {benchmark.samples}",
                _with_error(before.pass_at_1, before.correct),
                _with_error(after.pass_at_1, after.correct),
                _with_error(100 * sum(change) / len(change), change),
                *(_published(benchmark.paper.get(p, math.nan)) for p in published),
            ]
        )
        notes.append(
            f"- {name}: responses of {before.tokens:.0f} tokens before and {after.tokens:.0f} after; cut off at "
            f"{recipe.evaluation.max_new_tokens}: {before.truncated:.1%} and {after.truncated:.1%}"
            + (f"; {after.unreadable} solutions cannot be read" if after.unreadable else "")
        )
    before, after, *rest = (sum(column) / len(averages) for column in zip(*averages, strict=True))
    table.append(["average", "", f"{before:.1f}", f"{after:.1f}", f"{after - before:.1f}", *map(_published, rest)])
    return [
        "## Benchmarks",
        "",
        "pass@1 in percent: the share of right responses to a problem, averaged over problems, ± the standard error "
        "over problems (of the change: paired by problem).",
        "",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        *notes,
    ]


def _with_error(percent: float, shares: list[float]) -> str:
    return f"{percent:.1f} ± {100 * standard_error(shares):.1f}"


def _published(percent: float) -> str:
    return "" if math.isnan(percent) else f"{percent:.1f}"
