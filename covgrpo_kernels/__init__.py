"""Policy losses for RL of language models, from hidden states and the head, without the logits."""

from .config import ClipCov, CovarianceWeighting, CovGRPOConfig, KLCov
from .group_moments import GroupMoments
from .logprob import LinearLogprob, linear_logprob
from .loss import CovGRPOLoss, CovGRPOOutput, covgrpo_loss
from .objective import weighting_metrics
from .weighting import CovarianceWeights, covariance_weights

__all__ = [
    "ClipCov",
    "CovGRPOConfig",
    "CovGRPOLoss",
    "CovGRPOOutput",
    "CovarianceWeighting",
    "CovarianceWeights",
    "GroupMoments",
    "KLCov",
    "LinearLogprob",
    "covariance_weights",
    "covgrpo_loss",
    "linear_logprob",
    "weighting_metrics",
]
__version__ = "0.1.0"
