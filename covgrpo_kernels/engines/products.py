"""Matrix products by PyTorch with sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply_(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, with sums in the dtype of ``out``. On a CPU, PyTorch has such products only of
    operands of that dtype; others are cast first."""
    if a.device.type == "cpu" and a.dtype != out.dtype:
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
