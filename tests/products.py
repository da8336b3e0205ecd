"""Engines that note the shapes of the products they make, or refuse to make any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from covgrpo_kernels import engines, kernels


class Shapes(list[tuple[tuple[int, ...], tuple[int, ...]]]):
    def take(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """What was noted since the last time."""
        shapes = list(self)
        self.clear()
        return shapes


class _Recorded(engines.Chunked):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__(kernels.select(torch.device("cpu")))
        self.shapes = shapes

    def multiply_(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        self.shapes.append((tuple(a.shape), tuple(b.shape)))
        super().multiply_(a, b, out, add=add)


def _recorded_fused(shapes: Shapes) -> engines.Engine:
    """The fused CPU engine: what it multiplies is seen from the arguments of its kernels."""
    from covgrpo_kernels.engines.fused_cpu import FusedCpu

    engine = FusedCpu()
    cpp: Any = engine.kernels

    def fused_forward(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> None:
        shapes.append((tuple(hidden.shape), tuple(weight.T.shape)))
        cpp.fused_forward(hidden, weight, *rest, **options)

    def fused_backward(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> None:
        (n, d), v = hidden.shape, len(weight)
        shapes.append(((n, d), (d, v)))
        if options["hidden_sum"] is not None:
            shapes.append(((n, v), (v, d)))
        if options["weight_sum"] is not None or options["weight_grad"] is not None:
            shapes.append(((v, n), (n, d)))
        cpp.fused_backward(hidden, weight, *rest, **options)

    engine.kernels = SimpleNamespace(**vars(cpp) | dict(fused_forward=fused_forward, fused_backward=fused_backward))  # type: ignore[assignment]
    return engine


@contextmanager
def recorded_products(dtype: torch.dtype = torch.float32) -> Iterator[Shapes]:
    """Shapes of both operands of every product within, in order, on the CPU with the kernels that are chosen there."""
    shapes = Shapes()
    cpp = kernels.select(torch.device("cpu"))
    fused = cpp.__name__.endswith(".cpp") and cpp.can_multiply(dtype)
    with engines.use(_recorded_fused(shapes) if fused else _Recorded(shapes)):
        yield shapes


class NoProducts(engines.Chunked):
    """Fails the test where a product is made."""

    def __init__(self) -> None:
        super().__init__(kernels.eager)

    def multiply_(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        raise AssertionError("a product was computed before the values were checked")
