"""Which kernels run where. `interface.py` says what a set of kernels is."""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from types import ModuleType

import torch

from . import eager

# The environment variable that names the kernels for all devices: "cpp", "eager" or "triton". Unset or "auto": the
# fastest that a device has.
VARIABLE = "COVGRPO_BACKEND"

MISSING = {"cpp": "the C++ extension was not built", "triton": "triton can't be imported"}


@cache
def _import(name: str) -> ModuleType | str:
    """The kernels, or why there are none. Imported at first use, since triton and a compiler are optional."""
    try:
        return importlib.import_module(f".{name}", __name__)
    except ImportError as error:
        return f"{MISSING[name]}: {error}"


def _usable(name: str, device: torch.device) -> ModuleType | str:
    """The kernels, or why they do not run on ``device``."""
    if name == "eager":
        return eager
    kernels = _import(name)
    if name == "cpp" and device.type != "cpu":
        return "the C++ kernels run on the CPU"
    if name == "triton" and isinstance(kernels, ModuleType) and device.type != "cuda" and not kernels.INTERPRETED:
        return "Triton kernels run on a GPU, or anywhere, slowly, with TRITON_INTERPRET=1"
    if name == "triton" and isinstance(kernels, ModuleType) and device.type == "cuda" and _is_too_old(device):
        return "Triton kernels need a GPU of compute capability 8.0 or higher"
    return kernels


@cache
def _is_too_old(device: torch.device) -> bool:
    """Such a GPU has too little shared memory for the kernels, and none of the tensor cores that they are cut for."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)


def select(device: torch.device) -> ModuleType:
    """The kernels for tensors on ``device``. Raises RuntimeError where `VARIABLE` names kernels that can't run there,
    ValueError where it names none."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "auto":
        fastest = _usable("triton" if device.type == "cuda" else "cpp", device)
        if isinstance(fastest, ModuleType):
            return fastest
        if device.type == "cuda":
            message = f"plain PyTorch instead of fused kernels on {device}: {fastest}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return eager
    if wanted not in ("cpp", "eager", "triton"):
        raise ValueError(f"{VARIABLE} must be 'auto', 'cpp', 'eager' or 'triton', got {wanted!r}")
    kernels = _usable(wanted, device)
    if isinstance(kernels, str):
        raise RuntimeError(f"{VARIABLE}={wanted} can't run on {device}: {kernels}")
    return kernels


def report() -> list[tuple[str, bool, str]]:
    """(name, usable on some device here, why) of every set of kernels, for `covgrpo doctor`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpp, triton = _usable("cpp", torch.device("cpu")), _usable("triton", device)
    compiled = cpp if isinstance(cpp, str) else f"used on CPUs: {_instructions(cpp)}"
    if isinstance(triton, ModuleType):
        reason = "under the interpreter, for tests" if device.type == "cpu" else "fused kernels, used on GPUs"
    else:
        reason = triton
    return [
        ("eager", True, "plain PyTorch, any device"),
        ("cpp", isinstance(cpp, ModuleType), compiled),
        ("triton", isinstance(triton, ModuleType), reason),
    ]


def describe(device: torch.device) -> str:
    """The kernels for tensors on ``device``, in words."""
    kernels = select(device)
    name = kernels.__name__.rpartition(".")[2]
    return f"{name} ({_instructions(kernels)})" if name == "cpp" else name


def _instructions(cpp: ModuleType) -> str:
    try:
        isa = cpp.isa()
    except (RuntimeError, ValueError) as error:
        return str(error)
    fused = [str(d).removeprefix("torch.") for d in (torch.bfloat16, torch.float32) if cpp.can_multiply(d)]
    return f"{isa}, " + (
        f"products of {' and '.join(fused)} fused with the softmax" if fused else "products by PyTorch"
    )
