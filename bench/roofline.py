"""Predicted time and memory of a whole loss step, from shapes and the data sheets of GPUs; nothing is run.

The model walks the loop of `covgrpo_kernels/logprob.py` and gives every kernel the longest of three times: its
operations at the rate of matrix products, its bytes at the bandwidth of the cache where they fit into it and of the
memory otherwise, its exponentials at the special-function rate. Kernels run one after the other. Left out: what a
product with a short inner dimension (a shallow head) loses against the sustained rate, and instructions of fold and
grad other than exponentials.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from covgrpo_kernels.logprob import WORKSPACE_BYTES, _vocabulary_slices, gpu_tile, tile_shape
from covgrpo_kernels.tiles.interface import BLOCK

from .measure import write_json

# ------------------------------------------------------------------------------------------- the constants


class Device(NamedTuple):
    sustained: float  # FLOP/s of a large bf16 product by the vendor's library
    bandwidth: float  # bytes/s of the memory
    cache_bandwidth: float  # bytes/s of the last cache
    cache: int  # bytes of the last cache
    multiprocessors: int  # compute units on AMD
    clock: float  # Hz
    memory: float  # bytes


# Measured: 790 TFLOP/s, random bf16 data, 8192^3, on an H200. Assumed: the others keep the same share of their peak.
SUSTAINED_SHARE = 790 / 989
# Bandwidths of caches are assumptions, on the low side. All else is of the data sheets (peak: dense bf16; clock: that
# of the peak), but for:
DEVICES = {
    "A100": Device(SUSTAINED_SHARE * 312e12, 2.0e12, 4e12, 40 << 20, 108, 1.41e9, 80e9),
    "H100": Device(SUSTAINED_SHARE * 989e12, 3.35e12, 5.5e12, 50 << 20, 132, 1.83e9, 80e9),
    # sustained, and bandwidth where the data sheet has 4.8e12: measured; cache: assumption
    "H200": Device(790e12, 4.3e12, 5.5e12, 60 << 20, 132, 1.83e9, 141e9),
    # cache: the Infinity Cache
    "MI300X": Device(SUSTAINED_SHARE * 1307e12, 5.3e12, 10e12, 256 << 20, 304, 2.1e9, 192e9),
}
GEMM_SHARE = 0.96  # of the sustained rate that products in the loop reach: assumption, after a peer's measured share
GEMM_TILE = (128, 256)  # of a multiprocessor, either way round: assumption; kernels of vendors' libraries vary
SPECIAL_RATE = 16  # exponentials and reciprocals a clock and multiprocessor: data sheets (a quarter rate on AMD)
KERNEL_GAP = 3e-6  # s between the end of a kernel and the start of the next, which needs it: assumption
HOST = {"triton": 25e-6, "torch": 10e-6}  # s that the host takes to launch one: assumption
# Kernels on [N] vectors: the objective, its metrics and the plan; counted at the default options, about.
VECTOR_KERNELS = 250
# Special functions an entry, read off the kernels: an exponential; for the softcap's tanh another, two reciprocals.
SPECIAL, SPECIAL_SOFTCAP = 1, 3
# Passes of eager PyTorch over its logits, (read, written) bytes an entry beyond its products in bf16. Each is counted
# once, even where a kernel reads its row again; read off PyTorch's operators.
EAGER_PASSES = {
    "logits to float32": (2, 4), "log_softmax": (4, 4), "backward of gather: zeros": (0, 4),
    "backward of log_softmax: output and its gradient in": (8, 4), "gradient to bfloat16": (4, 2),
}  # fmt: skip
EAGER_PEAK = 12  # bytes an entry, in the backward of log_softmax: its output and both gradients in float32


class Head(NamedTuple):
    depth: int
    vocab: int
    softcap: bool = False


# Of the models' published configurations.
MODELS = {
    "Qwen2.5-0.5B": Head(896, 151936), "Qwen2.5-1.5B": Head(1536, 151936), "Qwen2.5-7B": Head(3584, 152064),
    "Llama-3-8B": Head(4096, 128256), "Gemma-2-2B": Head(2304, 256000, softcap=True),
}  # fmt: skip
TOKENS = (4096, 16384, 65536, 131072)
DTYPE, INPUT, SUM = torch.bfloat16, 2, 4  # bytes of an element of inputs and dZ, of an accumulator and a logit

# ------------------------------------------------------------------------------------ the operations of a step


class Operation(NamedTuple):
    part: str  # "gemm", "fold", "grad", "weights" or "other"
    shape: tuple[int, ...]  # (m, n, k) of a product, else (rows, columns)
    bytes: int
    special: int = 0  # exponentials and reciprocals
    kernels: int = 1

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.shape) if self.part == "gemm" else 0


def product(m: int, n: int, k: int, *, add: bool = False, result: int = SUM) -> Operation:
    """[m, k] by [k, n] into a result of that many bytes an element."""
    return Operation("gemm", (m, n, k), INPUT * (m * k + k * n) + result * m * n * (1 + add))


def elementwise(rows: int, columns: int, read: int, written: int, kernels: int = 1) -> Operation:
    """``read`` and ``written``: bytes an element."""
    return Operation("other", (rows, columns), (read + written) * rows * columns, kernels=kernels)


Step = Counter[Operation]  # how often each is done


def _slices(vocab: int, width: int) -> Counter[int]:
    return Counter(b - a for a, b in _vocabulary_slices(vocab, width))


def _blocks(tokens: int, height: int) -> list[int]:
    return [min(height, tokens - i) for i in range(0, tokens, height)]


def forward(head: Head, tokens: int, tile: tuple[int, int]) -> Step:
    """`_stream_forward`; ``tile``: (rows, vocabulary entries)."""
    from covgrpo_kernels.tiles.triton.fold import traffic  # triton is optional

    special = SPECIAL + head.softcap * SPECIAL_SOFTCAP
    step: Step = Counter()
    for c, slices in _slices(head.vocab, tile[1]).items():
        for r in _blocks(tokens, tile[0]):
            step[product(r, c, head.depth)] += slices
            step[Operation("fold", (r, c), sum(traffic(r, c)), special * r * c)] += slices
    return step


def backward(head: Head, tokens: int, tile: tuple[int, int]) -> Step:
    """`_stream_backward` with all rows live and gradients of hidden states and weight."""
    from covgrpo_kernels.tiles.triton.grad import traffic

    depth = head.depth
    special = SPECIAL + head.softcap * SPECIAL_SOFTCAP
    step: Step = Counter()
    widths = _slices(head.vocab, tile[1])
    first = next(iter(widths))
    for c, slices in widths.items():
        for i, r in enumerate(_blocks(tokens, tile[0])):
            step[product(r, c, depth)] += slices
            step[Operation("grad", (r, c), sum(traffic(r, c, INPUT)), special * r * c)] += slices
            step[product(r, depth, c, add=True)] += slices - (c == first)  # dH
            step[product(c, depth, r, add=i > 0)] += slices  # dW
        step[elementwise(c, depth, SUM, INPUT)] += slices  # scaled by a power of two and rounded
    for r in _blocks(tokens, tile[0]):
        step[product(r, depth, first)] += 1  # dH of the first slice
    step[elementwise(tokens, depth, SUM, INPUT)] += 1  # scaled and rounded
    return +step


def between(tokens: int) -> Step:
    """What the loss does with [N] vectors."""
    from covgrpo_kernels.tiles.triton.group_weights import traffic

    weights = Operation("weights", (tokens, 1), sum(traffic(tokens)))
    return Counter({elementwise(tokens, 1, SUM, SUM): VECTOR_KERNELS, weights: 1})


def eager(head: Head, tokens: int) -> Step:
    """Forward and backward of log_softmax over logits in memory."""
    depth, vocab = head.depth, head.vocab
    products = [(tokens, vocab, depth), (tokens, depth, vocab), (vocab, depth, tokens)]
    passes = [elementwise(tokens, vocab, *bytes) for bytes in EAGER_PASSES.values()]
    return Counter([*(product(*shape, result=INPUT) for shape in products), *passes])


# ------------------------------------------------------------------------------------------------- their time


def rounded_up_flops(shape: tuple[int, ...], multiprocessors: int) -> int:
    """FLOP that all multiprocessors could have done by the time that the last tile of a product is done."""
    m, n, k = shape
    a, b = GEMM_TILE
    tiles = min(math.ceil(m / a) * math.ceil(n / b), math.ceil(m / b) * math.ceil(n / a))
    return math.ceil(tiles / multiprocessors) * multiprocessors * 2 * a * b * k


def seconds(operation: Operation, device: Device) -> float:
    """Of its kernels, without the gaps between them."""
    fits = operation.bytes <= device.cache
    times = [
        operation.bytes / (device.cache_bandwidth if fits else device.bandwidth),
        operation.special / (SPECIAL_RATE * device.multiprocessors * device.clock),
    ]
    if operation.part == "gemm":
        flops = rounded_up_flops(operation.shape, device.multiprocessors)
        times.append(flops / (GEMM_SHARE * device.sustained))
    return max(times)


def breakdown(step: Step, device: Device) -> dict[str, float]:
    """Seconds of each part; "launches" is the time in which no kernel runs. The host may be the slower one."""
    parts = dict.fromkeys(("gemm", "fold", "grad", "weights", "other"), 0.0)
    gaps = host = 0.0
    for operation, times in step.items():
        parts[operation.part] += times * seconds(operation, device)
        launcher = "triton" if operation.part in ("fold", "grad", "weights") else "torch"
        gaps += times * operation.kernels * KERNEL_GAP
        host += times * operation.kernels * HOST[launcher]
    kernels = sum(parts.values())
    return parts | {"launches": max(gaps, host - kernels)}


def duration(step: Step, device: Device) -> float:
    return sum(breakdown(step, device).values())


def chosen_tile(head: Head, tokens: int, device: Device) -> tuple[int, int]:
    """(rows, vocabulary entries) that the loop takes on the device."""
    from covgrpo_kernels.tiles.triton import TEMPORARIES

    largest = gpu_tile(head.depth, device.multiprocessors)
    return tile_shape(largest, tokens, head.depth, head.vocab, "cuda", DTYPE, TEMPORARIES)


def workspace(head: Head, tile: tuple[int, int]) -> int:
    """Bytes: a tile, dZ, a slice of dW, a block of dH in the input's dtype."""
    r, c = tile
    return (SUM + INPUT) * r * c + SUM * c * head.depth + INPUT * r * head.depth


