"""verl 0.9: an advantage estimator and a policy loss, both named ``covgrpo``, in verl's registries once this module is
imported. verl imports it in the trainer and in every worker with

    actor_rollout_ref.model.external_lib=covgrpo_kernels.integrations.verl

and then one of the two is chosen, not both, since each weighs the advantages:

- ``algorithm.adv_estimator=covgrpo``: the weights of CW-GRPO (arXiv 2605.11538) as they are meant, over whole groups,
  computed once a step where verl has the batch in one place, from the log-probs before the update (``old_log_probs``).
  Every policy loss of verl's then works on the weighted advantages.
- ``actor_rollout_ref.actor.policy_loss.loss_mode=covgrpo``: weights from the policy as it is at every micro-batch, as
  verl's ``clip_cov`` and ``kl_cov``. Its workers know no groups, so the scope is the micro-batch, and the weights
  depend on how a batch is cut. They are those of the group where a micro-batch is one group.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.core_algos import (
    compute_grpo_outcome_advantage,
    compute_policy_loss_vanilla,
    register_adv_est,
    register_policy_loss,
)
from verl.utils import as_torch_index

from .. import CovarianceWeighting, covariance_weights

NAME = "covgrpo"

# Of the call of verl's `compute_advantage` that is running.
_log_probs: ContextVar[Tensor | None] = ContextVar("old_log_probs", default=None)


@register_adv_est(NAME)
def compute_covgrpo_advantage(
    token_level_rewards: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T]
    index: np.ndarray,  # [B] uid of the prompt, any labels in any order
    old_log_probs: Tensor | None = None,  # [B, T]; None: those of the batch that verl is at
    config: Mapping[str, Any] | None = None,  # verl's `algorithm`
    **_: Any,
) -> tuple[Tensor, Tensor]:  # [B, T], [B, T]
    """verl's GRPO advantages times their covariance weights; the returns are the advantages without weights.

    As for all of verl's estimators but ``grpo``, where a session has several outputs each counts as a response.

    Args:
        token_level_rewards, response_mask: [B, T].
        index: [B], the prompt of each response: any labels in any order.
        old_log_probs: [B, T], nats; None: those of the batch that verl is at.
        config: verl's ``algorithm``, of which ``norm_adv_by_std_in_grpo`` (True) is passed on.

    Returns:
        Weighted advantages and returns, [B, T] each.

    Raises:
        TypeError: there are no ``old_log_probs``, or no ``index``.
    """
    old_log_probs = _log_probs.get() if old_log_probs is None else old_log_probs
    if old_log_probs is None:
        raise TypeError("old_log_probs must be a tensor, got none: the batch has to have them before its advantages")
    advantages, _returns = compute_grpo_outcome_advantage(
        token_level_rewards, response_mask, index,
        norm_adv_by_std_in_grpo=True if config is None else config.get("norm_adv_by_std_in_grpo", True),
    )  # fmt: skip
    groups = as_torch_index(index, device=old_log_probs.device)
    return advantages * covariance_weights(old_log_probs, advantages, response_mask, group_ids=groups), advantages


@register_policy_loss(NAME)
def compute_policy_loss_covgrpo(
    old_log_prob: Tensor,  # [B, T]
    log_prob: Tensor,  # [B, T]
    advantages: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T]
    loss_agg_mode: str = "token-mean",
    config: Any = None,  # verl's ActorConfig
    rollout_is_weights: Tensor | None = None,  # [B, T]
) -> tuple[Tensor, dict[str, Any]]:  # [], metrics
    """verl's ``vanilla`` loss on advantages times the covariance weights of this micro-batch (arXiv 2605.11538). The
    weights carry no gradient.

    Args:
        old_log_prob, log_prob: [B, T], nats.
        advantages, response_mask: [B, T].
        loss_agg_mode, config, rollout_is_weights: as verl's loss takes them; the last is [B, T].

    Returns:
        The loss, [], and verl's metrics.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    weights = covariance_weights(log_prob, advantages, response_mask, weighting=CovarianceWeighting(scope="batch"))
    return compute_policy_loss_vanilla(
        old_log_prob, log_prob, weights * advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )


def _hand_over_log_probs() -> None:
    """verl's ``compute_advantage`` holds the log-probs but gives them to estimators of its own only. So it is wrapped,
    in every module of verl's that has it by now."""
    original = ray_trainer.compute_advantage

    @functools.wraps(original)
    def compute_advantage(data: DataProto, *args: Any, **kwargs: Any) -> DataProto:
        token = _log_probs.set(data.batch.get("old_log_probs", None))
        try:
            return original(data, *args, **kwargs)
        finally:
            _log_probs.reset(token)

    for name, module in list(sys.modules.items()):
        if name.startswith("verl.") and vars(module).get("compute_advantage") is original:
            module.compute_advantage = compute_advantage  # type: ignore[attr-defined]


_hand_over_log_probs()
