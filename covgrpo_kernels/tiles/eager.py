"""The tile operations in plain PyTorch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import CovarianceWeighting
from ..layout import Segments
from .interface import BLOCK, LOG_ZERO, NO_MAX, Candidates, Coefficients, GroupWeights, Head, Moments, State

# Tiles' worth of temporaries that fold and grad make: exponentials and masks.
TEMPORARIES = 2


def multiplies(dtype: torch.dtype) -> bool:
    """Products are PyTorch's."""
    return False


def logits_(tile: Tensor, head: Head, bias: Tensor | None, temperature: Tensor | None) -> Tensor:
    if bias is not None:
        tile.add_(bias)
    if head.softcap is not None:
        tile.mul_(head.scale / head.softcap).tanh_().mul_(head.softcap)
    elif head.scale != 1.0:
        tile.mul_(head.scale)
    if temperature is not None:
        tile.div_(temperature.unsqueeze(1))
    return tile


def _target_column(targets: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    column = targets - first
    return column.clamp(0, width - 1).unsqueeze(1), (column >= 0) & (column < width)


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
    rows, width = tile.shape
    z = logits_(tile, head, bias, temperature)
    column, here = _target_column(targets, first, width)
    state.target.copy_(torch.where(here, z.gather(1, column).squeeze(1), state.target))
    if candidates is not None:
        _add_candidates(z, first, candidates)

    blocks = z.view(rows, -1, min(width, BLOCK))
    maxima = blocks.amax(-1).clamp_(min=NO_MAX)  # a block of -inf has no maximum
    d = blocks.sub_(maxima.unsqueeze(-1))
    at_max = d == 0
    ties = at_max.sum(-1).sub_(1).clamp_(min=0)
    e = d.exp() if entropy else d.exp_()
    e.masked_fill_(at_max, 0)
    totals = e.sum(-1).add_(ties)
    moments = d.clamp_(min=LOG_ZERO).mul_(e).sum(-1).neg_() if entropy else torch.zeros_like(totals)

    m, s, u, _ = state
    for i in range(blocks.shape[1]):
        mb, sb, ub = maxima[:, i], totals[:, i], moments[:, i]
        top = torch.maximum(m, mb)
        gap, gap_b = top - m, top - mb
        w, wb = gap.neg().exp(), gap_b.neg().exp()
        # The smaller of the two maxima joins the sum of the others.
        lesser, lesser_gap = torch.minimum(w, wb), torch.maximum(gap, gap_b)
        u.copy_(w * (u + gap * s) + wb * (ub + gap_b * sb) + lesser * lesser_gap)
        s.copy_(w * s + wb * sb + lesser)
        m.copy_(top)


def _add_candidates(
    z: Tensor,  # [R, C]
    first: int,
    candidates: Candidates,  # of R rows
) -> None:
    threshold, so_far, entries, logits = candidates
    row, column = (z >= threshold.unsqueeze(1)).nonzero(as_tuple=True)
    found = torch.bincount(row, minlength=len(z))
    place = torch.arange(len(row), device=z.device) - (found.cumsum(0) - found)[row] + so_far[row]
    kept = place < entries.shape[1]
    row, column, place = row[kept], column[kept], place[kept]
    entries[row, place] = (column + first).to(entries.dtype)
    logits[row, place] = z[row, column]
    so_far.add_(found)


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
    """From a tile of raw products to dL/dproducts:
    (g (1[v = y] - p) - e p (log p + H)) * softcap' * scale / temperature."""
    *per_row, entropy_grad = coefficients
    maximum, log_total, at_target, g, entropy = (value.unsqueeze(1) for value in per_row)
    z = logits_(tile, head, bias, temperature)
    slope = None
    if head.softcap is not None:
        slope = capping(z, head.softcap, None if temperature is None else temperature.unsqueeze(1))
    column, here = _target_column(targets, first, z.shape[1])
    log_p = z.sub_(maximum).sub_(log_total)
    if entropy_grad is None:
        dz = log_p.exp_().mul_(-g)
    else:
        log_p.clamp_(min=LOG_ZERO)
        p = log_p.exp()
        dz = log_p.add_(entropy).mul_(entropy_grad.unsqueeze(1)).add_(g)
        dz.mul_(p.neg_())
    dz.scatter_(1, column, torch.where(here.unsqueeze(1), at_target, dz.gather(1, column)))
    if slope is not None:
        dz.mul_(slope)
    if temperature is not None:
        dz.mul_((head.scale / temperature).unsqueeze(1))
    elif head.scale != 1.0:
        dz.mul_(head.scale)
    if out.data_ptr() != dz.data_ptr():
        out.copy_(dz)


def tail_probabilities(
    tile: Tensor,  # [R, C] of raw products, kept
    targets: Tensor,  # [R]
    first: int,
    head: Head,
    bias: Tensor | None,  # [C]
    temperature: Tensor | None,  # [R]
    coefficients: Coefficients,  # of R rows
    weights: Tensor,  # [R]
    floors: Tensor,  # [R] logits
) -> Tensor:  # [C]
    """What the rows make of entries that are below their floors and not their targets: sum of weight * p * softcap'."""
    column, here = _target_column(targets, first, tile.shape[1])
    z = logits_(tile.clone(), head, bias, temperature)
    p = ((z - coefficients.maximum.unsqueeze(1)) - coefficients.log_total.unsqueeze(1)).exp_()
    p.masked_fill_(~(z < floors.unsqueeze(1)), 0)
    p.scatter_(1, column, p.gather(1, column).masked_fill(here.unsqueeze(1), 0))
    if head.softcap is not None:
        p.mul_(capping(z, head.softcap, None if temperature is None else temperature.unsqueeze(1)))
    return weights @ p


def capping(logits: Tensor, softcap: float, temperature: Tensor | None) -> Tensor:
    """The derivative of softcap, 1 - tanh^2, from what comes out of it and the temperature."""
    per_cap = logits / softcap
    if temperature is not None:
        per_cap.mul_(temperature)
    return per_cap.square_().neg_().add_(1)


# Elements of a temporary of the sparse product.
_AT_ONCE = 1 << 20


def sparse_product(
    values: Tensor,  # [n]
    indices: Tensor,  # [n] rows of the matrix
    offsets: Tensor,  # [S + 1] where each segment of values begins, and the end
    matrix: Tensor,  # [*, D]
    out: Tensor,  # [S, D]
) -> None:
    """out[i] = sum of values[k] * matrix[indices[k]] over segment i, in order."""
    out.zero_()
    segment = torch.repeat_interleave(
        torch.arange(len(out), device=out.device), offsets.diff(), output_size=len(values)
    )
    step = max(1, _AT_ONCE // max(out.shape[1], 1))
    for k in range(0, len(values), step):
        terms = matrix[indices[k : k + step]].to(out.dtype).mul_(values[k : k + step].unsqueeze(1))
        # Not index_add_, whose order is not fixed on a GPU.
        out.index_put_((segment[k : k + step],), terms, accumulate=True)


def group_weights(
    logprobs: Tensor,  # [N], zero where masked
    advantages: Tensor,  # [N], zero where masked
    valid: Tensor,  # [N] bool
    scopes: Segments,
    sequences: Segments | None,  # needed by two of the readings
    weighting: CovarianceWeighting,
) -> GroupWeights:
    """Gaussian covariance weights of every scope (arXiv 2605.11538), two-pass, in float64."""
    moments = scope_moments(logprobs, advantages, valid, scopes, sequences, weighting)
    return weights_of_moments(logprobs, advantages, valid, scopes, sequences, weighting, moments)


def scope_moments(
    logprobs: Tensor,  # [N], as the next four of `group_weights`
    advantages: Tensor,
    valid: Tensor,
    scopes: Segments,
    sequences: Segments | None,
    weighting: CovarianceWeighting,
) -> Moments:
    eps = torch.finfo(logprobs.dtype).eps
    x, a = logprobs.double(), advantages.double()
    ones = valid.double()
    n = scopes.sum(ones)
    n_or_1 = n.clamp(min=1)
    if weighting.advantage_centering == "token":
        mean_a = scopes.sum(a) / n_or_1
    else:
        # 1 / length per token makes every response count once.
        assert sequences is not None
        share = ones / sequences.spread(sequences.sum(ones).clamp(min=1))
        responses = scopes.sum(share)
        mean_a = scopes.sum(a * share) / responses.where(responses > 0, 1)
    mean_x = scopes.sum(x) / n_or_1
    c, _ = _covariances(x, a, valid, scopes, sequences, weighting, mean_x, mean_a)

    dc = (c - scopes.spread(scopes.sum(c) / n_or_1)).where(valid, 0)
    variance = scopes.sum(dc.square()) / n_or_1
    # Zero within rounding: two tokens always have equal c, constant x or A leaves noise. NaN is not zero.
    noise = 8 * eps * scopes.max(x.abs(), 0.0) * scopes.max(a.abs(), 0.0)
    std = variance.sqrt().masked_fill(variance <= noise.square(), 0)

    q = _exponents(c, std, scopes, weighting)
    peak = scopes.max(q.where(valid, -torch.inf), -torch.inf)
    total = scopes.sum((q - scopes.spread(peak)).exp().where(valid, 0))
    goal = n if weighting.normalizer == "valid" else scopes.sum(torch.ones_like(ones))
    return Moments(mean_x, mean_a, std, peak, goal / total.where(n > 0, 1))


def weights_of_moments(
    logprobs: Tensor,  # [N], as the next four of `group_weights`
    advantages: Tensor,
    valid: Tensor,
    scopes: Segments,
    sequences: Segments | None,
    weighting: CovarianceWeighting,
    moments: Moments,  # of the scopes
) -> GroupWeights:
    mean_x, mean_a, std, peak, factor = moments
    x, a = logprobs.double(), advantages.double()
    c, da = _covariances(x, a, valid, scopes, sequences, weighting, mean_x, mean_a)
    kernel = (_exponents(c, std, scopes, weighting) - scopes.spread(peak)).exp().where(valid, 0)
    return GroupWeights((kernel * scopes.spread(factor)).where(valid, 0), c, da, std)


def _covariances(
    x: Tensor,  # [N]
    a: Tensor,  # [N]
    valid: Tensor,  # [N] bool
    scopes: Segments,
    sequences: Segments | None,
    weighting: CovarianceWeighting,
    mean_x: Tensor,  # [S]
    mean_a: Tensor,  # [S]
) -> tuple[Tensor, Tensor]:  # [N] c, [N] deviations of a
    if weighting.centering == "scope":
        centre = scopes.spread(mean_x)
    else:
        assert sequences is not None
        centre = sequences.spread(sequences.sum(x) / sequences.sum(valid.double()).clamp(min=1))
    da = (a - scopes.spread(mean_a)).where(valid, 0)
    return ((x - centre) * da).where(valid, 0), da


def _exponents(c: Tensor, std: Tensor, scopes: Segments, weighting: CovarianceWeighting) -> Tensor:  # [N]
    bandwidth = scopes.spread(std + weighting.bandwidth_eps)
    return (-c.square() / (2 * bandwidth.square())).masked_fill(scopes.spread(std) == 0, 0)
