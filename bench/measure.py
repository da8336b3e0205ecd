"""What every benchmark shares beyond `covgrpo_kernels/benchmark.py`: the products alone, errors, profiles, where a
measurement was made, files that are whole."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
from pathlib import Path
from typing import Any

import torch

from covgrpo_kernels import kernels
from covgrpo_kernels.benchmark import Contender, Problem, step, timed, warm
from covgrpo_kernels.testing import Results

from .checkouts import commit


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


# ----------------------------------------------------------------------------------------------------- numbers


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
    where: dict[str, Any] = dict(torch=torch.__version__, python=platform.python_version())
    where |= dict(commit=commit(Path(__file__).parent), peers={name: version(name) for name in PEERS})
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
