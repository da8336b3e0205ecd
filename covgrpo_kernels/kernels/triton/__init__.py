"""The kernels in Triton, one file each: for NVIDIA (sm_80 and later) and AMD (gfx942) GPUs, and for any device under
Triton's interpreter (TRITON_INTERPRET=1), which the tests use. This folder is the only place that imports triton."""

from __future__ import annotations

import triton

from .covariance_weights import covariance_weights
from .covariance_weights_grad import covariance_weights_grad
from .dlogits import dlogits
from .online_softmax import online_softmax_
from .segment_sums import segment_sums
from .segments import segments_of_ids
from .sparse_product import sparse_product
from .token_terms import token_terms

# Whether kernels run on CPU tensors; settled when they are defined.
INTERPRETED: bool = triton.knobs.runtime.interpret

TILE_BUFFERS = 0

__all__ = [
    "INTERPRETED",
    "TILE_BUFFERS",
    "covariance_weights",
    "covariance_weights_grad",
    "dlogits",
    "online_softmax_",
    "segment_sums",
    "segments_of_ids",
    "sparse_product",
    "token_terms",
]
