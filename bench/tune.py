"""Which cuts of the kernels, and which tile of the chunked engine, are fastest here; prints, and changes no setting."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from covgrpo_kernels import engines, kernels
from covgrpo_kernels.benchmark import Ours, Problem, step, timed
from covgrpo_kernels.engines.tiling import largest_tile
from covgrpo_kernels.kernels.interface import VOCAB_BLOCK, Coefficients, LogitTransform, OnlineSoftmax, Tile
from covgrpo_kernels.testing import policy_head

from .measure import environment, write_json

SIZES = [dict(tokens=8192, depth=4096, vocab=128256), dict(tokens=16384, depth=896, vocab=151936)]
TOY = [dict(tokens=48, depth=32, vocab=2100)]
# (rows, vocabulary ids, hidden sizes at a time, warps, stages) of the forward's products.
CUTS = [
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (256, 128, 64, 8, 4)
]  # fmt: skip
SHAPES = [(rows, columns) for rows in (1024, 2048, 4096, 8192) for columns in (1024, 2048, 4096, 8192)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="a size that tests the script")
    parser.add_argument("--out", type=Path, help="JSON, written anew after every measurement")
    parser.set_defaults(run=run)


def _median(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    function()  # compiles
    return statistics.median(timed(function, device)[0] for _ in range(repeats))


def _kernel_calls(device: torch.device, rows: int, columns: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """A call of each kernel on a tile in the middle of a vocabulary, and the bytes it moves."""
    ops = kernels.select(device)
    products = torch.randn(rows, columns, device=device)
    targets = torch.randint(0, 2 * columns, (rows,), device=device)
    tile = Tile(targets, columns // 2, LogitTransform(), None, None)
    running = OnlineSoftmax.empty(rows, products.dtype, device)
    out = torch.empty_like(products, dtype=torch.bfloat16 if device.type == "cuda" else products.dtype)
    coefficients = Coefficients(torch.randn(4, rows, device=device))

    def run_online_softmax() -> None:
        ops.online_softmax_(products, tile, running, False)

    def run_dlogits() -> None:
        ops.dlogits(products, tile, coefficients, out)

    # What is one number a row or a column is left out.
    return {
        "online_softmax": (run_online_softmax, products.nbytes),
        "dlogits": (run_dlogits, products.nbytes + out.nbytes),
    }


def tune_kernels(device: torch.device, shape: tuple[int, int], repeats: int) -> Iterator[dict[str, Any]]:
    from covgrpo_kernels.kernels.triton.configs import CONFIGS, SEARCH, architecture

    chosen = CONFIGS[architecture(device)]
    for name, (call, moved) in _kernel_calls(device, *shape).items():
        for config in SEARCH[name]:
            with mock.patch.dict(chosen, {name: config}):
                seconds = _median(call, device, repeats)
            yield dict(
                kernel=name,
                config=config,
                current=config == chosen[name],
                seconds=seconds,
                gb_per_s=moved / seconds / 1e9,
            )


def tune_forward(device: torch.device, size: dict[str, int], repeats: int) -> Iterator[dict[str, Any]]:
    """Of the fused engine: the time of its forward, with what it leaves for a backward."""
    from covgrpo_kernels.kernels.triton.configs import FORWARD, architecture, forward_blocks

    name, dtype = architecture(device), torch.bfloat16
    problem, ours = Problem.of(policy_head(0, **size), dtype, device), Ours()
    current = forward_blocks(name, dtype.itemsize, size["depth"])
    keys = ("B_R", "B_V", "B_D", "num_warps", "num_stages")
    cuts = [current | dict(zip(keys, cut, strict=True)) for cut in CUTS] if device.type == "cuda" else []
    for cut in [current, *(cut for cut in cuts if cut != current)]:
        with mock.patch.dict(FORWARD, {name: FORWARD[name] | {dtype.itemsize: {0: cut}}}):
            try:
                step(ours, problem)  # compiles
            except Exception as error:  # a cut that does not fit the device
                print(f"{cut}: {type(error).__name__}: {error}".splitlines()[0])
                continue
            forward = statistics.median(step(ours, problem).forward for _ in range(repeats))
        yield dict(size=size, cut=cut, current=cut == current, forward=forward)


def tune_tiles(device: torch.device, size: dict[str, int], repeats: int) -> Iterator[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    problem, ours = Problem.of(policy_head(0, **size), dtype, device), Ours(grad_tol=0.0)
    current = largest_tile(size["depth"], device)
    for shape in dict.fromkeys([current, *SHAPES]):
        with engines.use(engines.Chunked(kernels.select(device), shape)):
            step(ours, problem)  # compiles
            turns = [step(ours, problem) for _ in range(repeats)]
        forward, backward = ([getattr(turn, part) for turn in turns] for part in ("forward", "backward"))
        yield dict(
            size=size, shape=shape, current=shape == current,
            forward=statistics.median(forward), backward=statistics.median(backward),
        )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    report: dict[str, Any] = dict(environment=environment(device), kernels=[], forward=[], tiles=[])
    shape = (32, 2 * VOCAB_BLOCK) if arguments.toy else largest_tile(4096, device)

    def keep(kind: str, results: Iterator[dict[str, Any]], cells: Callable[[dict[str, Any]], str]) -> None:
        for result in results:
            report[kind].append(result)
            print(cells(result) + ("  <- current" if result["current"] else ""), flush=True)
            if arguments.out:
                write_json(arguments.out, report)

    keep(
        "kernels", tune_kernels(device, shape, arguments.repeats),
        lambda r: f"{r['kernel']} {r['config']}: {r['seconds'] * 1e6:.1f} us, {r['gb_per_s']:.0f} GB/s",
    )  # fmt: skip
    for size in TOY if arguments.toy else SIZES:
        if isinstance(engines.select(device, torch.bfloat16), engines.FusedGpu):
            keep(
                "forward", tune_forward(device, size, arguments.repeats),
                lambda r: f"{r['size']} cut {r['cut']}: {r['forward'] * 1e3:.2f} ms",
            )  # fmt: skip
        keep(
            "tiles", tune_tiles(device, size, arguments.repeats),
            lambda r: f"{r['size']} tile {r['shape']}: {r['forward'] * 1e3:.2f} + {r['backward'] * 1e3:.2f} ms",
        )  # fmt: skip
