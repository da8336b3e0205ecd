"""What every benchmark shares: the problem that contenders solve, one step of one of them, clocks, the exact gradients,
peak memory, where a measurement was made, files that are whole."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from covgrpo_kernels import kernels, reference
from covgrpo_kernels.config import IGNORE_INDEX
from covgrpo_kernels.testing import Results, policy_head

if TYPE_CHECKING:
    from .contenders import Contender

clock = time.perf_counter


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that the device took, or on a CPU that passed."""
    if device.type != "cuda":
        begin = clock()
        result = function()
        return clock() - begin, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    result = function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000, result


# ------------------------------------------------------------------------------------------------- the problem


@dataclass(frozen=True)
class Problem:
    """What all contenders are given: the same tensors, and which gradients are wanted."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N], -100: ignored
    logprob_grad: Tensor  # [N] coefficients
    entropy_grad: Tensor | None = None  # [N]
    softcap: float | None = None
    frozen: bool = False  # the head: dW is not wanted
    backward: bool = True

    @classmethod
    def of(cls, head: dict[str, Any], dtype: torch.dtype, device: torch.device, **options: Any) -> Problem:
        """From a generator of `covgrpo_kernels.testing` or a recording. An ignored row has no coefficient."""
        valid = head["targets"] != IGNORE_INDEX
        x = {n: head[n].to(device, dtype) for n in ("hidden", "weight")}
        x |= {n: head[n].float().where(valid, 0).to(device) for n in ("logprob_grad", "entropy_grad") if n in head}
        if not options.pop("entropy", False):
            x.pop("entropy_grad", None)
        options = dict(softcap=head.get("softcap")) | options
        return cls(**x, targets=head["targets"].to(device), **options)

    @property
    def size(self) -> dict[str, int]:
        return dict(tokens=len(self.hidden), depth=self.hidden.shape[1], vocab=len(self.weight))

    @property
    def labels(self) -> Tensor:
        """Targets for those that have no ignored rows; their coefficient is zero."""
        return self.targets.clamp(min=0)

    def toy(self) -> Problem:
        """The same question at a size that takes no time."""
        head = policy_head(0, 64, 32, 1100)
        head["entropy_grad"] = head["logprob_grad"]
        options = dict(softcap=self.softcap, frozen=self.frozen, backward=self.backward)
        has_entropy = self.entropy_grad is not None
        return Problem.of(head, self.hidden.dtype, self.hidden.device, entropy=has_entropy, **options)


class Step(NamedTuple):
    results: Results  # logprob, entropy [N]; dhidden [N, D], dweight [V, D]: those there are
    forward: float  # seconds
    backward: float | None


def step(contender: Contender, problem: Problem) -> Step:
    device, learn = problem.hidden.device, problem.backward
    hidden = problem.hidden.detach().requires_grad_(learn)
    weight = problem.weight.detach().requires_grad_(learn and not problem.frozen)
    backward = None
    with contender.around(), torch.set_grad_enabled(learn):
        forward, out = timed(lambda: contender.forward(hidden, weight, problem), device)
        if learn:
            pairs = [(out.logprob, problem.logprob_grad), (out.entropy, problem.entropy_grad)]
            if out.loss is not None:
                pairs = [(out.loss, torch.ones_like(out.loss))]
            outputs, grads = zip(*((x, g.to(x.dtype)) for x, g in pairs if g is not None), strict=True)
            backward, _ = timed(lambda: torch.autograd.backward(outputs, grads), device)
    valid = problem.targets != IGNORE_INDEX
    # Entropies that nobody asked for, as some make them in passing, are not looked at.
    found = dict(logprob=out.logprob, entropy=None if problem.entropy_grad is None else out.entropy)
    results = {name: x.detach().where(valid, 0) for name, x in found.items() if x is not None}
    for name, x in (("dhidden", hidden), ("dweight", weight)):
        if x.requires_grad:
            assert x.grad is not None, f"{contender.name} gave no {name}"
            results[name] = x.grad
    return Step(results, forward, backward)


def warm(contender: Contender, problem: Problem) -> None:
    """Threads, libraries and compilers, once."""
    step(contender, problem if contender.compiles else problem.toy())


class Bare:
    """The products alone, on operands of the problem's size and dtype: what no exact method is faster than."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.logits = problem.hidden @ problem.weight.t()
        self.forward: list[float] = []
        self.backward: list[float] = []  # gradients alone, from logits that are there

    def step(self) -> None:
        hidden, weight, device = self.problem.hidden, self.problem.weight, self.problem.hidden.device
        self.forward.append(timed(lambda: torch.mm(hidden, weight.t(), out=self.logits), device)[0])
        if self.problem.backward:
            frozen = self.problem.frozen

            def products() -> Any:
                return self.logits @ weight, None if frozen else self.logits.t() @ hidden

            self.backward.append(timed(products, device)[0])


