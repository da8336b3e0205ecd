"""`covgrpo demo`: GRPO and CW-GRPO from one warm start, with the same problems and seeds, side by side."""

from __future__ import annotations

import dataclasses
from statistics import mean
from typing import Any

import torch

from .config import ALGORITHMS, TrainConfig
from .logs import read_metrics
from .plots import save_report
from .train import evaluated, start_run, train


def demo(config: TrainConfig) -> None:
    """Fills OUT/warm_start, OUT/grpo and OUT/cw-grpo, and draws OUT/report.png."""
    # Products this small gain a quarter from a second thread, and lose much more where cores are shared.
    torch.set_num_threads(1)
    print("1. One supervised warm start", flush=True)
    _, _, folder = start_run(config, "demo")
    runs = {}
    for number, weighting in enumerate(("none", "covariance"), 2):
        name = ALGORITHMS[weighting]
        print(f"{number}. {name} from it", flush=True)
        out = folder.path / name.lower()
        train(dataclasses.replace(config, out=str(out), weighting=weighting), start=folder.path / "warm_start")
        runs[name] = read_metrics(out / "metrics.jsonl")
    save_report(folder, runs)
    print(summary(runs))
    print(f"{folder.path / 'report.png'}: the same as curves.\nTo run the demo anew, delete {folder.path}.")


def summary(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A table: means over the first and the last tenth of the steps, and held-out accuracy before and after."""
    table = [("", "reward", "held out", "entropy", "tokens used", "seconds")]
    for name, rows in runs.items():
        before, last, steps = rows[0], evaluated(rows)[-1], rows[1:]
        tenth = max(len(steps) // 10, 1)
        reward, entropy, used = (
            " -> ".join(f"{mean(row[key] for row in end):{form}}" for end in (steps[:tenth], steps[-tenth:]))
            for key, form in (("reward/mean", ".2f"), ("entropy", ".2f"), ("rows/live_fraction", ".0%"))
        )
        accuracy = f"{before['eval/accuracy']:.0%} -> {last['eval/accuracy']:.0%}"
        seconds = f"{sum(row['seconds'] for row in steps):.0f}"
        table.append((name, reward, accuracy, entropy, used, seconds))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    note = "First and last tenth of the steps. Tokens used: the share that takes part\nin the backward pass."
    return "\n".join(["", *lines, note])
