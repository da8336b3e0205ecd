"""What the cases share: contenders, clocks, the exact gradients, where a measurement was made, files that are whole."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from covgrpo_kernels import reference, tiles
from covgrpo_kernels.testing import Results, rms


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that the device took, or on a CPU that passed."""
    if device.type != "cuda":
        begin = time.perf_counter()
        result = function()
        return time.perf_counter() - begin, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    result = function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000, result


def eager_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    """What trainers write: no more than the log-probs. (The reference computes entropies too.)"""
    logits = F.linear(hidden, weight).float()
    return (logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1),)


class Contender:
    """Forward and backward from the same inputs; seconds of each are collected by ``step``."""

    def __init__(self, name: str, function: Callable[..., Any], head: dict[str, Any], dtype: torch.dtype) -> None:
        self.name, self.function, self.head = name, function, head
        self.hidden, self.weight = (head[n].to(dtype, copy=True).requires_grad_() for n in ("hidden", "weight"))
        self.forward: list[float] = []
        self.backward: list[float] = []

    def step(self) -> None:
        self.hidden.grad = self.weight.grad = None
        device = self.hidden.device
        arguments = (self.hidden, self.weight, self.head["targets"])
        seconds, self.logprob = timed(lambda: self.function(*arguments)[0], device)
        self.forward.append(seconds)
        self.backward.append(timed(lambda: self.logprob.backward(self.head["logprob_grad"]), device)[0])

    def results(self) -> Results:
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return dict(logprob=self.logprob.detach(), dhidden=self.hidden.grad, dweight=self.weight.grad)


def exact(contender: Contender, rows: int = 128) -> Results:
    """The reference in float64 on the contender's inputs, a block of rows at a time."""
    inputs = (contender.hidden, contender.weight)
    hidden, weight = (x.detach().to(torch.float64, copy=True).requires_grad_() for x in inputs)
    logprobs = []
    tokens = (hidden, contender.head["targets"], contender.head["logprob_grad"])
    for h, y, g in zip(*(x.split(rows) for x in tokens), strict=True):
        x, _ = reference.linear_logprob(h, weight, y)
        (x * g).sum().backward()
        logprobs.append(x.detach())
    assert hidden.grad is not None
    assert weight.grad is not None
    return dict(logprob=torch.cat(logprobs), dhidden=hidden.grad, dweight=weight.grad)


def rounding(truth: Results, dtype: torch.dtype, grad_tol: float = 0.0) -> dict[str, float]:
    """Bounds on RMS errors for `testing.check_draw`: gradients may be off by what is left out and a few roundings to
    their dtype, log-probs by a few of float32's."""
    relative = grad_tol + 8 * torch.finfo(dtype).eps
    bound = {name: relative * rms(value) for name, value in truth.items()}
    return bound | dict(logprob=8 * torch.finfo(torch.float32).eps * rms(truth["logprob"]))


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Where and with what a measurement was made."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    where = dict(torch=torch.__version__, python=platform.python_version(), commit=commit)
    if device is None or device.type != "cuda":
        backend = tiles.describe(torch.device("cpu"))
        capability = torch.backends.cpu.get_cpu_capability()
        return where | dict(threads=torch.get_num_threads(), cpu_capability=capability, backend=backend)
    import triton

    gpu = torch.cuda.get_device_properties(device)
    return where | dict(
        triton=triton.__version__, gpu=gpu.name, multiprocessors=gpu.multi_processor_count, l2_bytes=gpu.L2_cache_size
    )


def write_json(path: Path, report: Any) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)
