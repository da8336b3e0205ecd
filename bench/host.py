"""The host's share of a step: the time of Python and of PyTorch's dispatcher with every launch replaced by nothing, and
how many launches and waits there are. Needs no GPU.

A GPU works while the host prepares what comes next, so that a step takes as long as the slower of both. Under the
interpreter, with the Triton kernels that a GPU would get, everything runs as it would there, but for what a launch
does: kernels and matrix products are recorded in a first step and replayed, with their time subtracted, and so are the
casts that products need on a CPU only. What is left is Python, PyTorch's dispatcher and allocations, and PyTorch's
remaining operators at a size that gives them nearly nothing to do. What is missing is what a launch costs the host
itself: that of a Triton kernel some 10 to 20 microseconds, that of an operator some 5. Where an engine checks the
values of tensors that are on a CPU, as it does not on a GPU, that is included, and is one of the forward's waits.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from covgrpo_kernels.config import IGNORE_INDEX
from covgrpo_kernels.testing import rl_head

from . import checkouts
from .measure import cpu_model, version, write_json

RESULT = Path(__file__).parent / "results" / "host.json"
ENGINES = ("chunked", "fused_gpu")

# 30 slices of the vocabulary by the chunked engine on a CPU, as many as a vocabulary of 128,256 has on an H200. Rows
# are few, so that operators on one number a row take no time, and so that the interpreter needs a minute, not ten.
SIZE = dict(tokens=64, depth=32, vocab=30 * 2048)
TOY = dict(tokens=48, depth=16, vocab=2 * 2048)

# Memory that was freed stays with the process, as CUDA's allocator keeps it: else each large tensor costs the host some
# hundred page faults.
VARIABLES = dict(
    TRITON_INTERPRET="1", COVGRPO_BACKEND="triton", OMP_NUM_THREADS="1", MALLOC_MMAP_MAX_="0",
    MALLOC_TRIM_THRESHOLD_=str(1 << 40),
)  # fmt: skip

HEADER = ["", "forward", "backward", "step", "launches, forward + backward", "waits, forward + backward"]
PARTS = ("forward", "backward")

# By name of the step, part of it and quantity.
Counts = dict[str, dict[str, dict[str, float]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another checkout, measured in turns with this one"
    )
    parser.add_argument("--engine", choices=ENGINES, help="of this checkout; default: the one a GPU would get")
    parser.add_argument("--repeats", type=int, default=30, help="steps in a process, of which the median is taken")
    parser.add_argument(
        "--turns", type=int, default=3, help="processes for each checkout, of which the median is taken"
    )
    parser.add_argument("--toy", action="store_true", help="a size that tests the command")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON; default: %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    folders = checkouts.named(arguments.against)
    size = TOY if arguments.toy else SIZE
    seconds = (8 if arguments.toy else 40) * arguments.turns * len(folders)
    print(f"{arguments.turns} processes for each of {len(folders)} checkouts: some {seconds} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.pt"
        torch.save(_inputs(**size), inputs)
        words = {name: ["host", str(inputs), str(arguments.repeats)] for name in folders}
        words["now"] += [arguments.engine] if arguments.engine else []
        found = checkouts.in_turns(folders, arguments.turns, words, **VARIABLES)
    report = dict(environment=_environment(), size=size, engine=arguments.engine)
    report |= {
        name: dict(commit=checkouts.commit(folders[name]), steps=_median(turns), turns=turns)
        for name, turns in found.items()
    }
    write_json(arguments.out, report)
    table = Table(title=describe(report))
    for i, title in enumerate(HEADER):
        table.add_column(title, justify="left" if i == 0 else "right")
    for row in rows(report):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(arguments.out)


def _inputs(tokens: int, depth: int, vocab: int) -> dict[str, Any]:
    """Every eighth row has no target: there are too few rows for `rl_head` to pad responses."""
    head = rl_head(0, tokens, depth, vocab)
    head["targets"][::8] = IGNORE_INDEX
    head["logprob_grad"][::8] = 0
    return head


def _median(turns: list[Counts]) -> Counts:
    """Of every number."""

    def of(*values: Any) -> Any:
        if isinstance(values[0], dict):
            return {key: of(*(value[key] for value in values)) for key in values[0]}
        return statistics.median(values)

    return of(*turns)


def _environment() -> dict[str, Any]:
    return dict(cpu=cpu_model(), python=platform.python_version(), torch=torch.__version__, triton=version("triton"))


# ------------------------------------------------------------------------------------------------- what it says


def describe(report: dict[str, Any]) -> str:
    size, where = report["size"], report["environment"]
    commits = ", ".join(f"{name} {report[name]['commit']}" for name in ("now", "before") if name in report)
    return (
        f"The host's time, bfloat16, N={size['tokens']}, D={size['depth']}, V={size['vocab']}, on {where['cpu']}, "
        f"one thread, Python {where['python']}, torch {where['torch']}, triton {where['triton']}; commits: {commits}"
    )


def rows(report: dict[str, Any]) -> list[list[str]]:
    """A row for each step; one more with what it was before, and the share of that."""
    result = []
    for name, now in report["now"]["steps"].items():
        result.append([name, *_cells(now)])
        if "before" in report:
            before = report["before"]["steps"][name]
            share = _step_seconds(now) / _step_seconds(before)
            cells = _cells(before)
            cells[2] += f" (now {share:.2f} of it)"
            result.append([f"{name}, before", *cells])
    return result


def _step_seconds(step: dict[str, dict[str, float]]) -> float:
    return sum(step[part]["seconds"] for part in PARTS)


def _cells(step: dict[str, dict[str, float]]) -> list[str]:
    launches = " + ".join(f"{step[part]['operators'] + step[part]['kernels']:.0f}" for part in PARTS)
    waits = " + ".join(f"{step[part]['waits']:.0f}" for part in PARTS)
    times = [step[part]["seconds"] for part in PARTS]
    return [*(f"{1e3 * x:.1f} ms" for x in (*times, sum(times))), launches, waits]
