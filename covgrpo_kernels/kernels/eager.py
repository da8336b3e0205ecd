"""The kernels in plain PyTorch, for any device: the specification of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from ..covariance import covariance_weights, covariance_weights_grad
from ..segments import segment_sums, segments_of_ids
from ..token_terms import token_terms
from .interface import LOG_ZERO, NO_MAX, VOCAB_BLOCK, Coefficients, Collecting, OnlineSoftmax, Tile, largest_candidates

# Exponentials and masks.
TILE_BUFFERS = 2

__all__ = [
    "TILE_BUFFERS",
    "covariance_weights",
    "covariance_weights_grad",
    "dlogits",
    "online_softmax_",
    "segment_sums",
    "segments_of_ids",
    "sparse_product",
    "tail_probabilities",
    "token_terms",
]


def _target_column(tile: Tile, width: int) -> tuple[Tensor, Tensor]:
    """[R, 1] the column of each target, clamped, and [R] whether it is in this tile."""
    column = tile.targets - tile.first
    return column.clamp(0, width - 1).unsqueeze(1), (column >= 0) & (column < width)


def online_softmax_(
    products: Tensor,  # [R, C]
    tile: Tile,
    running: OnlineSoftmax,  # of R rows, updated in place
    entropy: bool,
    collecting: Collecting | None = None,  # of R rows, updated in place
) -> None:
    """Adds a tile of raw products to the running softmax of its rows, VOCAB_BLOCK ids after VOCAB_BLOCK ids."""
    rows, width = products.shape
    z = tile.transform.apply_(products, tile.bias, tile.temperature)
    column, is_here = _target_column(tile, width)
    running.target.copy_(torch.where(is_here, z.gather(1, column).squeeze(1), running.target))
    if collecting is not None:
        _collect(z, tile.first, collecting)

    blocks = z.view(rows, -1, min(width, VOCAB_BLOCK))
    maxima = blocks.amax(-1).clamp_(min=NO_MAX)  # a block of -inf has no maximum
    d = blocks.sub_(maxima.unsqueeze(-1))
    at_max = d == 0
    ties = at_max.sum(-1).sub_(1).clamp_(min=0)
    e = d.exp() if entropy else d.exp_()
    e.masked_fill_(at_max, 0)
    sums = e.sum(-1).add_(ties)
    entropy_sums = d.clamp_(min=LOG_ZERO).mul_(e).sum(-1).neg_() if entropy else torch.zeros_like(sums)

    m, s, u, _ = running.packed
    for i in range(blocks.shape[1]):
        mb, sb, ub = maxima[:, i], sums[:, i], entropy_sums[:, i]
        top = torch.maximum(m, mb)
        gap, gap_b = top - m, top - mb
        w, wb = gap.neg().exp(), gap_b.neg().exp()
        # The smaller of the two maxima joins the sum of the others.
        lesser, lesser_gap = torch.minimum(w, wb), torch.maximum(gap, gap_b)
        u.copy_(w * (u + gap * s) + wb * (ub + gap_b * sb) + lesser * lesser_gap)
        s.copy_(w * s + wb * sb + lesser)
        m.copy_(top)


def _collect(
    z: Tensor,  # [R, C] logits
    first: int,
    collecting: Collecting,  # of R rows
) -> None:
    min_logits, candidates = collecting
    found, vocab_ids, logits, floors = candidates
    room = candidates.capacity
    hit = z >= torch.maximum(min_logits, floors).unsqueeze(1)
    full = (found + hit.sum(1) > room).nonzero().squeeze(1)
    if len(full):
        known = candidates.take(full)
        here = torch.arange(first, first + z.shape[1], dtype=torch.int32, device=z.device).expand(len(full), -1)
        both = known._replace(vocab_ids=torch.cat([known.vocab_ids, here], 1))
        of_both = torch.cat([known.logits.where(known.present(), -torch.inf), z[full].where(hit[full], -torch.inf)], 1)
        found[full], vocab_ids[full, : room // 2], logits[full, : room // 2], floors[full] = largest_candidates(
            both, of_both, room // 2
        )
        hit[full] = False
    row, column = hit.nonzero(as_tuple=True)
    here = torch.bincount(row, minlength=len(z))
    place = torch.arange(len(row), device=z.device) - (here.cumsum(0) - here)[row] + found[row]
    vocab_ids[row, place] = (column + first).to(vocab_ids.dtype)
    logits[row, place] = z[row, column]
    found.add_(here)


def dlogits(
    products: Tensor,  # [R, C]
    tile: Tile,
    coefficients: Coefficients,  # of R rows
    out: Tensor,  # [R, C], of any floating dtype; may be the products
) -> None:
    """From a tile of raw products to dL/dproducts:
    (g (1[v = y] - p) - e p (log p + H)) * softcap' * scale / temperature."""
    z = tile.transform.apply_(products, tile.bias, tile.temperature)
    softcap_slope = None
    if tile.transform.softcap is not None:
        softcap_slope = tile.transform.softcap_slope(z, tile.temperature)
    column, is_here = _target_column(tile, z.shape[1])
    log_p = z.sub_(coefficients.maximum.unsqueeze(1)).sub_(coefficients.log_sum.unsqueeze(1))
    g = coefficients.logprob_grad.unsqueeze(1)
    if not coefficients.has_entropy:
        dz = log_p.exp_().mul_(-g)
    else:
        log_p.clamp_(min=LOG_ZERO)
        p = log_p.exp()
        dz = log_p.add_(coefficients.entropy.unsqueeze(1)).mul_(coefficients.entropy_grad.unsqueeze(1)).add_(g)
        dz.mul_(p.neg_())
    dz.scatter_(1, column, torch.where(is_here.unsqueeze(1), coefficients.at_target.unsqueeze(1), dz.gather(1, column)))
    if softcap_slope is not None:
        dz.mul_(softcap_slope)
    slope = tile.transform.linear_slope(tile.temperature)
    if isinstance(slope, Tensor):
        dz.mul_(slope.unsqueeze(1))
    elif slope != 1.0:
        dz.mul_(slope)
    if out.data_ptr() != dz.data_ptr():
        out.copy_(dz)


