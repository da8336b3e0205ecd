"""What the study compares: two tasks, and arms that share everything but their token weights.

Arms have the same start, problems, sizes and learning rate. Each changes one thing, but for these: author_code() is a
whole configuration, and the KL term and the missing PPO clip are part of it; KL-Cov has no PPO clip by definition; and
arms with `weights` have them computed once for each rollout, where CW-GRPO computes them in each update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from covgrpo_kernels import CovarianceWeighting, CovGRPOConfig, covariance_weights
from covgrpo_kernels.grpo.config import TrainConfig


@dataclass(frozen=True)
class Evaluation:
    """At the temperature of training, of the same problems with the same random numbers in all runs."""

    problems: int  # distinct held-out ones
    samples: int  # for each, 8 at least
    every: int  # steps; also before the first and after the last one


# Countdown has many right answers, which are searched for; arithmetic has one, which is worked out. Of pilots:
# - At these sizes GRPO takes countdown from 29% to 75% of held-out responses right and from 0.55 to 0.10 nats of
#   entropy, arithmetic from 44% to 60% and from 0.33 to 0.17: entropy falls, and reward has room before and after.
# - At a learning rate of 5e-4 countdown does the same in half as many steps; what methods differ in should not be what
#   steps that are too large do to them, so it is 2e-4.
# - From a start of 30% GRPO does not learn arithmetic: what is right at that stage is mostly guessed.
# - A run takes a minute of a core, so 408 of them (34 of each seed) some three and a half hours on two.
# The temperature is 1, where the paper has 0.7: entropies are then those of the policy itself.
_SIZES = TrainConfig(
    hidden_size=64,
    layers=2,
    warm_start_steps=3000,
    warm_start_lr=3e-3,
    max_new_tokens=7,
    temperature=1.0,
    weighting="none",
    inner_steps=4,
    lr=2e-4,
    steps=300,
)
TASKS = {
    "countdown": dataclasses.replace(_SIZES, difficulty=1, warm_start_reward=0.3),
    "arithmetic": dataclasses.replace(_SIZES, difficulty=2, warm_start_reward=0.45),
}
EVALUATION = Evaluation(problems=64, samples=16, every=50)
SEEDS = 12
REAL_SEEDS = 3  # of the runs with a real model

# The same in a minute or two: it shows that all works, and nothing else.
_MINIATURE = dict(
    layers=1, warm_start_steps=60, prompts_per_step=8, group_size=4, inner_steps=2, max_new_tokens=5, steps=6
)
MINIATURE_TASKS = {
    name: dataclasses.replace(config, difficulty=1, **_MINIATURE)  # type: ignore[arg-type]
    for name, config in TASKS.items()
}
MINIATURE_EVALUATION = Evaluation(problems=8, samples=8, every=3)
MINIATURE_SEEDS = 2


# Weights of the tokens [B, T], before the first update of a rollout: from its log-probs [B, T], advantages [B] and mask
# [B, T], the size of its groups, and a generator.
TokenWeights = Callable[[Tensor, Tensor, Tensor, int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Arm:
    title: str
    loss: CovGRPOConfig
    weights: TokenWeights | None = None  # weigh the advantages, where the loss itself does not
    lr_like: str | None = None  # the learning rate is multiplied by `advantages/kept` of this arm's run


def permuted(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, group_size: int, generator: torch.Generator
) -> Tensor:  # [B, T]
    """The weights of CW-GRPO in random order among the valid tokens of their group: as uneven as they are, and blind to
    the covariance."""
    weights = covariance_weights(logprobs, advantages, mask, group_size=group_size)
    for rows, valid in zip(weights.split(group_size), mask.split(group_size), strict=True):
        values = rows[valid]
        rows[valid] = values[torch.randperm(len(values), generator=generator, device=generator.device)]
    return weights


def batch_bandwidth(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, group_size: int, _: torch.Generator
) -> Tensor:  # [B, T]
    """The covariances are those of the group, their standard deviation and the normaliser those of the batch. Log-probs
    and advantages with the mean of their group taken off have none in the batch: scope "batch" then does this."""
    a = advantages.unsqueeze(1).expand_as(mask)
    return covariance_weights(
        logprobs - group_mean(logprobs, mask, group_size),
        a - group_mean(a, mask, group_size),
        mask,
        weighting=CovarianceWeighting(scope="batch"),
    )


def group_mean(values: Tensor, weights: Tensor, group_size: int) -> Tensor:  # [B, T], of both; [B, 1]
    """The weighted mean over the tokens of each group. Tokens without weight have no influence."""
    weighted = (values * weights).where(weights != 0, 0)
    total, mean = (each.view(-1, group_size * weights.shape[1]).sum(1) for each in (weights, weighted))
    return (mean / total).repeat_interleave(group_size).unsqueeze(1)


def recentred(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, group_size: int, _: torch.Generator
) -> Tensor:  # [B, T]
    """W (A - mean of A under W) / A: the weighted advantages then add up to zero in each group."""
    weights = covariance_weights(logprobs, advantages, mask, group_size=group_size)
    a = advantages.unsqueeze(1).expand_as(mask)
    # Advantages are zero where a group's rewards are equal: its weights teach nothing.
    return weights * (1 - group_mean(a, weights, group_size) / a.where(a != 0, torch.inf))


def gaussian(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, group_size: int, _: torch.Generator, *, side: int, centre: bool
) -> Tensor:  # [B, T]
    """CW-GRPO's Gaussian on the covariances of one sign alone, 1 on the others (`side` 1 or -1; 0: on all); with the
    mean covariance for its centre in place of zero (`centre`). The weights of a group have the mean 1."""
    c = covariance_weights(logprobs, advantages, mask, group_size=group_size, return_covariance=True).covariance
    c, valid = c.double(), mask.double()
    deviation = c - group_mean(c, valid, group_size)
    variance = group_mean(deviation.square(), valid, group_size)
    exponent = -(deviation if centre else c).square() / (2 * variance)
    kernel = exponent.where((variance > 0) & (side * c >= 0), 0).exp() * valid
    return (kernel / group_mean(kernel, valid, group_size)).to(logprobs.dtype)


def _reading(**changes: str | bool) -> CovGRPOConfig:
    return CovGRPOConfig(weighting=CovarianceWeighting(**changes))  # type: ignore[arg-type]


def _author_code() -> CovGRPOConfig:
    """Its batch is a group. Of minibatches of several groups, scope "group" is the same with less work."""
    config = CovGRPOConfig.author_code()
    assert isinstance(config.weighting, CovarianceWeighting)
    return dataclasses.replace(config, weighting=dataclasses.replace(config.weighting, scope="group"))


_NONE = CovGRPOConfig(weighting="none")

ARMS = {
    "grpo": Arm("GRPO", _NONE),
    "cw_grpo": Arm("CW-GRPO", CovGRPOConfig.paper()),
    "author_code": Arm("CW-GRPO, author's code", _author_code()),
    "clip_cov": Arm("Clip-Cov", CovGRPOConfig(weighting="clip_cov")),
    "kl_cov": Arm("KL-Cov", CovGRPOConfig(weighting="kl_cov")),
    "entropy_bonus": Arm("GRPO, entropy bonus", dataclasses.replace(_NONE, entropy_coef=0.01)),
    # Controls.
    "permuted": Arm("CW-GRPO, weights permuted", _NONE, permuted),
    # The mean weight is 1 by construction, and so would be the factor. What the weights do change is the size of the
    # weighted advantages: extreme tokens have large ones. AdamW is blind to a constant factor of the loss, so the
    # learning rate gets it: this control is of smaller steps, not of a smaller loss.
    "mean_weight": Arm("GRPO, steps as small", _NONE, lr_like="cw_grpo"),
    # Weights by entropy, with the constants of their papers. The recorded runs do not have them yet.
    "steer": Arm("STEER", CovGRPOConfig(weighting="steer")),
    "high_entropy": Arm("80/20", CovGRPOConfig(weighting="high_entropy")),
}
# The readings of the paper that differ, one at a time; and the bandwidth of the batch with means of the group.
ABLATIONS = {
    "scope_batch": Arm("scope: batch", _reading(scope="batch")),
    "batch_bandwidth": Arm("bandwidth: batch", _NONE, batch_bandwidth),
    "centering_sequence": Arm("log-probs centred by sequence", _reading(centering="sequence")),
    "advantage_response": Arm("advantages centred by response", _reading(advantage_centering="response")),
    "normalizer_numel": Arm("normaliser: mask elements", _reading(normalizer="numel")),
    "differentiated": Arm("weights differentiated", _reading(differentiate_weights=True)),
}
# Changes to the weights that may keep their effect on entropy and not their cost in reward.
VARIANTS = {
    "recentred": Arm("CW-GRPO, weighted advantages of mean zero", _NONE, recentred),
    "positive_side": Arm("CW-GRPO, positive covariances alone", _NONE, partial(gaussian, side=1, centre=False)),
    "negative_side": Arm("CW-GRPO, negative covariances alone", _NONE, partial(gaussian, side=-1, centre=False)),
    "mean_centre": Arm("CW-GRPO, centred at the mean covariance", _NONE, partial(gaussian, side=0, centre=True)),
}
ALL_ARMS = ARMS | VARIANTS | ABLATIONS
MINIATURE_ARMS = ("grpo", "cw_grpo")
