"""What the loss computes: frozen, validated on construction, shared by the reference and the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .checks import check_flag, check_int, check_number, check_one_of, check_positive

IGNORE_INDEX = -100

Scope = Literal["group", "batch"]
Centering = Literal["scope", "sequence"]
AdvantageCentering = Literal["token", "response"]
Normalizer = Literal["valid", "numel"]
WeightingName = Literal["covariance", "none", "clip_cov", "kl_cov", "steer", "high_entropy"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
ImportanceLevel = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class CovarianceWeighting:
    """Gaussian covariance weights (arXiv 2605.11538) and the readings of the paper that differ.

    Args:
        scope: ``"group"`` or ``"batch"``: the tokens over which means, bandwidth and normaliser are taken.
        centering: ``"scope"`` or ``"sequence"``: whose mean is taken off a token's log-prob.
        advantage_centering: ``"token"`` (mean over the scope's tokens) or ``"response"`` (plain mean over its
            responses, each counted once by the mean advantage of its valid tokens).
        normalizer: ``"valid"``, weights of a scope sum to its number of valid tokens; ``"numel"``, to its number
            of mask elements, padding included.
        differentiate_weights: the exact gradient through the weights joins the loss's; else they are constants.
        bandwidth_eps: added to the standard deviation of the covariances (nats times the unit of the advantages).

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """

    scope: Scope = "group"
    centering: Centering = "scope"
    advantage_centering: AdvantageCentering = "token"
    normalizer: Normalizer = "valid"
    differentiate_weights: bool = False
    bandwidth_eps: float = 0.0

    def __post_init__(self) -> None:
        check_one_of("scope", self.scope, get_args(Scope))
        check_one_of("centering", self.centering, get_args(Centering))
        check_one_of("advantage_centering", self.advantage_centering, get_args(AdvantageCentering))
        check_one_of("normalizer", self.normalizer, get_args(Normalizer))
        check_flag("differentiate_weights", self.differentiate_weights)
        check_number("bandwidth_eps", self.bandwidth_eps, 0.0)


@dataclass(frozen=True)
class ClipCov:
    """Clip-Cov (arXiv 2505.22617): of the tokens with ``low < cov < high`` that PPO did not clip, a random
    ``max(int(ratio * n), 1)`` lose their policy term.

    Args:
        ratio: share of the n valid tokens of the call, from 0 to 1.
        low, high: bounds of the covariance, in nats times the unit of the advantages.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """

    ratio: float = 2e-4
    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, 0.0, 1.0)
        check_number("low", self.low, -math.inf)
        check_number("high", self.high, -math.inf)
        if self.low >= self.high:
            raise ValueError(f"low must be less than high, got {self.low!r} and {self.high!r}")


@dataclass(frozen=True)
class KLCov:
    """KL-Cov (arXiv 2505.22617): the ``max(int(fraction * n), 1)`` tokens of highest covariance get
    ``coef * |x - old|`` added; there is no PPO clip.

    Args:
        fraction: share of the n valid tokens of the call, from 0 to 1.
        coef: of the penalty, the distance of log-prob and old log-prob in nats.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """

    fraction: float = 2e-3
    coef: float = 1.0

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, 0.0, 1.0)
        check_number("coef", self.coef, 0.0)


@dataclass(frozen=True)
class Steer:
    """STEER (arXiv 2510.10150): a token whose update would change the entropy much weighs less. With r the importance
    ratio, p the token's probability, x its logarithm and H the entropy of its distribution, O is
    ``|A r (1 - p) (x + H)|`` and the weight ``exp(-k O)``, with ``k = -ln(min_weight) / max(max O, min_change)``: the
    largest O of the batch has the least weight. PPO's clip and the denominator of the loss are left as they are.

    What the formula leaves open is read as the authors' code (github.com/zz-haooo/STEER) has it: the largest O is that
    of the valid tokens of the call (here of all ranks of ``process_group``), an O that is not finite counts as zero,
    weights carry no gradient. In one thing this differs: that code takes H from the pass that scored the old log-probs,
    and here it is of the policy that is trained, as x is. At the first update on a batch the two are the same.

    Args:
        min_weight: of the token with the largest O; more than 0, at most 1. The paper's lambda_min.
        min_change: the largest O is taken for no less than this, in nats times the unit of the advantages.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """

    min_weight: float = 0.8
    min_change: float = 0.02

    def __post_init__(self) -> None:
        check_number("min_weight", self.min_weight, 0.0, 1.0, above_low=True)
        check_positive("min_change", self.min_change)


@dataclass(frozen=True)
class HighEntropy:
    """The 80/20 rule (arXiv 2506.01939): only the tokens of highest entropy have a policy term, and it is normalised
    by their number. They are those whose entropy is no less than that of the ``fraction`` highest, so that equal ones
    stay or go together (the paper's rule; the authors' code, github.com/Shenzhi-Wang/Beyond-the-80-20-Rule-RLVR, keeps
    some of these).

    Of n valid tokens the m that are kept have the weight n / m, and the others 0. So where token losses are averaged
    over tokens (``"bnpo"``, ``"dapo"``, ``"cispo"``) the policy term is the mean over those kept, as in the authors'
    code; ``"grpo"``, ``"dr_grpo"`` and a given ``normalizer`` see it scaled alike. KL and entropy terms are of all
    valid tokens, as there. The entropy is that of the policy that is trained, and carries no gradient; the n tokens are
    those of the call (here of all ranks of ``process_group``), as that code takes each micro-batch by itself.

    Args:
        fraction: share of the n tokens that is kept, from 0 to 1; rounded up, at least one.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """

    fraction: float = 0.2

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, 0.0, 1.0)


Weighting = CovarianceWeighting | ClipCov | KLCov | Steer | HighEntropy
_WEIGHTINGS = {
    "covariance": CovarianceWeighting,
    "none": None,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
    "steer": Steer,
    "high_entropy": HighEntropy,
}


@dataclass(frozen=True)
class CovGRPOConfig:
    """The policy loss. Defaults are CW-GRPO as the paper states it (arXiv 2605.11538).

    Args:
        weighting: ``"covariance"``, ``"none"``, ``"clip_cov"``, ``"kl_cov"``, ``"steer"``, ``"high_entropy"``, or an
            instance of `CovarianceWeighting`, `ClipCov`, `KLCov`, `Steer` or `HighEntropy`.
        loss_type: how token losses are added up. ``"grpo"``: mean over sequences of the mean over their valid
            tokens; ``"bnpo"``, ``"dapo"``: mean over valid tokens (they differ in what a trainer passes as
            ``normalizer``); ``"dr_grpo"``: the sum divided by ``sequences * max_completion_length``; ``"cispo"``
            (arXiv 2506.13585): mean over valid tokens of ``-sg(min(r, 1 + clip_high)) * a * x``. Sequences
            without a valid token do not count.
        importance_level: ``"token"``, or ``"sequence"`` (GSPO, arXiv 2507.18071).
        clip_low, clip_high: the ratio is clipped to ``[1 - clip_low, 1 + clip_high]``; None is no bound.
        dual_clip: a number > 1 bounds the loss of a negative advantage by ``dual_clip * |a|``; None is no bound.
        beta, kl_estimator: ``beta`` times ``"k1"``, ``"k2"`` or ``"k3"`` of the KL divergence to the reference.
        entropy_coef: this times the token entropy is subtracted from the token loss.
        max_completion_length: tokens; needed by ``"dr_grpo"``, not used elsewhere.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """

    weighting: WeightingName | Weighting = "covariance"
    loss_type: LossType = "grpo"
    importance_level: ImportanceLevel = "token"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    beta: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weighting, Weighting):
            if not isinstance(self.weighting, str):
                raise TypeError(
                    "weighting must be a str, CovarianceWeighting, ClipCov, KLCov, Steer or HighEntropy, "
                    f"got {type(self.weighting).__name__}"
                )
            check_one_of("weighting", self.weighting, tuple(_WEIGHTINGS))
        check_one_of("loss_type", self.loss_type, get_args(LossType))
        check_one_of("importance_level", self.importance_level, get_args(ImportanceLevel))
        check_one_of("kl_estimator", self.kl_estimator, get_args(KLEstimator))
        if self.clip_low is not None:
            check_number("clip_low", self.clip_low, 0.0, 1.0)
        if self.clip_high is not None:
            check_number("clip_high", self.clip_high, 0.0)
        if self.dual_clip is not None:
            check_number("dual_clip", self.dual_clip, 1.0, above_low=True)
        check_number("beta", self.beta, 0.0)
        check_number("entropy_coef", self.entropy_coef, -math.inf)
        if self.loss_type == "cispo" and (
            self.dual_clip is not None or isinstance(self.token_weighting, (ClipCov, KLCov))
        ):
            raise ValueError("loss_type 'cispo' has no PPO clip for dual_clip, 'clip_cov' or 'kl_cov' to change")
        if self.importance_level == "sequence" and isinstance(self.token_weighting, (Steer, HighEntropy)):
            raise ValueError(
                "importance_level 'sequence' has one ratio for all tokens of a sequence, whose gradient they share: "
                "'steer' and 'high_entropy', which tell them apart, need 'token'"
            )
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length must be given for loss_type 'dr_grpo', got None")
        if self.max_completion_length is not None:
            check_int("max_completion_length", self.max_completion_length)
            check_number("max_completion_length", self.max_completion_length, 1)

    @property
    def token_weighting(self) -> Weighting | None:
        """The weighting as an object; None where tokens are not weighted."""
        if not isinstance(self.weighting, str):
            return self.weighting
        kind = _WEIGHTINGS[self.weighting]
        return None if kind is None else kind()

    @classmethod
    def paper(cls, **changes: Any) -> CovGRPOConfig:
        """CW-GRPO as arXiv 2605.11538 states it: the defaults."""
        return cls(**changes)

    @classmethod
    def author_code(cls, **changes: Any) -> CovGRPOConfig:
        """CW-GRPO as the first author's public 2025 code behaves. Its micro-batch is one group, so the
        scope is the batch: give it one group a call."""
        weighting = CovarianceWeighting(
            scope="batch",
            centering="sequence",
            advantage_centering="response",
            normalizer="numel",
            differentiate_weights=True,
            bandwidth_eps=1e-8,
        )
        settings: dict[str, Any] = dict(
            weighting=weighting, loss_type="grpo", clip_low=None, clip_high=None, beta=0.04, kl_estimator="k3"
        )
        return cls(**(settings | changes))
