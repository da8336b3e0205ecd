"""The tile operations behind one interface, and which of their implementations runs where.

A backend is a module with the functions of `eager.py`: ``new_state``, ``fold``, ``finish``, ``grad`` and
``group_weights``.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import eager


def select(device: torch.device) -> ModuleType:
    """The backend for tensors on ``device``."""
    return eager


def backends() -> list[tuple[str, bool, str]]:
    """(name, usable, why) of every backend, for `covgrpo doctor`."""
    return [("eager", True, "plain PyTorch, any device")]
