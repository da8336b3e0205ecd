"""Coefficients of a size that 16 bits can hold."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit_scale(g: Tensor, e: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(power of two, coefficients divided by it): the largest is in [1/2, 1), since float16 would lose the small
    entries of a loss that is averaged over many tokens. The division is exact. Undone at the end."""
    sizes = g.abs() if e is None else torch.maximum(g.abs(), e.abs())
    largest = sizes.where(sizes.isfinite(), 0).amax() if len(g) else g.new_zeros(())
    # 2^100 and its inverse are float32 numbers.
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return scale, torch.ldexp(g, -exponent), None if e is None else torch.ldexp(e, -exponent)
