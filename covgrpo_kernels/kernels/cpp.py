"""The kernels in C++ (csrc/), for the CPU. Importing this raises ImportError where the extension was not built.

On processors with AVX512-BF16 there are two more, which multiply as well (`fused_forward`, `fused_backward`): the
logits stay in registers, and are float32 even from bfloat16 operands, which no product of PyTorch gives on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpp  # type: ignore[attr-defined]
from ..config import CovarianceWeighting
from ..covariance import CovarianceStats
from ..segments import Segments
from . import eager
from .eager import covariance_weights_grad as covariance_weights_grad
from .eager import segment_sums as segment_sums
from .eager import segments_of_ids as segments_of_ids
from .eager import token_terms as token_terms
from .interface import Coefficients, Collecting, OnlineSoftmax, Tile

TILE_BUFFERS = 0

_ops = torch.ops.covgrpo_cpp


def isa() -> str:
    """The instruction set in use: avx512bf16, avx512, avx2 or baseline. The environment variable COVGRPO_CPU_ISA names
    a lesser one than the processor has. Raises ValueError where it names none, RuntimeError where the processor lacks
    it."""
    return _cpp.isa()


def _flat(tile: Tile) -> tuple[object, ...]:
    return tile.targets, tile.first, *tile.transform, tile.bias, tile.temperature


def _list(collecting: Collecting | None) -> list[Tensor]:
    return [] if collecting is None else [collecting.min_logits, *collecting.candidates]


def online_softmax_(
    products: Tensor,  # [R, C]
    tile: Tile,
    running: OnlineSoftmax,  # of R rows, updated in place
    entropy: bool,
    collecting: Collecting | None = None,  # of R rows, updated in place
) -> None:
    """Adds a tile of raw products to the running softmax of its rows, VOCAB_BLOCK ids after VOCAB_BLOCK ids."""
    _ops.online_softmax_(products, running.packed, *_flat(tile), entropy, _list(collecting))


def dlogits(
    products: Tensor,  # [R, C]
    tile: Tile,
    coefficients: Coefficients,  # of R rows
    out: Tensor,  # [R, C], of any floating dtype; may be the products
) -> None:
    """From a tile of raw products to dL/dproducts."""
    _ops.dlogits(products, *_flat(tile), coefficients.packed)
    if out.data_ptr() != products.data_ptr():
        out.copy_(products)


def covariance_weights(
    logprobs: Tensor,  # [N], zero where masked
    advantages: Tensor,  # [N], zero where masked
    valid: Tensor,  # [N] bool
    scopes: Segments,
    sequences: Segments | None,  # needed by two of the readings of the paper
    weighting: CovarianceWeighting,
) -> CovarianceStats:
    """Gaussian covariance weights of every scope (arXiv 2605.11538), two-pass, in float64."""
    weights, covariance, deviation = (torch.empty_like(logprobs, dtype=torch.float64) for _ in range(3))
    out = CovarianceStats(weights, covariance, deviation, torch.empty(scopes.bound, dtype=torch.float64))
    _ops.covariance_weights(
        logprobs, advantages, valid, scopes.tensors(), [] if sequences is None else sequences.tensors(),
        weighting.centering == "sequence", weighting.advantage_centering == "response",
        weighting.normalizer == "numel", weighting.bandwidth_eps, *out,
    )  # fmt: skip
    return out


def sparse_product(
    values: Tensor,  # [n]
    indices: Tensor,  # [n] rows of the matrix
    offsets: Tensor,  # [S + 1] where the values of each output row begin, and the end
    matrix: Tensor,  # [*, D]
    out: Tensor,  # [S, D]
) -> None:
    """A sparse matrix in CSR form times a dense one: out[i] = sum of values[k] * matrix[indices[k]], in order of k."""
    if matrix.dtype == torch.float16:  # C++ has no type for it
        return eager.sparse_product(values, indices, offsets, matrix, out)
    _ops.sparse_product(values, indices, offsets, matrix, out)


# ------------------------------------------------------------------------------------- with products of their own


def can_multiply(dtype: torch.dtype) -> bool:
    """Whether `fused_forward` and `fused_backward` exist for operands of that dtype on this processor."""
    return dtype in (torch.bfloat16, torch.float32) and isa() == "avx512bf16"


def fused_forward_bytes(rows: int, vocab: int, depth: int, dtype: torch.dtype) -> int:
    """Of the workspace that `fused_forward` takes."""
    return _ops.fused_forward_bytes(rows, vocab, depth, dtype.itemsize)


def fused_forward(
    hidden: Tensor,  # [R, D], as weight of any strides
    weight: Tensor,  # [C, D]
    tile: Tile,  # bias and temperature in float32
    running: OnlineSoftmax,  # of R rows, float32, updated in place
    entropy: bool,
    workspace: Tensor,  # bytes
    keep_packed: bool = False,
    collecting: Collecting | None = None,  # of R rows, updated in place
) -> None:
    """`online_softmax_` of the products hidden @ weight.T. The bits of a row do not depend on the other rows, on the
    number of threads, or on where the head is cut between blocks of VOCAB_BLOCK ids.

    ``keep_packed``: the workspace was used by a call with the same hidden states, whose packed copy is in it.
    """
    _ops.fused_forward(hidden, weight, running.packed, *_flat(tile), entropy, _list(collecting), workspace, keep_packed)


def fused_backward_bytes(rows: int, vocab: int, depth: int, dtype: torch.dtype, needs: tuple[bool, bool, bool]) -> int:
    """Of the workspace that `fused_backward` takes; ``needs`` gradients of hidden, weight and bias."""
    return _ops.fused_backward_bytes(rows, vocab, depth, dtype.itemsize, *needs)


def fused_backward(
    hidden: Tensor,  # [R, D], as weight of any strides
    weight: Tensor,  # [C, D]
    tile: Tile,  # bias and temperature in float32
    coefficients: Coefficients,  # of R rows
    *,
    hidden_sum: Tensor | None,  # [R, D] float32, added to where tile.first > 0; None: not wanted
    weight_sum: Tensor
    | None,  # [C, D] float32, for all calls with rows of a slice but the last; None: there is one call
    add_to_weight: bool,
    weight_grad: Tensor | None,  # [C, D] of weight's dtype, for the call with the last rows of a slice
    weight_scale: float,  # what the sum is multiplied by before it is rounded into weight_grad
    bias_sum: Tensor | None,  # [C] float32, added to
    workspace: Tensor,  # bytes
    keep_packed: bool = False,
    tails: tuple[Tensor, Tensor] | None = None,  # [16] min_logits and [16] bias_counts, see below
    tail_scale: float = 0.0,
    addend: Tensor | None = None,  # [n, D] float32, rows that belong to dL/dweight before it is scaled
    addend_rows: Tensor | None = None,  # [C] int32, which of them belongs to a vocabulary id, or -1
) -> None:
    """`dlogits` of the products hidden @ weight.T, rounded to the dtype of hidden, and what is made of it: dL/dproducts
    @ weight, its transpose @ hidden (not wanted where neither ``weight_sum`` nor ``weight_grad`` is given), its sums
    over rows.

    ``tails``: the first sixteen rows have no logits of their own: row k has in place of dL/dproducts the tail of row 16
    + k, ``tail_scale`` * p * softcap' of the vocabulary ids whose logit is below min_logits[k] and that are not that
    row's target, and counts bias_counts[k] times in the sum of the bias. Their hidden states take part in the product
    with dL/dproducts only. ``keep_packed``: the workspace was used by a call with the same hidden states and needs."""
    _ops.fused_backward(
        hidden, weight, *_flat(tile), coefficients.packed, hidden_sum, tile.first > 0, weight_sum, add_to_weight,
        weight_grad, weight_scale, bias_sum, [] if tails is None else list(tails), tail_scale, addend, addend_rows,
        workspace, keep_packed,
    )  # fmt: skip
