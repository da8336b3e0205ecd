"""Which backend of the tile operations runs where; `interface.py` says what one is."""

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