def tail_probabilities(
    products: Tensor,  # [T, C] of the rows whose tails are wanted; not changed
    tile: Tile,  # of these rows, as the next
    coefficients: Coefficients,
    min_logits: Tensor,  # [T]
    scale: float,
) -> Tensor:  # [T, C]
    """scale * p * softcap' of the vocabulary ids that are below the row's ``min_logits`` and are not its target, else
    zero."""
    column, is_here = _target_column(tile, products.shape[1])
    z = tile.transform.apply_(products.clone(), tile.bias, tile.temperature)
    p = ((z - coefficients.maximum.unsqueeze(1)) - coefficients.log_sum.unsqueeze(1)).exp_().mul_(scale)
    p.masked_fill_(~(z < min_logits.unsqueeze(1)), 0)
    p.scatter_(1, column, p.gather(1, column).masked_fill(is_here.unsqueeze(1), 0))
    if tile.transform.softcap is not None:
        p.mul_(tile.transform.softcap_slope(z, tile.temperature))
    return p


# Elements of the temporary of `sparse_product`, 4 MiB in float32.
_SPARSE_PRODUCT_ELEMENTS = 1 << 20


def sparse_product(
    values: Tensor,  # [n]
    indices: Tensor,  # [n] rows of the matrix
    offsets: Tensor,  # [S + 1] where the values of each output row begin, and the end
    matrix: Tensor,  # [*, D]
    out: Tensor,  # [S, D]
) -> None:
    """A sparse matrix in CSR form times a dense one: out[i] = sum of values[k] * matrix[indices[k]], in order of k."""
    out.zero_()
    row = torch.repeat_interleave(torch.arange(len(out), device=out.device), offsets.diff(), output_size=len(values))
    step = max(1, _SPARSE_PRODUCT_ELEMENTS // max(out.shape[1], 1))
    for k in range(0, len(values), step):
        terms = matrix[indices[k : k + step]].to(out.dtype).mul_(values[k : k + step].unsqueeze(1))
        # Not index_add_, whose order is not fixed on a GPU.
        out.index_put_((row[k : k + step],), terms, accumulate=True)
