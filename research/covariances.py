"""Covariances and weights of a rollout, apart from any loss.

The study and the entropy law also need the deviations of the advantages and the bandwidths, in float64, which no public
function returns, so that this module imports internal ones.
"""

from __future__ import annotations

from torch import Tensor

from covgrpo_kernels.config import CovarianceWeighting
from covgrpo_kernels.covariance import CovarianceStats
from covgrpo_kernels.grpo.rollout import Rollout
from covgrpo_kernels.inputs import flatten_tokens
from covgrpo_kernels.objective import weighting_metrics
from covgrpo_kernels.weighting import covariance_stats


def group_statistics(x: Tensor, data: Rollout, group_size: int) -> CovarianceStats:  # [B, T]
    """CW-GRPO's covariances and weights [N] of log-probs of the rollout's tokens, whatever an arm does with them."""
    valid = data.batch.mask.flatten()
    tokens = flatten_tokens(
        x, data.advantages, valid, dtype=x.dtype, group_ids=None, group_size=group_size, sequence_ids=None
    )
    return covariance_stats(x.flatten().where(valid, 0), tokens, CovarianceWeighting())[0]


def statistics_metrics(found: CovarianceStats, data: Rollout) -> dict[str, float]:
    """How far covariances spread, and what CW-GRPO's weights leave of the size of the advantages: sum |W A| / sum |A|,
    1 where there are none."""
    valid = data.batch.mask.flatten()
    sizes = data.advantages.double().abs().unsqueeze(1).expand_as(data.batch.mask).flatten().where(valid, 0)
    total = sizes.sum().item()
    return {
        "covariance/std": found.covariance[valid].std(correction=0).item(),
        "advantages/kept": (found.weights * sizes).sum().item() / total if total else 1.0,
    }


def weight_metrics(weights: Tensor, found: CovarianceStats, data: Rollout) -> dict[str, float]:  # [B, T]
    """The loss's metrics of weights that it does not know of."""
    values = weighting_metrics(weights.flatten(), found.covariance, data.batch.mask.flatten())
    return {name: value.item() for name, value in values.items()}
