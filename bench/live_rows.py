"""Time and memory of the backward as the share of tokens with zero advantage grows, beside eager PyTorch."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from covgrpo_kernels import linear_logprob, reference
from covgrpo_kernels.testing import Results, check_draw, policy_head, rms

# Qwen2.5-0.5B's head; the smoke run has one block of the vocabulary and a bit.
SIZE = dict(tokens=1024, depth=896, vocab=151936)
SMOKE = dict(tokens=64, depth=32, vocab=1100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="toy sizes, one repeat, nothing is written")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--grad-tol", default="0.0", help="a number or auto")
    parser.add_argument("--out", type=Path, default=Path("bench/results/live_rows.json"))
    parser.set_defaults(run=run)


def _leaf(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype, copy=True).requires_grad_()


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def eager_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    """What trainers write: no more than the log-probs. (The reference computes entropies too.)"""
    logits = F.linear(hidden, weight).float()
    return (logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1),)


class Contender:
    """Forward and backward from the same inputs; seconds of each are collected by ``step``."""

    def __init__(self, name: str, function: Callable[..., Any], head: dict[str, Any], dtype: torch.dtype) -> None:
        self.name, self.function, self.head = name, function, head
        self.hidden, self.weight = _leaf(head["hidden"], dtype), _leaf(head["weight"], dtype)
        self.forward: list[float] = []
        self.backward: list[float] = []

    def step(self) -> None:
        self.hidden.grad = self.weight.grad = None
        seconds, self.logprob = _timed(lambda: self.function(self.hidden, self.weight, self.head["targets"])[0])
        self.forward.append(seconds)
        self.backward.append(_timed(lambda: self.logprob.backward(self.head["logprob_grad"]))[0])


def _gradients(contender: Contender) -> Results:
    assert contender.hidden.grad is not None
    assert contender.weight.grad is not None
    logprob = contender.logprob.detach()
    return dict(logprob=logprob, dhidden=contender.hidden.grad, dweight=contender.weight.grad)


def _exact(contender: Contender, rows: int = 128) -> Results:
    """The reference in float64, a block of rows at a time."""
    hidden, weight = (_leaf(x.detach(), torch.float64) for x in (contender.hidden, contender.weight))
    logprobs = []
    inputs = (hidden, contender.head["targets"], contender.head["logprob_grad"])
    for h, y, g in zip(*(x.split(rows) for x in inputs), strict=True):
        x, _ = reference.linear_logprob(h, weight, y)
        (x * g).sum().backward()
        logprobs.append(x.detach())
    assert hidden.grad is not None
    assert weight.grad is not None
    return dict(logprob=torch.cat(logprobs), dhidden=hidden.grad, dweight=weight.grad)


def check_numbers(ours: Contender, eager: Contender, grad_tol: float | str) -> None:
    """Both have the same head. Raises AssertionError where ours is wrong: then there is no timing."""
    exact = _exact(ours)
    dtype = ours.hidden.dtype
    tolerance = torch.finfo(dtype).eps / 4 if grad_tol == "auto" else float(grad_tol)
    relative = tolerance + 8 * torch.finfo(dtype).eps
    bound = {name: relative * rms(value) for name, value in exact.items()}
    bound["logprob"] = 8 * torch.finfo(torch.float32).eps * rms(exact["logprob"])
    check_draw(_gradients(ours), _gradients(eager), exact, bound)
    if _gradients(ours)["dhidden"][ours.head["logprob_grad"] == 0].any():
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


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return dict(
        torch=torch.__version__,
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        commit=commit,
    )


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
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(arguments.out)


def markdown(report: dict[str, Any]) -> str:
    """The report as README.md shows it: times as multiples of eager's whole step, which a noisy machine and the next
    one have in common."""
    size, results = report["size"], report["results"]
    steps = {c["name"]: statistics.median(c["forward"]) + statistics.median(c["backward"]) for c in results}
    lines = [
        f"N={size['tokens']} tokens, D={size['depth']}, V={size['vocab']}, {report['dtype']}, "
        f"`grad_tol={report['grad_tol']}`, median of {len(results[0]['forward'])} alternating runs on "
        f"{report['environment']['threads']} CPU threads, in units of eager PyTorch's forward and backward:",
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
