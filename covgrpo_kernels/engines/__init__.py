"""Which engine runs where. `interface.py` says what an engine is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from .. import kernels
from .chunked import Chunked
from .fused_gpu import FusedGpu
from .interface import Engine

__all__ = ["Chunked", "Engine", "FusedGpu", "on_device", "select", "use"]

_chosen: list[Engine | tuple[int, int]] = []


def select(device: torch.device, dtype: torch.dtype) -> Engine:
    """The engine for hidden states of that dtype on that device."""
    choice = _chosen[-1] if _chosen else None
    if choice is not None and not isinstance(choice, tuple):
        return choice
    of_device = kernels.select(device)
    if of_device.__name__.endswith(".cpp") and of_device.can_multiply(dtype):
        from .fused_cpu import FusedCpu

        return FusedCpu(choice)
    if of_device.__name__.endswith(".triton") and dtype in (torch.bfloat16, torch.float16) and choice is None:
        return FusedGpu(dtype)
    return Chunked(of_device, choice)


@contextmanager
def use(choice: Engine | tuple[int, int]) -> Iterator[None]:
    """For tests and measurements: everything within uses that engine, or tiles of at most (rows, vocabulary ids), in
    all threads."""
    _chosen.append(choice)
    try:
        yield
    finally:
        _chosen.pop()


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """What an operator runs in: the device of its tensors is the one that kernels are launched on, and there is no
    autocast."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    # Entering it takes longer than asking whether there is need of it.
    is_cast = torch.is_autocast_enabled(device.type)
    with current, torch.autocast(device.type, enabled=False) if is_cast else nullcontext():
        yield
