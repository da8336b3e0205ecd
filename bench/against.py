"""The time of a step in this checkout beside another one (a git worktree of an older commit, say), in processes that
alternate: what a change costs or gains."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from covgrpo_kernels.testing import rl_head

from . import checkouts
from .cases import HEADLINE
from .measure import environment, write_json
from .report import seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("against", type=Path, metavar="FOLDER", help="the other checkout, with its C++ extension built")
    parser.add_argument("--size", help="N,D,V; default: the headline's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="some of bfloat16,float32,float16; default: bfloat16, on a CPU float32 too")
    parser.add_argument("--repeats", type=int, default=2, help="steps of each kind in a process")
    parser.add_argument("--turns", type=int, default=3, help="processes for each checkout")
    parser.add_argument("--out", type=Path, help="JSON; default: none")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    folders = checkouts.named(arguments.against)
    n, d, v = map(int, arguments.size.split(",")) if arguments.size else HEADLINE[device.type]
    dtypes = arguments.dtype or ("bfloat16,float32" if device.type == "cpu" else "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.pt"
        torch.save(rl_head(0, n, d, v, device=device), inputs)
        words = ["time", str(inputs), str(arguments.repeats), dtypes]
        turns = checkouts.in_turns(folders, arguments.turns, dict.fromkeys(folders, words))
    report: dict[str, Any] = dict(environment=environment(device), size=dict(tokens=n, depth=d, vocab=v))
    report |= {name: dict(commit=checkouts.commit(folders[name]), turns=found) for name, found in turns.items()}
    if arguments.out:
        write_json(arguments.out, report)
    title = f"A step, N={n}, D={d}, V={v}: now {report['now']['commit']}, before {report['before']['commit']}"
    table = Table("", "now", "before", "now / before", "each turn", title=title)
    for name in turns["now"][0]:
        table.add_row(name, *_cells([turn[name] for turn in turns["now"]], [turn[name] for turn in turns["before"]]))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _cells(now: list[list[float]], before: list[list[float]]) -> list[str]:
    """From the seconds of each turn: medians with their range, their ratio, and the ratio in each turn."""

    def shown(turns: list[list[float]]) -> str:
        every = [*itertools.chain(*turns)]
        return f"{seconds(statistics.median(every))} ({seconds(min(every))} to {seconds(max(every))})"

    ratio = statistics.median(itertools.chain(*now)) / statistics.median(itertools.chain(*before))
    each = (statistics.median(a) / statistics.median(b) for a, b in zip(now, before, strict=True))
    return [shown(now), shown(before), f"{ratio:.3f}", ", ".join(f"{x:.3f}" for x in each)]
