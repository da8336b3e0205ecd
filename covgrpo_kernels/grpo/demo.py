"""`covgrpo demo`: GRPO and CW-GRPO from one warm start, with the same problems and seeds, side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import tiles
from .checkpoint import read_metrics
from .config import TrainConfig
from .plots import save_report
from .train import claim_folder, make_task, starting_policy, torch_device, train

RUNS = {"GRPO": "none", "CW-GRPO": "covariance"}


def demo(config: TrainConfig) -> None:
    """Fills OUT/warm_start, OUT/none and OUT/covariance; what is finished there is not done again."""
    out, console = Path(config.out), Console()
    # Products this small gain a quarter from a second thread, and lose much more where cores are shared.
    torch.set_num_threads(1)
    task, device = make_task(config), torch_device(config)
    claim_folder(out, config)
    console.print(f"The loss runs on {device}, backend {tiles.describe(device)}.")
    console.rule("one supervised warm start")
    starting_policy(config, task, out, device)
    runs = {}
    for name, weighting in RUNS.items():
        console.rule(name)
        folder = out / weighting
        train(dataclasses.replace(config, out=str(folder), weighting=weighting, model=str(out / "warm_start")))
        runs[name] = folder / "metrics.jsonl"
    save_report(runs, out / "report.png")
    console.print(summary({name: read_metrics(path) for name, path in runs.items()}))
    console.print(f"{out / 'report.png'}: the same as curves. To run the demo anew, delete {out}.")


def summary(runs: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(title="First and last tenth of the steps; held out: accuracy before and after")
    for column in ("", "reward", "held out", "entropy", "live rows", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, (before, *steps) in runs.items():
        tenth = max(len(steps) // 10, 1)

        def change(key: str, form: str, steps: list[dict[str, Any]] = steps, tenth: int = tenth) -> str:
            first, last = (mean(row[key] for row in part) for part in (steps[:tenth], steps[-tenth:]))
            return f"{first:{form}} -> {last:{form}}"

        table.add_row(
            name,
            change("reward/mean", ".2f"),
            f"{before['eval/accuracy']:.0%} -> {steps[-1]['eval/accuracy']:.0%}",
            change("entropy", ".2f"),
            change("rows/live_fraction", ".0%"),
            f"{sum(row['seconds/rollout'] + row['seconds/update'] for row in steps):.0f}",
        )
    return table
