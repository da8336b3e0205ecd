"""`covgrpo demo`: GRPO and CW-GRPO from one warm start, with the same problems and seeds, side by side."""

from __future__ import annotations

import dataclasses
from statistics import mean
from typing import Any

import torch

from .checkpoint import read_metrics
from .config import ALGORITHMS, TrainConfig
from .plots import save_report
from .train import start_run, train

ARMS = ("none", "covariance")


def demo(config: TrainConfig) -> None:
    """Fills OUT/warm_start, OUT/grpo and OUT/cw-grpo, and draws OUT/report.png."""
    # Products this small gain a quarter from a second thread, and lose much more where cores are shared.
    torch.set_num_threads(1)
    print("1. One supervised warm start")
    _, _, folder = start_run(config, "demo")
    runs = {}
    for number, weighting in enumerate(ARMS, 2):
        name = ALGORITHMS[weighting]
        print(f"{number}. {name} from it", flush=True)
        out = folder.path / name.lower()
        start = str(folder.path / "warm_start")
        train(dataclasses.replace(config, out=str(out), weighting=weighting, model=start, warm_start_steps=None))
        runs[name] = out / "metrics.jsonl"
    save_report(folder, runs)
    print(summary({name: read_metrics(path) for name, path in runs.items()}))
    print(f"{folder.path / 'report.png'}: the same as curves. To run the demo anew, delete {folder.path}.")


def summary(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A table: means over the first and the last tenth of the steps, and held-out accuracy before and after."""
    rows = [("", "reward", "held out", "entropy", "with gradient", "seconds")]
    for name, (before, *steps) in runs.items():
        ends = steps[: max(len(steps) // 10, 1)], steps[-max(len(steps) // 10, 1) :]
        reward, entropy, gradient = (
            " -> ".join(f"{mean(row[key] for row in end):{form}}" for end in ends)
            for key, form in (("reward/mean", ".2f"), ("entropy", ".2f"), ("rows/live_fraction", ".0%"))
        )
        accuracy = f"{before['eval/accuracy']:.0%} -> {steps[-1]['eval/accuracy']:.0%}"
        seconds = f"{sum(row['seconds/rollout'] + row['seconds/update'] for row in steps):.0f}"
        rows.append((name, reward, accuracy, entropy, gradient, seconds))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    note = "First and last tenth of the steps. With gradient: share of tokens that take part in the backward pass."
    return "\n".join(["", *lines, note])
