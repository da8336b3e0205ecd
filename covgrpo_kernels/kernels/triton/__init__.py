"""The tile operations as Triton kernels, one file each: for NVIDIA (sm_80 and later) and AMD (gfx942) GPUs, and for
any device under Triton's interpreter (TRITON_INTERPRET=1), which the tests use. The only place that imports triton."""

from __future__ import annotations

import torch
import triton

from .fold import fold
from .grad import grad
from .group_weights import group_weights
from .sparse_product import sparse_product

# Whether kernels run on CPU tensors; settled when they are defined.
INTERPRETED: bool = triton.knobs.runtime.interpret

# Tiles' worth of temporaries that fold and grad make.
TEMPORARIES = 0


def multiplies(dtype: torch.dtype) -> bool:
    """Products are PyTorch's: `forward.py` is not used until it has been seen to win."""
    return False


__all__ = ["INTERPRETED", "TEMPORARIES", "fold", "grad", "group_weights", "multiplies", "sparse_product"]
