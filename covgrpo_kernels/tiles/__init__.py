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


@cache
def _triton() -> ModuleType | str:
    """The backend, or why there is none. Imported at its first use, since triton is optional."""
    try:
        return importlib.import_module(".triton", __name__)
    except ImportError as error:
        return f"triton can't be imported: {error}"


def _usable(name: str, device: torch.device) -> ModuleType | str:
    """The backend, or why it does not run on ``device``."""
    if name == "eager":
        return eager
    backend = _triton()
    if isinstance(backend, ModuleType) and device.type != "cuda" and not backend.INTERPRETED:
        return "Triton kernels run on a GPU, or anywhere, slowly, with TRITON_INTERPRET=1"
    return backend


def select(device: torch.device) -> ModuleType:
    """The backend for tensors on ``device``. Raises RuntimeError where `VARIABLE` names one that can't run there,
    ValueError where it names none."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "auto":
        if device.type != "cuda":
            return eager
        fastest = _usable("triton", device)
        if isinstance(fastest, ModuleType):
            return fastest
        warnings.warn(f"plain PyTorch instead of fused kernels on {device}: {fastest}", RuntimeWarning, stacklevel=2)
        return eager
    if wanted not in ("eager", "triton"):
        raise ValueError(f"{VARIABLE} must be 'auto', 'eager' or 'triton', got {wanted!r}")
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
    triton = _usable("triton", device)
    if isinstance(triton, ModuleType):
        reason = "under the interpreter, for tests" if device.type == "cpu" else "fused kernels, used on GPUs"
        return [("eager", True, "plain PyTorch, any device"), ("triton", True, reason)]
    return [("eager", True, "plain PyTorch, any device"), ("triton", False, triton)]
