"""The comparison: cases, dtypes and contenders chosen, a table in the terminal, and a file of JSON for each case."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from covgrpo_kernels.benchmark import Contender, Problem, free_bytes, timed
from covgrpo_kernels.testing import POLICIES

from .cases import Case, Point, all_cases, policy_points
from .compare import compare, lines, noise
from .contenders import CONTENDERS
from .measure import environment, gpu_profile, write_json
from .record import load
from .report import HEADER, RESULTS, cells, certificate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    everything = [case.name for case in all_cases("cpu")]
    parser.add_argument("--cases", help=f"all, or some of {', '.join(everything)}; default: headline; --smoke: all")
    parser.add_argument("--contenders", help="by name, commas between them; default: all that run here")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), help="default: as the case says")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender")
    parser.add_argument("--size", help="N,D,V instead of the cases: RL-like inputs of your own size")
    parser.add_argument(
        "--policies", help=f"of the headline and of --size: some of {', '.join(POLICIES)}; default: all; --smoke: one"
    )
    parser.add_argument("--inputs", type=Path, help="instead of the cases: a file that `record` wrote")
    parser.add_argument(
        "--smoke", action="store_true", help="toy sizes, one turn; nothing is written unless --out is given"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print, and write as text, where steps of ours spend time"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder of the results; default: {RESULTS.parent.name}/{RESULTS.name}"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    device = torch.device(arguments.device)
    cases = _cases(arguments, device.type)
    if not arguments.smoke:
        console.print(f"this takes some {_minutes(_expected_seconds(cases, arguments, device))}")
    for case in cases:
        for dtype in _dtypes(arguments, case, device.type):
            _run_case(case, dtype, device, arguments, console)


def _run_case(case: Case, dtype: str, device: torch.device, arguments: argparse.Namespace, console: Console) -> None:
    report: dict[str, Any] = dict(
        case=case.name, what=case.what, dtype=dtype, device=device.type, environment=environment(device), points=[]
    )
    files = _Files(report, _out(arguments))
    for point in case.points:
        free = free_bytes(device)
        if free is not None and free < point.needed_bytes:
            gib = f"{point.needed_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            console.print(f"{case.name}, {point.label}: left out, since it needs {gib}")
            continue
        try:
            made = _measure(point, case, getattr(torch, dtype), device, arguments, console, files.keep)
        except AssertionError:
            files.drop()
            raise
        files.add(made)
        _show(console, report, made)


def _out(arguments: argparse.Namespace) -> Path | None:
    return arguments.out or (None if arguments.smoke else RESULTS)


class _Files:
    """Where a report goes, if there is a folder: one file of whole points, and while a point is measured another one
    with what there is by then, which stays if the run is cut off."""

    def __init__(self, report: dict[str, Any], folder: Path | None) -> None:
        self.report = report
        name = f"{report['device']}_{report['case']}_{report['dtype']}"
        self._whole, self._unfinished = (folder and folder / f"{name}{suffix}" for suffix in (".json", ".unfinished"))

    def keep(self, point: dict[str, Any]) -> None:
        if self._unfinished:
            write_json(self._unfinished, self.report | dict(points=[*self.report["points"], point]))

    def add(self, point: dict[str, Any]) -> None:
        self.report["points"].append(point)
        if self._whole:
            write_json(self._whole, self.report)
        self.drop()

    def drop(self) -> None:
        if self._unfinished:
            self._unfinished.unlink(missing_ok=True)


# What a step of a contender takes, in bare forward products of the same size, and what else takes time: a process that
# measures memory on a CPU, and compilers. Medians of the results that are committed.
STEP_UNITS, PROCESS_SECONDS, COMPILE_SECONDS = 6, 7, 15


def _expected_seconds(cases: list[Case], arguments: argparse.Namespace, device: torch.device) -> float:
    """From the speed of a product now."""
    total = 0.0
    for case in cases:
        for dtype in (getattr(torch, name) for name in _dtypes(arguments, case, device.type)):
            field = _contenders(arguments, case, dtype)
            in_process = device.type == "cpu" and case.memory
            for point in case.points:
                n, d, v = point.size
                hidden, weight = (torch.ones(rows, max(d, 1), dtype=dtype, device=device) for rows in (256, 4096))
                product = min(timed(partial(torch.mm, hidden, weight.t()), device)[0] for _ in range(3))
                unit = product * (n / len(hidden)) * (v / len(weight))
                # The inputs and the exact results take as much as a contender or two.
                total += STEP_UNITS * unit * (len(field) * (arguments.repeats + in_process) + 2)
                total += PROCESS_SECONDS * len(field) * in_process
                total += COMPILE_SECONDS * sum(device.type == "cuda" or c.compiles for c in field)
    return total


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _cases(arguments: argparse.Namespace, kind: str) -> list[Case]:
    if arguments.inputs:
        # The sizes are those of the file.
        return [Case("replay", arguments.inputs.name, [Point("recorded", (0, 0, 0), partial(load, arguments.inputs))])]
    policies = arguments.policies.split(",") if arguments.policies else None
    if unknown := set(policies or ()) - set(POLICIES):
        sys.exit(f"unknown policies: {', '.join(sorted(unknown))}; there are: {', '.join(POLICIES)}")
    if arguments.size:
        n, d, v = map(int, arguments.size.split(","))
        points = policy_points((n, d, v), policies or list(POLICIES))
        return [Case("custom", "a size of your own", points, memory=True)]
    cases = all_cases(kind, arguments.smoke, policies)
    chosen = arguments.cases or ("all" if arguments.smoke else "headline")
    if chosen == "all":
        return cases
    names = chosen.split(",")
    if unknown := set(names) - {case.name for case in cases}:
        sys.exit(f"unknown cases: {', '.join(sorted(unknown))}")
    return [case for case in cases if case.name in names]


def _dtypes(arguments: argparse.Namespace, case: Case, kind: str) -> list[str]:
    if arguments.dtype:
        return [arguments.dtype]
    return ["bfloat16", "float32"] if case.both_dtypes and kind == "cpu" else ["bfloat16"]


def _contenders(arguments: argparse.Namespace, case: Case, dtype: torch.dtype) -> list[Contender]:
    if arguments.contenders:
        names = [name.strip() for name in arguments.contenders.split(",")]
        if unknown := set(names) - {c.name for c in CONTENDERS}:
            sys.exit(
                f"unknown contenders: {', '.join(sorted(unknown))}; there are: {', '.join(c.name for c in CONTENDERS)}"
            )
        return [c for c in CONTENDERS if c.name in names]
    # A smoke run has no time to compile more than once.
    once = case.name == "headline" and dtype == torch.bfloat16
    return [c for c in CONTENDERS if once or not (arguments.smoke and c.compiles)]


def _measure(
    point: Point, case: Case, dtype: torch.dtype, device: torch.device, arguments: argparse.Namespace, console: Console,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    start = time.monotonic()
    problem = point.problem(dtype, device)
    contenders = _contenders(arguments, case, dtype)

    def memory(contender: Contender) -> bool:
        if device.type == "cuda" or not arguments.smoke:
            return device.type == "cuda" or case.memory
        return case.memory and contender is contenders[0] and dtype == torch.bfloat16

    def say(text: str) -> None:
        status.update(f"{case.name}, {point.label}, {dtype}: {text}")
        if not (console.is_terminal or arguments.smoke):
            print(f"{time.monotonic() - start:6.1f} s {text}", file=sys.stderr, flush=True)

    def whole(made: dict[str, Any]) -> dict[str, Any]:
        return dict(label=point.label) | made | dict(seconds=time.monotonic() - start)

    repeats = 1 if arguments.smoke else arguments.repeats
    with console.status("inputs") as status:
        made = compare(problem, contenders, repeats, memory=memory, say=say, keep=lambda made: keep(whole(made)))
    if arguments.profile:
        made["profiles"] = _profile([c for c in contenders if c.ours], problem, case, arguments)
    return whole(made)


def _profile(
    contenders: list[Contender], problem: Problem, case: Case, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Of each; the tables are written as text beside the results."""
    profiles = {}
    for contender in contenders:
        profiles[contender.name], table = gpu_profile(contender, problem)
        about = "{kernels} kernels, the GPU busy for {busy:.4f} s of {whole:.4f}".format(**profiles[contender.name])
        if problem.hidden.device.type == "cpu":
            about = "on a CPU"
        print(f"{contender.name}: {about}\n{table}")
        if (out := _out(arguments)) is not None:
            name = re.sub(r"\W+", "-", contender.name).strip("-")
            (out / f"{problem.hidden.device.type}_{case.name}_{name}.txt").write_text(f"{about}\n{table}")
    return profiles


def _show(console: Console, report: dict[str, Any], point: dict[str, Any]) -> None:
    size = point["size"]
    table = Table(
        title=f"{report['case']}: {report['what']} ({point['label']}), N={size['tokens']}, D={size['depth']}, "
        f"V={size['vocab']}, {report['dtype']}"
    )
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in cells(point):
        table.add_row(*row, style="bold" if row[0].startswith("ours") else None)
    console.print(table)
    console.print(
        f"{point['coefficients']:.0%} of the tokens have a gradient, mean entropy {point['mean_entropy']:.2f}; "
        f"{point['seconds']:.0f} s for this table"
    )
    for line in lines(point):
        if line.certificate and line.certificate["error_bound"]:
            console.print(certificate(line))
    for name, wrong in point["wrong"].items():
        console.print(f"[red]wrong numbers, no timing:[/red] {name}: {wrong['why']}")
    for name, why in point["missing"].items():
        console.print(f"not measured: {name}: {why}", highlight=False)
    for warning in noise(point):
        console.print(f"[yellow]{warning}[/yellow]")
    console.print()