def product_seconds(problem: Problem, dtype: torch.dtype) -> float:
    """Of the products of a step, forward and both gradients, on a cut-out of the problem's operands that takes no time:
    the smaller of two."""
    hidden, weight = (x[:rows].to(dtype) for x, rows in ((problem.hidden, 256), (problem.weight, 4096)))
    logits = hidden @ weight.t()

    def products() -> Any:
        return torch.mm(hidden, weight.t(), out=logits), logits @ weight, logits.t() @ hidden

    return min(timed(products, hidden.device)[0] for _ in range(2))


def slow_products(problem: Problem) -> float | None:
    """How many times as long as float32's the products take in the problem's dtype, on a processor that has no
    instructions for it. None where they are faster, as they should be."""
    dtype = problem.hidden.dtype
    if problem.hidden.device.type != "cpu" or dtype.itemsize >= 4:
        return None
    ratio = product_seconds(problem, dtype) / product_seconds(problem, torch.float32)
    return ratio if ratio > 1 else None


# ----------------------------------------------------------------------------------------------------- numbers


def eager_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What trainers write: no more than what is asked for. (The reference always computes entropies.)"""
    logits = F.linear(hidden, weight).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(-1)
    logprob = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    return logprob, -(log_p.exp() * log_p).sum(-1) if entropy else None


def exact(problem: Problem, rows: int = 256) -> Results:
    """The reference in float64 on the problem's inputs, a block of rows at a time."""
    hidden, weight = (x.detach().to(torch.float64, copy=True) for x in (problem.hidden, problem.weight))
    hidden.requires_grad_(problem.backward)
    weight.requires_grad_(problem.backward and not problem.frozen)
    logprobs, entropies = [], []
    for block in torch.arange(len(hidden), device=hidden.device).split(rows):
        x, e = reference.linear_logprob(hidden[block], weight, problem.targets[block], softcap=problem.softcap)
        if problem.backward:
            total = (x * problem.logprob_grad[block]).sum()
            if problem.entropy_grad is not None:
                total = total + (e * problem.entropy_grad[block]).sum()
            total.backward()
        logprobs.append(x.detach())
        entropies.append(e.detach())
    truth = dict(logprob=torch.cat(logprobs), entropy=torch.cat(entropies))
    return truth | {f"d{n}": x.grad for n, x in (("hidden", hidden), ("weight", weight)) if x.grad is not None}


def rounding(sizes: dict[str, float], dtype: torch.dtype, grad_tol: float = 0.0) -> dict[str, float]:
    """Bounds on RMS errors for `testing.check_draw`, from the RMS of the quantities: gradients may be off by what is
    left out and a few roundings to their dtype, log-probs and entropies by a few of float32's."""
    gradient, forward = grad_tol + 8 * torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps
    return {name: (gradient if name.startswith("d") else forward) * size for name, size in sizes.items()}


