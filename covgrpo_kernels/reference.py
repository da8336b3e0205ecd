"""The specification: the whole loss in plain PyTorch, building the logits, differentiated by autograd.

Everything else in this package is judged against these functions, run in float64. They take the arguments of
the public functions of the same names, check nothing, loop over groups and sequences, and are slow.
Symbols: z logits, x log-probs, H entropy, c covariance contributions, s2 their variance, W token weights,
A advantages, r importance ratios (arXiv 2605.11538; GRPO: arXiv 2402.03300).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import IGNORE_INDEX, ClipCov, CovarianceWeighting, CovGRPOConfig, HighEntropy, KLCov, Steer


class Reference(NamedTuple):
    loss: Tensor  # []
    logprobs: Tensor  # [...], as targets
    entropy: Tensor  # [...]
    weights: Tensor  # [...]


def linear_logprob(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number or [...]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:  # [...], [...]
    """Log-probs of the targets and entropies; ignored targets give zeros. As in every trainer, the logits have
    the dtype of the matrix product, the softmax is float32 at least."""
    z = F.linear(hidden, weight, bias) * logit_scale
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.ndim else temperature)
    lse = z.logsumexp(-1)
    valid = targets != ignore_index
    x = z.gather(-1, targets.where(valid, 0).unsqueeze(-1)).squeeze(-1) - lse
    p = (z - lse.unsqueeze(-1)).exp()
    entropy = lse - (p * z).sum(-1)
    return x.where(valid, 0), entropy.where(valid, 0)


def _per_token(value: Tensor, like: Tensor) -> Tensor:  # [B], [B, T] or [N] -> [N]
    return (value if value.shape == like.shape else value.unsqueeze(-1).expand_as(like)).reshape(-1)


def _ids(
    like: Tensor, group_ids: Tensor | None, group_size: int | None, sequence_ids: Tensor | None
) -> tuple[Any, ...]:
    """Group and sequence of every token, [N]; None where there is none."""
    if sequence_ids is None and like.ndim == 2:
        sequence_ids = torch.arange(len(like), device=like.device)
    if group_ids is None and group_size is not None:
        group_ids = torch.arange(len(like), device=like.device) // group_size
    return tuple(None if ids is None else _per_token(ids, like) for ids in (group_ids, sequence_ids))


def covariance_weights(
    logprobs: Tensor,  # [B, T] or [N]
    advantages: Tensor,  # [B], [B, T] or [N]
    mask: Tensor,  # [B, T] or [N]
    *,
    group_ids: Tensor | None = None,
    group_size: int | None = None,
    sequence_ids: Tensor | None = None,
    weighting: CovarianceWeighting | None = None,
) -> Tensor:  # as logprobs
    """W_t = n softmax(-c_t^2 / (2 s2)) over each scope (arXiv 2605.11538)."""
    weighting = weighting or CovarianceWeighting()
    group, sequence = _ids(logprobs, group_ids, group_size, sequence_ids)
    valid = mask.reshape(-1) != 0
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    x_all = logprobs.reshape(-1).to(dtype)
    x_all = x_all if weighting.differentiate_weights else x_all.detach()
    a_all = _per_token(advantages, logprobs).to(dtype)
    scope: Any = torch.zeros_like(valid, dtype=torch.long) if weighting.scope == "batch" else group
    weights = torch.zeros_like(x_all)
    for i in scope[valid].unique():
        rows = (valid & (scope == i)).nonzero().squeeze(-1)
        x, a = x_all[rows], a_all[rows]
        seq: Any = None if sequence is None else sequence[rows]
        if weighting.centering == "scope":
            dx = x - x.mean()
        else:
            dx = x - torch.stack([x[seq == s].mean() for s in seq.unique()])[seq.unique(return_inverse=True)[1]]
        if weighting.advantage_centering == "token":
            da = a - a.mean()
        else:
            da = a - torch.stack([a[seq == s].mean() for s in seq.unique()]).mean()
        c = dx * da
        s2 = (c - c.mean()).square().mean()
        n = len(rows) if weighting.normalizer == "valid" else int((scope == i).sum())
        # Two tokens always have equal c; constant x or A leaves rounding noise: no variance, equal weights.
        if s2 <= (8 * torch.finfo(dtype).eps * x.abs().max() * a.abs().max()) ** 2:
            w = torch.full_like(x, n / len(rows))
        else:
            w = n * torch.softmax(-c.square() / (2 * (s2.sqrt() + weighting.bandwidth_eps).square()), 0)
        weights = weights.index_put((rows,), w)
    return weights.reshape(logprobs.shape)


def covgrpo_loss(
    hidden: Tensor,  # [B, T, D] or [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [B, T] or [N]
    advantages: Tensor,  # [B], [B, T] or [N]
    mask: Tensor | None = None,  # as targets
    *,
    group_ids: Tensor | None = None,
    group_size: int | None = None,
    sequence_ids: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    config: CovGRPOConfig | None = None,
    normalizer: float | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Reference:
    """The policy loss. Only valid tokens are looked at from the first line on, so masked ones can't matter."""
    config = config or CovGRPOConfig()
    shape = targets.shape
    valid = targets != IGNORE_INDEX
    if mask is not None:
        valid = valid & (mask != 0)
    _, sequence = _ids(targets, group_ids, group_size, sequence_ids)
    keep = valid.reshape(-1).nonzero().squeeze(-1)

    def rows(value: Tensor | None) -> Any:
        return None if value is None else _per_token(value, targets)[keep]

    t = rows(temperature) if isinstance(temperature, Tensor) and temperature.ndim else temperature
    x, H = linear_logprob(
        hidden.reshape(-1, hidden.shape[-1])[keep], weight, rows(targets),
        bias=bias, temperature=t, logit_scale=logit_scale, softcap=softcap,
    )  # fmt: skip
    A, old, ref, tis = (rows(v) for v in (advantages, old_logprobs, ref_logprobs, rollout_weights))
    A = A.to(x.dtype)
    old = x.detach() if old is None else old.to(x.dtype)
    seq: Any = None if sequence is None else sequence[keep]
    kind = config.token_weighting

    r = _ratios(x - old, seq, config)
    low = None if config.clip_low is None or isinstance(kind, KLCov) else 1 - config.clip_low
    high = None if config.clip_high is None or isinstance(kind, KLCov) else 1 + config.clip_high
    clipped = r if low is None and high is None else r.clamp(low, high)

    # Token weights: the covariance weights, those of Clip-Cov (arXiv 2505.22617 eq. 9-10), or of the next function.
    W = torch.ones_like(x)
    n = len(keep)
    cov = ((x - x.mean()) * (A - A.mean())).detach()
    if isinstance(kind, CovarianceWeighting):
        all_x = x.new_zeros(targets.numel()).index_put((keep,), x).reshape(shape)
        ids: dict[str, Any] = dict(group_ids=group_ids, group_size=group_size, sequence_ids=sequence_ids)
        W = covariance_weights(all_x, advantages, valid, weighting=kind, **ids).reshape(-1)[keep]
    elif isinstance(kind, ClipCov):
        draw = torch.rand(targets.numel(), generator=generator, device=x.device, dtype=torch.float32)[keep]
        candidate = (cov > kind.low) & (cov < kind.high) & ~(clipped * A < r * A)
        chosen = draw.where(candidate, 2.0).argsort()[: max(int(kind.ratio * n), 1)]
        W = W.index_fill(0, chosen[candidate[chosen]], 0.0)
        A = A.where(W != 0, 0)  # those removed have no policy term
    elif isinstance(kind, (Steer, HighEntropy)):
        W = _weights_by_entropy(x.detach(), H.detach(), A, r.detach(), kind)
        A = A.where(W != 0, 0)  # those left out have no policy term

    token_loss = _policy_term(x, old, A, W, cov, r, clipped, high, tis, config)
    if config.beta != 0:
        d = ref.to(x.dtype) - x
        kl = {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - d - 1}[config.kl_estimator]
        token_loss = token_loss + config.beta * kl
    token_loss = token_loss - config.entropy_coef * H

    def scatter(value: Tensor) -> Tensor:
        return value.new_zeros(targets.numel()).index_put((keep,), value.detach()).reshape(shape)

    return Reference(_aggregate(token_loss, seq, config, normalizer), scatter(x), scatter(H), scatter(W))


