"""Which backend of the tile operations runs where; `interface.py` says what one is."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType

import torch

from . import eager

# Names a backend for all devices; unset or "auto": the fastest that a device has.
VARIABLE = "COVGRPO_BACKEND"

MISSING = {"cpp": "the C++ extension was not built", "triton": "triton can't be imported"}


@cache
def _import(name: str) -> ModuleType | str:
    """The backend, or why there is none. Imported at its first use, since triton and a compiler are optional."""
    try:
        return importlib.import_module(f".{name}", __name__)
    except ImportError as error:
        return f"{MISSING[name]}: {error}"


def _usable(name: str, device: torch.device) -> ModuleType | str:
    """The backend, or why it does not run on ``device``."""
    if name == "eager":
        return eager
    backend = _import(name)
    if name == "cpp" and device.type != "cpu":
        return "the C++ operations run on the CPU"
    if name == "triton" and isinstance(backend, ModuleType) and device.type != "cuda" and not backend.INTERPRETED:
        return "Triton kernels run on a GPU, or anywhere, slowly, with TRITON_INTERPRET=1"
    return backend


def select(device: torch.device) -> ModuleType:
    """The backend for tensors on ``device``. Raises RuntimeError where `VARIABLE` names one that can't run there,
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
    backend = _usable(wanted, device)
    if isinstance(backend, str):
        raise RuntimeError(f"{VARIABLE}={wanted} can't run on {device}: {backend}")
    return backend


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """What an operator runs in: its tensors' device, where kernels are launched, and no autocast."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, torch.autocast(device.type, enabled=False):
        yield


def backends() -> list[tuple[str, bool, str]]:
    """(name, usable on some device here, why) of every backend, for `covgrpo doctor`."""
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
    """The backend for tensors on ``device``, in words."""
    backend = select(device)
    name = backend.__name__.rpartition(".")[2]
    return f"{name} ({_instructions(backend)})" if name == "cpp" else name


def _instructions(cpp: ModuleType) -> str:
    try:
        isa = cpp.isa()
    except (RuntimeError, ValueError) as error:
        return str(error)
    fused = [str(d).removeprefix("torch.") for d in (torch.bfloat16, torch.float32) if cpp.multiplies(d)]
    return f"{isa}, " + (
        f"products of {' and '.join(fused)} fused with the softmax" if fused else "products by PyTorch"
    )