def errors(results: Results, truth: Results) -> dict[str, dict[str, float]]:
    """By quantity: the largest, and the RMS."""
    found = {}
    for name, value in results.items():
        # Pieces that stay in a cache: the gradient of a head has a gigabyte in float64.
        pairs = zip(value.split(256), truth[name].split(256), strict=True)
        pieces = [(off.abs().max(), off.square().sum()) for off in (a.double() - b for a, b in pairs)]
        largest, squares = (torch.stack(x) for x in zip(*pieces, strict=True))
        found[name] = dict(max=largest.max().item(), rms=(squares.sum() / value.numel()).sqrt().item())
    return found


# ------------------------------------------------------------------------------------------------------ memory


def can_measure_memory(device: torch.device) -> bool:
    return device.type == "cuda" or os.access("/proc/self/clear_refs", os.W_OK)


def peak_mib(contender: Contender, problem: Problem) -> float:
    """Peak memory of a step beyond inputs and gradients: of the device's allocator, or on a CPU of the resident set of
    a fresh process. Raises RuntimeError where that process fails."""
    device = problem.hidden.device
    if device.type == "cuda":
        warm(contender, problem)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = step(contender, problem).results
        return (torch.cuda.max_memory_allocated(device) - before - _gradient_bytes(results)) / 2**20
    context = multiprocessing.get_context("spawn")
    value = context.Value("d", -1.0)
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save({f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}, file.name)
        process = context.Process(target=_peak_in_this_process, args=(contender, file.name, value))
        process.start()
        process.join()
    if process.exitcode:
        raise RuntimeError(f"measuring the memory of {contender.name} failed with exit status {process.exitcode}")
    return value.value


def free_bytes(device: torch.device) -> int | None:
    """None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    about = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", about.read_text(), re.M) if about.exists() else None
    return int(found[1]) << 10 if found else None


def _gradient_bytes(results: Results) -> int:
    return sum(x.nbytes for name, x in results.items() if name.startswith("d"))


def _resident_kib(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(field)[1].split()[0])


def _peak_in_this_process(contender: Contender, path: str, value: Any) -> None:
    problem = Problem(**torch.load(path))
    warm(contender, problem)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident_kib("VmRSS:")
    results = step(contender, problem).results
    value.value = (_resident_kib("VmHWM:") - before) / 1024 - _gradient_bytes(results) / 2**20


# ------------------------------------------------------------------------------------------------ the GPU's profile


def gpu_profile(contender: Contender, problem: Problem) -> tuple[dict[str, float], str]:
    """A step's kernels and copies, how long the GPU was busy with them and how long it took from the first to the last,
    in seconds; and a table of them by name."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    warm(contender, problem)
    step(contender, problem)
    on_gpu = problem.hidden.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as result:
        step(contender, problem)
    spans = sorted((e.time_range.start, e.time_range.end) for e in result.events() if e.device_type == DeviceType.CUDA)
    busy, last = 0.0, -math.inf
    for begin, end in spans:  # those of several streams may overlap
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    whole = last - spans[0][0] if spans else 0.0
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = result.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60)
    return dict(kernels=len(spans), busy=busy / 1e6, whole=whole / 1e6), table


# ------------------------------------------------------------------------------------- where, and files of results

PEERS = ("trl", "liger-kernel", "verl", "cut-cross-entropy")


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Where and with what a measurement was made."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    where: dict[str, Any] = dict(torch=torch.__version__, python=platform.python_version())
    where |= dict(commit=commit.stdout.strip(), peers={name: version(name) for name in PEERS})
    if device is None or device.type != "cuda":
        backend = kernels.describe(torch.device("cpu"))
        capability = torch.backends.cpu.get_cpu_capability()
        cpu = dict(cpu=cpu_model(), threads=torch.get_num_threads(), cpu_capability=capability)
        return where | cpu | dict(backend=backend)
    import triton

    gpu = torch.cuda.get_device_properties(device)
    return where | dict(
        triton=triton.__version__, gpu=gpu.name, multiprocessors=gpu.multi_processor_count, l2_bytes=gpu.L2_cache_size,
        backend=kernels.describe(device),
    )  # fmt: skip


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    about = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", about.read_text(), re.M) if about.exists() else []
    return names[0] if names else platform.processor()


def write_json(path: Path, report: Any) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)
