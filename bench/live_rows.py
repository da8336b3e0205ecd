"""Time and memory of the backward as the share of tokens with zero advantage grows, beside eager PyTorch."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covgrpo_kernels import linear_logprob
from covgrpo_kernels.testing import check_draw, policy_head

from .measure import Contender, eager_logprob, environment, exact, rounding, write_json

# Qwen2.5-0.5B's head; the smoke run has one block of the vocabulary and a bit.
SIZE = dict(tokens=1024, depth=896, vocab=151936)
SMOKE = dict(tokens=64, depth=32, vocab=1100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="toy sizes, one repeat, nothing is written")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--grad-tol", default="0.0", help="a number or auto")
    parser.add_argument("--out", type=Path, help="default: bench/results/live_rows_DTYPE.json")
    parser.set_defaults(run=run)


def check_numbers(ours: Contender, eager: Contender, grad_tol: float | str) -> None:
    """Both have the same head. Raises AssertionError where ours is wrong: then there is no timing."""
    truth = exact(ours)
    dtype = ours.hidden.dtype
    tolerance = torch.finfo(dtype).eps / 4 if grad_tol == "auto" else float(grad_tol)
    check_draw(ours.results(), eager.results(), truth, rounding(truth, dtype, tolerance))
    if ours.results()["dhidden"][ours.head["logprob_grad"] == 0].any():
        raise AssertionError("rows without a coefficient have a gradient")


def _resident_kib(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(field)[1].split()[0])


def _peak_in_this_process(name: str, dtype_name: str, size: dict[str, int], result: Any) -> None:
    """Peak resident MiB beyond inputs and gradients, where the kernel tells it."""
    dtype = getattr(torch, dtype_name)
    function: Callable[..., Any] = linear_logprob if name == "ours" else eager_logprob
    Contender(name, function, policy_head(0, 64, 32, 1100), dtype).step()  # threads and libraries, once
    contender = Contender(name, function, policy_head(0, **size), dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident_kib("VmRSS:")
    contender.step()
    gradients = contender.hidden.nbytes + contender.weight.nbytes
    result.value = _resident_kib("VmHWM:") / 1024 - before / 1024 - gradients / 2**20


def peak_mib(name: str, dtype_name: str, size: dict[str, int]) -> float:
    """Measured in a fresh process, every row live."""
    context = multiprocessing.get_context("spawn")
    result = context.Value("d", -1.0)
    process = context.Process(target=_peak_in_this_process, args=(name, dtype_name, size, result))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"measuring the memory of {name} failed with exit status {process.exitcode}")
    return result.value


def run(arguments: argparse.Namespace) -> None:
    size = SMOKE if arguments.smoke else SIZE
    repeats = 1 if arguments.smoke else arguments.repeats
    grad_tol = "auto" if arguments.grad_tol == "auto" else float(arguments.grad_tol)
    dtype = getattr(torch, arguments.dtype)

    def ours(*inputs: Tensor) -> Any:
        return linear_logprob(*inputs, grad_tol=grad_tol)

    Contender("ours", ours, policy_head(0, **SMOKE), dtype).step()  # threads and libraries, once
    # Contenders share weights of one seed, differ in coefficients, and take turns.
    contenders = []
    for share in (0.0, 0.3, 0.6):
        head = policy_head(0, **size, zero_advantage=share)
        contenders.append((share, Contender("ours", ours, head, dtype)))
    eager = Contender("eager", eager_logprob, policy_head(0, **size), dtype)
    for _ in range(repeats):
        for _, contender in contenders:
            contender.step()
        eager.step()
    for _, contender in contenders:
        baseline = Contender("eager", eager_logprob, contender.head, dtype)
        baseline.step()
        check_numbers(contender, baseline, grad_tol)
    results = [
        dict(name=c.name, zero_advantage=share, forward=c.forward, backward=c.backward)
        for share, c in [*contenders, (0.0, eager)]
    ]
    memory = {}
    if os.path.exists("/proc/self/clear_refs") and not arguments.smoke:
        memory = {name: peak_mib(name, arguments.dtype, size) for name in ("ours", "eager")}
    report = dict(
        environment=environment(), size=size, dtype=arguments.dtype, grad_tol=arguments.grad_tol,
        results=results, peak_mib=memory,
    )  # fmt: skip
    print(markdown(report))
    if not arguments.smoke:
        write_json(arguments.out or Path(f"bench/results/live_rows_{arguments.dtype}.json"), report)


def markdown(report: dict[str, Any]) -> str:
    """The report as README.md shows it: times as multiples of eager's whole step, which a noisy machine and the next
    one have in common."""
    where = report["environment"]
    size, results = report["size"], report["results"]
    steps = {c["name"]: statistics.median(c["forward"]) + statistics.median(c["backward"]) for c in results}
    lines = [
        f"N={size['tokens']} tokens, D={size['depth']}, V={size['vocab']}, {report['dtype']}, "
        f"`grad_tol={report['grad_tol']}`, median of {len(results[0]['forward'])} alternating runs on "
        f"{where['threads']} CPU threads, backend {where['backend']}, "
        "in units of eager PyTorch's forward and backward:",
        "",
        "| | zero advantage | forward | backward | both |",
        "|---|---|---|---|---|",
    ]
    for c in results:
        f, b = (statistics.median(c[part]) / steps["eager"] for part in ("forward", "backward"))
        lines.append(f"| {c['name']} | {c['zero_advantage']:.0%} | {f:.2f} | {b:.2f} | {f + b:.2f} |")
    if report["peak_mib"]:
        peaks = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in report["peak_mib"].items())
        lines += ["", f"Peak memory beyond inputs and gradients: {peaks}."]
    return "\n".join(lines)