def _weights_by_entropy(x: Tensor, H: Tensor, A: Tensor, r: Tensor, kind: Steer | HighEntropy) -> Tensor:  # [n] all
    """Of STEER (arXiv 2510.10150), or of the tokens of highest entropy, n over their number (arXiv 2506.01939)."""
    n = len(x)
    if isinstance(kind, Steer):
        change = (A * r * (1 - x.exp()) * (x + H)).abs()
        change = change.where(change.isfinite(), 0)
        k = -math.log(kind.min_weight) / max([*change.tolist(), kind.min_change])
        return (-k * change).exp().clamp(kind.min_weight, 1)
    ranked = H.nan_to_num(nan=-torch.inf)
    lowest = ranked.sort(descending=True).values[: max(int(kind.fraction * n + 0.9999), 1)][-1:]
    kept = ranked >= lowest
    return kept * (n / kept.sum().to(x.dtype))


def _ratios(
    log_ratio: Tensor, seq: Any, config: CovGRPOConfig
) -> Tensor:  # [n] of the valid tokens, as their sequences
    """Importance ratios, of the token or of its sequence (GSPO, arXiv 2507.18071 eq. 7)."""
    if config.importance_level == "sequence":
        order = seq.unique(return_inverse=True)[1]
        means = [log_ratio[seq == s].mean() for s in seq.unique()]
        log_ratio = torch.stack(means or [log_ratio.new_zeros(())])[order]
    return log_ratio.exp()


