"""`covgrpo doctor`: versions, devices, backends, and a self-test of the numbers on every device."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from typing import Any

import torch
from torch import Tensor

from . import __version__, covgrpo_loss, kernels, linear_logprob, reference
from .config import CovGRPOConfig
from .testing import ErrorBook, Results, check_draw, random_batch, random_head, run_logprob, run_loss


def how_to_install(extra: str) -> str:
    """No index has this package: it comes from a checkout, or from a wheel that was built of one."""
    return f"pip install '.[{extra}]' in a checkout, or pip install 'PATH.whl[{extra}]' with a wheel"


# Distributions, and how to get them where they are missing.
PACKAGES = {
    "torch": "",
    "triton": "optional: comes with torch's CUDA builds",
    "transformers": how_to_install("grpo"),
    "rich": how_to_install("bench"),
    "matplotlib": how_to_install("grpo"),
    "trl": how_to_install("trl"),
    "liger-kernel": how_to_install("bench"),
}


def main() -> int:
    """Prints the report. 0 when the self-test passed on every device, else 1."""
    _section("versions")
    _row("covgrpo-kernels", __version__)
    _row("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    for package, hint in PACKAGES.items():
        _row(package, _version(package) or f"not installed ({hint})")

    _section("devices")
    devices = _devices()
    for device, what in devices:
        _row(str(device), what)
    if len(devices) == 1:
        _row("cuda", _why_no_gpu())

    _section("backends")
    for name, usable, why in kernels.report():
        _row(name, f"{'usable' if usable else 'not usable'}: {why}")

    _section("self-test: errors against float64, as multiples of eager PyTorch's in the same dtype")
    if not __debug__:
        return _verdict(False, "python -O removes the assertions it is made of")
    start = time.perf_counter()
    passed = all([self_test(device) for device, _ in devices])
    return _verdict(passed, f"{time.perf_counter() - start:.1f} s")


def _verdict(passed: bool, remark: str) -> int:
    print(f"\nself-test {'passed' if passed else 'FAILED'} ({remark})")
    return 0 if passed else 1


def _section(title: str) -> None:
    print(f"\n{title}")


def _row(name: str, what: str) -> None:
    print(f"  {name:<22} {what}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[torch.device, str]]:
    capability = torch.backends.cpu.get_cpu_capability()
    devices = [(torch.device("cpu"), f"{capability}, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = gpu.total_memory / 2**30
        devices.append((torch.device("cuda", i), f"{gpu.name}, {memory:.0f} GiB, {gpu.major}.{gpu.minor}"))
    return devices


def _why_no_gpu() -> str:
    build = torch.version.cuda or torch.version.hip
    return f"none found by torch, built for {build}" if build else "none: this torch build is for the CPU"


# ----------------------------------------------------------------------------------------------- the self-test


def check_logprob(device: torch.device, dtype: torch.dtype) -> ErrorBook:
    """`linear_logprob` and its gradients over more than 1,000 tokens: the pooled rule of `testing.py` for the
    values, three times eager's error for the gradients."""
    head = random_head(0, tokens=1200, depth=16, vocab=1030, bias=True)
    exact = run_logprob(reference.linear_logprob, **_rounded(head, dtype), dtype=torch.float64)
    here = _to(head, device)
    eager = _to(run_logprob(reference.linear_logprob, **here, dtype=dtype), "cpu")
    ours = _to(run_logprob(linear_logprob, **here, dtype=dtype, entropy=True, grad_tol=0.0), "cpu")
    _book(ours, eager, {name: exact[name] for name in ("logprob", "entropy")}).check(dtype)
    check_draw(ours, eager, exact, dict.fromkeys(exact, 0.0))
    return _book(ours, eager, exact)


def check_loss(device: torch.device, dtype: torch.dtype) -> ErrorBook:
    """`covgrpo_loss` with covariance weights, clipping and KL: three times eager's error for everything that has
    many entries. (The loss is one number, and no statistic; its gradients are judged.)"""
    config = CovGRPOConfig(beta=0.04)
    batch = random_batch(0, groups=6, group_size=4, length=10, depth=16, vocab=64)
    exact = run_loss(reference.covgrpo_loss, _rounded(batch, dtype), config, dtype=torch.float64)
    del exact["loss"]
    here = _to(batch, device)
    eager = _to(run_loss(reference.covgrpo_loss, here, config, dtype=dtype), "cpu")
    ours = _to(run_loss(covgrpo_loss, here, config, dtype=dtype, grad_tol=0.0), "cpu")
    check_draw(ours, eager, exact, dict.fromkeys(exact, 0.0))
    return _book(ours, eager, exact)


CHECKS = {"log-prob": check_logprob, "loss": check_loss}


def self_test(device: torch.device) -> bool:
    passed = True
    for dtype in (torch.float32, torch.bfloat16):
        for what, check in CHECKS.items():
            try:
                ratios = check(device, dtype).ratios()
                result = "passed: " + ", ".join(f"{name} {ratio:.2g}" for name, ratio in ratios.items())
            except Exception as error:  # whatever goes wrong on a device is what the doctor is asked for
                result, passed = f"FAILED: {type(error).__name__}: {error}", False
            _row(f"{device} {str(dtype).removeprefix('torch.')} {what}", result)
    return passed


def _book(ours: Results, eager: Results, exact: Results) -> ErrorBook:
    book = ErrorBook()
    book.add(ours, eager, exact)
    return book


def _to(values: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}


def _rounded(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs as a run in ``dtype`` sees them, in float64: rounding them is nobody's error."""
    cast = {name: inputs[name].to(dtype).double() for name in ("hidden", "weight", "bias") if name in inputs}
    return inputs | cast
