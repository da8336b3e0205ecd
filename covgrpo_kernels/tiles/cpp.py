"""The tile operations in C++ (csrc/), for the CPU; ImportError where the extension was not built.

On processors with AVX512-BF16 they multiply as well (`fold_products`, `grad_products`): logits then stay in registers,
and are float32 from bfloat16 operands, which no product of PyTorch gives on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpp  # type: ignore[attr-defined]
from ..config import CovarianceWeighting
from ..layout import Segments
from . import eager
from .interface import Candidates, Coefficients, GroupWeights, Head, State

TEMPORARIES = 0

_ops = torch.ops.covgrpo_cpp


def _listed(tensors: tuple[Tensor, ...] | None) -> list[Tensor]:
    return [] if tensors is None else list(tensors)


def isa() -> str:
    """The instruction set in use: avx512bf16, avx512, avx2 or baseline. The variable COVGRPO_CPU_ISA names a lesser one
    than the processor's; ValueError where it names none, RuntimeError where the processor does not have it."""
    return _cpp.isa()


def fold(
    tile: Tensor,  # [R, C]
    state: State,  # of R rows, updated in place
    targets: Tensor,  # [R] int64
    first: int,
    head: Head,
    bias: Tensor | None,  # [C]
    temperature: Tensor | None,  # [R]
    entropy: bool,
    candidates: Candidates | None = None,  # of R rows, updated in place
) -> None:
    """Folds a tile of raw products into the running statistics, block after block from left to right."""
    _ops.fold(tile, *state, targets, first, *head, bias, temperature, entropy, _listed(candidates))


def grad(
    tile: Tensor,  # [R, C]
    out: Tensor,  # [R, C], of any floating dtype; may be the tile
    targets: Tensor,  # [R] int64
    first: int,
    head: Head,
    bias: Tensor | None,  # [C]
    temperature: Tensor | None,  # [R]
    coefficients: Coefficients,  # of R rows
) -> None:
    """From a tile of raw products to dL/dproducts."""
    *per_row, entropy_grad = coefficients
    _ops.grad(tile, targets, first, *head, bias, temperature, per_row, entropy_grad)
    if out.data_ptr() != tile.data_ptr():
        out.copy_(tile)


def group_weights(
    logprobs: Tensor,  # [N], zero where masked
    advantages: Tensor,  # [N], zero where masked
    valid: Tensor,  # [N] bool
    scopes: Segments,
    sequences: Segments | None,  # needed by two of the readings
    weighting: CovarianceWeighting,
) -> GroupWeights:
    """Gaussian covariance weights of every scope (arXiv 2605.11538), two-pass, in float64."""
    weights, covariance, deviation = (torch.empty_like(logprobs, dtype=torch.float64) for _ in range(3))
    out = GroupWeights(weights, covariance, deviation, torch.empty(scopes.bound, dtype=torch.float64))
    _ops.group_weights(
        logprobs, advantages, valid, scopes.tensors(), [] if sequences is None else sequences.tensors(),
        weighting.centering == "sequence", weighting.advantage_centering == "response",
        weighting.normalizer == "numel", weighting.bandwidth_eps, *out,
    )  # fmt: skip
    return out


def sparse_product(
    values: Tensor,  # [n]
    indices: Tensor,  # [n] rows of the matrix
    offsets: Tensor,  # [S + 1] where each segment of values begins, and the end
    matrix: Tensor,  # [*, D]
    out: Tensor,  # [S, D]
) -> None:
    """out[i] = sum of values[k] * matrix[indices[k]] over segment i, in order."""
    if matrix.dtype == torch.float16:  # which C++ has no type for
        return eager.sparse_product(values, indices, offsets, matrix, out)
    _ops.sparse_product(values, indices, offsets, matrix, out)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether products of that dtype are this backend's own, on this processor."""
    return dtype in (torch.bfloat16, torch.float32) and isa() == "avx512bf16"


def fold_products_bytes(rows: int, entries: int, depth: int, dtype: torch.dtype) -> int:
    """Of the workspace that `fold_products` takes."""
    return _ops.fold_products_bytes(rows, entries, depth, dtype.itemsize)


def fold_products(
    hidden: Tensor,  # [R, D], as weight of any strides
    weight: Tensor,  # [C, D]
    state: State,  # of R rows, updated in place
    targets: Tensor,  # [R] int64
    first: int,
    head: Head,
    bias: Tensor | None,  # [C] float32
    temperature: Tensor | None,  # [R] float32
    entropy: bool,
    workspace: Tensor,  # bytes
    packed: bool = False,
    candidates: Candidates | None = None,  # of R rows, updated in place
) -> None:
    """`fold` of the products hidden @ weight.T, in blocks of BLOCK entries from left to right. The bits of a row do not
    depend on the other rows, on the number of threads, or on where slices of the head are cut between blocks.
    ``packed``: the workspace comes from a call with the same hidden states."""
    _ops.fold_products(
        hidden, weight, *state, targets, first, *head, bias, temperature, entropy,
        _listed(candidates), workspace, packed,
    )  # fmt: skip


def grad_products_bytes(rows: int, entries: int, depth: int, dtype: torch.dtype, needs: tuple[bool, bool, bool]) -> int:
    """Of the workspace that `grad_products` takes; ``needs`` of hidden, weight and bias."""
    return _ops.grad_products_bytes(rows, entries, depth, dtype.itemsize, *needs)


def grad_products(
    hidden: Tensor,  # [R, D], as weight of any strides
    weight: Tensor,  # [C, D]
    targets: Tensor,  # [R] int64
    first: int,
    head: Head,
    bias: Tensor | None,  # [C] float32
    temperature: Tensor | None,  # [R] float32
    coefficients: Coefficients,  # of R rows
    hidden_sum: Tensor | None,  # [R, D] float32, added to where first > 0; None: not wanted
    weight_sum: Tensor | None,  # [C, D] float32, for calls with rows of a slice; None: all of them are here
    add_to_weight: bool,
    weight_grad: Tensor | None,  # [C, D] of weight's dtype, for the call with the last rows of a slice
    weight_scale: float,  # times the sum, in weight_grad
    bias_sum: Tensor | None,  # [C] float32, added to
    workspace: Tensor,  # bytes
    packed: bool,
    tail: tuple[Tensor, Tensor] | None = None,  # weights and floors of the first TAIL_ROWS + 1 rows
    tail_bias: float = 0.0,
    addend: Tensor | None = None,  # [n, D] float32, rows that belong to dL/dweight before it is scaled
    addend_rows: Tensor | None = None,  # [C] int32, which of them belongs to an entry, or -1
) -> None:
    """`grad` of the products hidden @ weight.T, rounded to the dtype of hidden, and what is made of it: dL/dproducts @
    weight, its transpose @ hidden (not wanted: neither ``weight_sum`` nor ``weight_grad``), its sums over rows.
    ``tail``: row 0 has no gradient of its own but what `tail_probabilities` of `eager.py` makes of the others, and
    counts ``tail_bias`` times in the sum of the bias. ``packed``: the workspace comes from a call with the same hidden
    states and needs."""
    *per_row, entropy_grad = coefficients
    _ops.grad_products(
        hidden, weight, targets, first, *head, bias, temperature, per_row, entropy_grad,
        hidden_sum, first > 0, weight_sum, add_to_weight, weight_grad, weight_scale, bias_sum,
        _listed(tail), tail_bias, addend, addend_rows, workspace, packed,
    )  # fmt: skip
