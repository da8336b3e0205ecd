"""Compiles what the cases for a GPU need, in parallel processes, into the caches of the compilers on disk: the first
call of a kernel takes seconds, and a comparison makes its calls one after the other."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from covgrpo_kernels.benchmark import step

from .cases import SMOKE, Point, Size, all_cases
from .contenders import CONTENDERS

CASES = ("headline", "small", "shallow", "frozen", "dense")
# Few rows and a short vocabulary, both multiples of 16 as the real ones, which is what kernels are specialised on; the
# hidden size is the case's own, since it chooses the cut.
TOKENS, VOCAB = 256, 16384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", help="by name, commas between them; default: all")
    parser.add_argument("--cases", default=",".join(CASES), help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: as many as processors")
    parser.add_argument("--toy", action="store_true", help="a size that tests the command")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    names = arguments.contenders.split(",") if arguments.contenders else [c.name for c in CONTENDERS]
    # What is compiled for every shape gains nothing from a smaller one.
    indices = [i for i, c in enumerate(CONTENDERS) if c.name in names and not c.compiles]
    wanted = arguments.cases.split(",")
    tasks = [(i, name) for name in wanted for i in indices]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        futures = {pool.submit(compile_one, *task, arguments.device, arguments.toy): task for task in tasks}
        for future in as_completed(futures):
            i, name = futures[future]
            print(f"{name}, {CONTENDERS[i].name}: {future.result()}", flush=True)


def compile_one(contender: int, case: str, device: str, toy: bool) -> str:
    """One step, and what came of it. A contender that fails is no error: the comparison will say why it is missing."""
    begin = time.monotonic()
    where = torch.device(device)
    [chosen] = [x for x in all_cases(where.type, toy) if x.name == case]
    point = chosen.points[0]
    size: Size = SMOKE if toy else (TOKENS, point.size[1], VOCAB)
    problem = Point(point.label, size, point.head, point.inputs, point.options).problem(torch.bfloat16, where)
    try:
        reason = CONTENDERS[contender].why_not(problem)
        if reason is None:
            step(CONTENDERS[contender], problem)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{time.monotonic() - begin:.1f} s" if reason is None else reason