def _policy_term(
    x: Tensor,  # [n] of the valid tokens, as the next six and tis
    old: Tensor,
    A: Tensor,
    W: Tensor,
    cov: Tensor,
    r: Tensor,
    clipped: Tensor,
    high: float | None,
    tis: Tensor | None,
    config: CovGRPOConfig,
) -> Tensor:
    """Minus the surrogate, times the rollout weight. A zero advantage has none, whatever its ratio and weight, unless
    its log-prob is NaN: that must reach the loss."""
    kind = config.token_weighting
    has_term = (A != 0) | x.isnan()
    a = torch.where(has_term, W * A, 0)
    r, clipped = r.where(has_term, 1), clipped.where(has_term, 1)
    if config.loss_type == "cispo":
        policy = -(r if high is None else r.clamp(max=high)).detach() * a * x.where(A != 0, 0)
    else:
        surrogate = torch.minimum(r * a, clipped * a)
        if config.dual_clip is not None:
            surrogate = torch.where(a < 0, torch.maximum(surrogate, config.dual_clip * a), surrogate)
        policy = -surrogate
    if isinstance(kind, KLCov):
        top = cov.argsort(descending=True, stable=True)[: max(int(kind.fraction * len(x)), 1)]
        penalised = torch.zeros_like(has_term).index_fill(0, top, True)
        policy = policy + torch.where(penalised, kind.coef * (x - old).abs(), 0)
        has_term = has_term | penalised
    return policy if tis is None else policy * tis.where(has_term, 1)


def _aggregate(token_loss: Tensor, seq: Any, config: CovGRPOConfig, normalizer: float | Tensor | None) -> Tensor:
    if config.loss_type == "grpo":
        means = [token_loss[seq == s].mean() for s in seq.unique()]
        return sum(means, token_loss[:0].sum()) / (max(len(means), 1) if normalizer is None else normalizer)
    if config.loss_type == "dr_grpo":
        sequences = max(len(seq.unique()), 1) if normalizer is None else normalizer
        return token_loss.sum() / (sequences * config.max_completion_length)  # type: ignore[operator]
    return token_loss.sum() / (max(len(token_loss), 1) if normalizer is None else normalizer)