def predict(device_name: str, model: str, tokens: int, tile: tuple[int, int] | None = None) -> dict[str, Any]:
    """A row of the report: seconds, bytes, ratios to units of 2 N D V operations at the device's sustained rate."""
    device, head = DEVICES[device_name], MODELS[model]
    chosen = chosen_tile(head, tokens, device)
    tile = tile or chosen
    f, b = forward(head, tokens, tile), backward(head, tokens, tile)
    whole = f + between(tokens) + b
    # The backward asks which rows are live, and so waits for all before it: the host gets no further ahead.
    before, after = breakdown(f + between(tokens), device), breakdown(b, device)
    parts = {name: before[name] + after[name] for name in before}
    step, unit = sum(parts.values()), 2 * tokens * head.depth * head.vocab / device.sustained
    eager_peak = EAGER_PEAK * tokens * head.vocab + 2 * INPUT * (tokens + head.vocab) * head.depth
    return dict(
        device=device_name, model=model, tokens=tokens, tile=tile, chosen=tile == chosen, unit=unit,
        forward=duration(f, device), forward_per_unit=duration(f, device) / unit,
        backward=duration(b, device), backward_per_three_units=duration(b, device) / (3 * unit),
        step=step, step_per_four_units=step / (4 * unit), share={name: time / step for name, time in parts.items()},
        flops_per_byte=sum(n * o.flops for o, n in whole.items()) / sum(n * o.bytes for o, n in whole.items()),
        workspace_bytes=workspace(head, tile), accumulator_bytes=SUM * tokens * head.depth,
        eager=duration(eager(head, tokens), device), eager_peak_bytes=eager_peak,
        eager_fits=eager_peak <= device.memory,
    )  # fmt: skip


