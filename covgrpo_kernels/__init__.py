"""Policy losses for RL of language models, from hidden states and the head, without the logits."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ClipCov, CovarianceWeighting, CovGRPOConfig, HighEntropy, KLCov, Steer
    from .group_moments import GroupMoments
    from .logprob import LinearLogprob, linear_logprob
    from .loss import CovGRPOLoss, CovGRPOOutput, covgrpo_loss
    from .objective import weighting_metrics
    from .weighting import CovarianceWeights, covariance_weights, entropy_weights

# Where each public name is. It is imported when it is first asked for: torch takes seconds, which `covgrpo --help` need
# not wait for.
_MODULES = {
    "ClipCov": "config",
    "CovGRPOConfig": "config",
    "CovGRPOLoss": "loss",
    "CovGRPOOutput": "loss",
    "CovarianceWeighting": "config",
    "CovarianceWeights": "weighting",
    "GroupMoments": "group_moments",
    "HighEntropy": "config",
    "KLCov": "config",
    "LinearLogprob": "logprob",
    "Steer": "config",
    "covariance_weights": "weighting",
    "covgrpo_loss": "loss",
    "entropy_weights": "weighting",
    "linear_logprob": "logprob",
    "weighting_metrics": "objective",
}

__all__ = [
    "ClipCov",
    "CovGRPOConfig",
    "CovGRPOLoss",
    "CovGRPOOutput",
    "CovarianceWeighting",
    "CovarianceWeights",
    "GroupMoments",
    "HighEntropy",
    "KLCov",
    "LinearLogprob",
    "Steer",
    "covariance_weights",
    "covgrpo_loss",
    "entropy_weights",
    "linear_logprob",
    "weighting_metrics",
]
__version__ = "0.1.0"

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value  # the next time it is found at once
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