def sweep(device_name: str, model: str, tokens: int) -> list[dict[str, Any]]:
    """The step with every tile shape that fits the workspace, the fastest first: powers of two, and heights of which
    products with 2048 entries fill the multiprocessors evenly."""
    device, head = DEVICES[device_name], MODELS[model]
    a, b = GEMM_TILE
    even = (k * device.multiprocessors * a * b // (2 * BLOCK) // a * a for k in (1, 2, 4))
    heights = {min(r, tokens) for r in (*(1 << k for k in range(9, 15)), *even)}
    shapes = {(r, BLOCK * k) for r in heights for k in (1, 2, 3, 4, 5, 6, 8, 12, 16)}
    shapes = {tile for tile in shapes if workspace(head, tile) <= WORKSPACE_BYTES["cuda"]}
    shapes.add(chosen_tile(head, tokens, device))
    return sorted((predict(device_name, model, tokens, tile) for tile in shapes), key=lambda row: row["step"])


# ------------------------------------------------------------------------------------------------- the report

COLUMNS = (
    "model", "tokens", "tile", "forward", "/1", "backward", "/3", "step", "/4", "fold", "grad", "other", "launch",
    "FLOP/B", "MiB", "+dH", "eager", "GB",
)  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    share, (r, c) = row["share"], row["tile"]
    cells = [row["model"], str(row["tokens"]), f"{r}x{c}{' *'[row['chosen']]}"]
    for name, ratio in (("forward", "per_unit"), ("backward", "per_three_units"), ("step", "per_four_units")):
        cells += [f"{1e3 * row[name]:.2f}", f"{row[f'{name}_{ratio}']:.3f}"]
    shares = share["fold"], share["grad"], share["other"] + share["weights"], share["launches"]
    memory = (f"{row[name] / 2**20:.0f}" for name in ("workspace_bytes", "accumulator_bytes"))
    cells += [*(f"{x:.1%}" for x in shares), f"{row['flops_per_byte']:.0f}", *memory]
    return [*cells, f"{1e3 * row['eager']:.2f}", f"{row['eager_peak_bytes'] / 1e9:.0f}{'! '[row['eager_fits']]}"]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def report(rows: list[dict[str, Any]]) -> str:
    lines = [
        "Predicted, not measured. Times in ms, and over 1, 3 and 4 units: a unit is one product [N, D] x [D, V] at the",
        "sustained rate. Tiles: rows x vocabulary entries, * as the loop chooses. Shares of the step. MiB: workspace,",
        "and the accumulator of dH. Eager PyTorch: 3 units and its logits, GB at its peak; ! more than there is.",
    ]
    for name in dict.fromkeys(row["device"] for row in rows):
        device = DEVICES[name]
        balance = GEMM_SHARE * device.sustained / device.bandwidth
        lines += ["", f"{name}: {device.sustained / 1e12:.0f} TFLOP/s sustained, {device.bandwidth / 1e12:.2f} TB/s; "
                  f"if tiles missed the cache, memory would bound steps below {balance:.0f} FLOP/B"]  # fmt: skip
        lines += _table([[*COLUMNS], *(_cells(row) for row in rows if row["device"] == name)])
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=list(DEVICES), help="this one only")
    parser.add_argument("--model", choices=list(MODELS), help="this one only")
    parser.add_argument("--tokens", type=int, help="this number only")
    parser.add_argument("--tiles", action="store_true", help="instead, every tile shape for one device, model, tokens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, and the constants behind them")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    d, m, n = arguments.device, arguments.model, arguments.tokens
    if n is not None and n < 1:
        raise SystemExit(f"--tokens must be positive, got {n}")
    if arguments.tiles and None in (d, m, n):
        raise SystemExit("--tiles needs --device, --model and --tokens")
    every = itertools.product([d] if d else DEVICES, [m] if m else MODELS, [n] if n else TOKENS)
    rows = sweep(d, m, n) if arguments.tiles else [predict(*case) for case in every]
    print(report(rows))
    if arguments.json:
        constants = dict(
            devices={name: device._asdict() for name, device in DEVICES.items()}, gemm_share=GEMM_SHARE,
            gemm_tile=GEMM_TILE, special_rate=SPECIAL_RATE, kernel_gap=KERNEL_GAP, host=HOST,
            vector_kernels=VECTOR_KERNELS,
        )  # fmt: skip
        write_json(arguments.json, dict(constants=constants, rows=rows))
