"""Wrong arguments raise by name before any work. No backend is asked for anything, so that once is enough for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from covgrpo_kernels import (
    ClipCov,
    CovarianceWeighting,
    CovGRPOConfig,
    CovGRPOLoss,
    HighEntropy,
    KLCov,
    Steer,
    covariance_weights,
    covgrpo_loss,
    engines,
    kernels,
    linear_logprob,
)
from covgrpo_kernels.testing import random_batch

NAN, INF = float("nan"), float("inf")
N, D, V = 5, 4, 11


def head(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    arguments = dict(
        hidden=torch.randn(N, D, generator=g),
        weight=torch.randn(V, D, generator=g),
        targets=torch.randint(0, V, (N,), generator=g),
    )
    return arguments | changes


def padded(**changes: Any) -> dict[str, Any]:
    return random_batch(0, dtype=torch.float32) | changes


def packed(**changes: Any) -> dict[str, Any]:
    return random_batch(0, dtype=torch.float32, packed=True) | changes


def without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {n: v for n, v in arguments.items() if n not in names}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a streaming pass or a weighting is entered."""

    def entered(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work began before the arguments were checked")

    monkeypatch.setattr(engines, "select", entered)
    monkeypatch.setattr(kernels.select(torch.device("cpu")), "covariance_weights", entered)


def test_no_work_notices_work(no_work: None) -> None:
    """The fixture the cases below rely on does fire for correct arguments."""
    for call in (
        lambda: linear_logprob(**head()),
        lambda: covgrpo_loss(**padded()),
        lambda: covariance_weights(**scores()),
    ):
        with pytest.raises(AssertionError, match="work began"):
            call()


WRONG_HEAD = {
    "hidden type": (dict(hidden=[[0.0] * D] * N), TypeError, "hidden"),
    "hidden dtype": (dict(hidden=torch.zeros(N, D, dtype=torch.int64)), TypeError, "hidden"),
    "hidden complex": (dict(hidden=torch.zeros(N, D, dtype=torch.complex64)), TypeError, "hidden"),
    "hidden and weight float8": (
        dict(hidden=torch.zeros(N, D).to(torch.float8_e4m3fn), weight=torch.zeros(V, D).to(torch.float8_e4m3fn)),
        TypeError,
        "hidden",
    ),
    "hidden device": (dict(hidden=torch.zeros(N, D, device="meta")), ValueError, "weight|hidden"),
    "weight type": (dict(weight=None), TypeError, "weight"),
    "weight dtype": (dict(weight=torch.zeros(V, D, dtype=torch.int32)), TypeError, "weight"),
    "weight of other dtype": (dict(weight=torch.zeros(V, D, dtype=torch.bfloat16)), TypeError, "weight"),
    "weight transposed": (dict(weight=torch.zeros(D, V)), ValueError, "weight"),
    "weight 1-d": (dict(weight=torch.zeros(D)), ValueError, "weight"),
    "weight device": (dict(weight=torch.zeros(V, D, device="meta")), ValueError, "weight"),
    "targets type": (dict(targets=[0] * N), TypeError, "targets"),
    "targets dtype": (dict(targets=torch.zeros(N)), TypeError, "targets"),
    "targets bool": (dict(targets=torch.zeros(N, dtype=torch.bool)), TypeError, "targets"),
    "targets shape": (dict(targets=torch.zeros(N + 1, dtype=torch.int64)), ValueError, "targets"),
    "targets of hidden's shape": (dict(targets=torch.zeros(N, D, dtype=torch.int64)), ValueError, "targets"),
    "targets device": (dict(targets=torch.zeros(N, dtype=torch.int64, device="meta")), ValueError, "targets"),
    "bias type": (dict(bias=0.0), TypeError, "bias"),
    "bias dtype": (dict(bias=torch.zeros(V, dtype=torch.int64)), TypeError, "bias"),
    "bias of other dtype": (dict(bias=torch.zeros(V, dtype=torch.float64)), TypeError, "bias"),
    "bias shape": (dict(bias=torch.zeros(D)), ValueError, "bias"),
    "bias device": (dict(bias=torch.zeros(V, device="meta")), ValueError, "bias"),
    "temperature zero": (dict(temperature=0.0), ValueError, "temperature"),
    "temperature negative": (dict(temperature=-1), ValueError, "temperature"),
    "temperature nan": (dict(temperature=NAN), ValueError, "temperature"),
    "temperature inf": (dict(temperature=INF), ValueError, "temperature"),
    "temperature type": (dict(temperature="1"), TypeError, "temperature"),
    "temperature bool": (dict(temperature=True), TypeError, "temperature"),
    "temperature None": (dict(temperature=None), TypeError, "temperature"),
    "temperature shape": (dict(temperature=torch.ones(N, 1)), ValueError, "temperature"),
    "temperature one element": (dict(temperature=torch.ones(1)), ValueError, "temperature"),
    "temperature dtype": (dict(temperature=torch.ones(N, dtype=torch.int64)), TypeError, "temperature"),
    "temperature device": (dict(temperature=torch.ones(N, device="meta")), ValueError, "temperature"),
    "temperature gradient": (dict(temperature=torch.ones(N, requires_grad=True)), ValueError, "temperature"),
    "logit_scale zero": (dict(logit_scale=0), ValueError, "logit_scale"),
    "logit_scale nan": (dict(logit_scale=NAN), ValueError, "logit_scale"),
    "logit_scale too large": (dict(logit_scale=10**400), ValueError, "logit_scale"),
    "logit_scale inf": (dict(logit_scale=-INF), ValueError, "logit_scale"),
    "logit_scale type": (dict(logit_scale=torch.ones(())), TypeError, "logit_scale"),
    "softcap zero": (dict(softcap=0.0), ValueError, "softcap"),
    "softcap negative": (dict(softcap=-30.0), ValueError, "softcap"),
    "softcap nan": (dict(softcap=NAN), ValueError, "softcap"),
    "softcap type": (dict(softcap="30"), TypeError, "softcap"),
    "grad_tol name": (dict(grad_tol="exact"), TypeError, "grad_tol"),
    "grad_tol negative": (dict(grad_tol=-1e-9), ValueError, "grad_tol"),
    "grad_tol one": (dict(grad_tol=1.0), ValueError, "grad_tol"),
    "grad_tol nan": (dict(grad_tol=NAN), ValueError, "grad_tol"),
    "grad_tol bool": (dict(grad_tol=False), TypeError, "grad_tol"),
    "grad_tol tensor": (dict(grad_tol=torch.zeros(())), TypeError, "grad_tol"),
    "grad_mode": (dict(grad_mode="exact"), ValueError, "grad_mode"),
    "generator": (dict(generator=0), TypeError, "generator"),
}


@pytest.mark.parametrize("case", WRONG_HEAD)
def test_linear_logprob_arguments(case: str, no_work: None) -> None:
    changes, error, name = WRONG_HEAD[case]
    with pytest.raises(error, match=rf"^({name})\b"):
        linear_logprob(**head(**changes))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(ignore_index="pad"), "ignore_index"),
        (dict(ignore_index=None), "ignore_index"),
        (dict(ignore_index=1.5), "ignore_index"),
        (dict(entropy="yes"), "entropy"),
    ],
)
def test_linear_logprob_option_types(changes: dict[str, Any], name: str, no_work: None) -> None:
    """Left to the operator's schema, these come out as its RuntimeError."""
    with pytest.raises(TypeError, match=rf"^{name}\b"):
        linear_logprob(**head(**changes))


@pytest.mark.parametrize("case", WRONG_HEAD)
def test_covgrpo_loss_head_arguments(case: str, no_work: None) -> None:
    """The loss checks the head as `linear_logprob` does, on packed tokens here."""
    changes, error, name = WRONG_HEAD[case]
    tokens = dict(
        advantages=torch.ones(N),
        group_ids=torch.zeros(N, dtype=torch.int64),
        sequence_ids=torch.arange(N),
    )
    with pytest.raises(error, match=rf"^({name})\b"):
        covgrpo_loss(**head(**changes), **tokens)


B, T = 6, 5  # of random_batch
SEQUENCE_RATIO = CovGRPOConfig(importance_level="sequence", loss_type="dr_grpo", max_completion_length=7)
LONG = torch.int64
WRONG_LOSS = {
    "three-dimensional targets": (
        dict(hidden=torch.zeros(B, T, 1, D), targets=torch.zeros(B, T, 1, dtype=LONG)),
        ValueError,
        "targets",
    ),
    "advantages type": (dict(advantages=[1.0] * B), TypeError, "advantages"),
    "advantages None": (dict(advantages=None), TypeError, "advantages"),
    "advantages dtype": (dict(advantages=torch.ones(B, dtype=LONG)), TypeError, "advantages"),
    "advantages of no layout": (dict(advantages=torch.ones(T)), ValueError, "advantages"),
    "advantages column": (dict(advantages=torch.ones(B, 1)), ValueError, "advantages"),
    "advantages device": (dict(advantages=torch.ones(B, device="meta")), ValueError, "advantages"),
    "mask type": (dict(mask=True), TypeError, "mask"),
    "mask shape": (dict(mask=torch.ones(B)), ValueError, "mask"),
    "mask device": (dict(mask=torch.ones(B, T, device="meta")), ValueError, "mask"),
    "group_size type": (dict(group_size=2.0), TypeError, "group_size"),
    "group_size bool": (dict(group_size=True), TypeError, "group_size"),
    "group_size zero": (dict(group_size=0), ValueError, "group_size"),
    "group_size negative": (dict(group_size=-3), ValueError, "group_size"),
    "group_size does not divide": (dict(group_size=4), ValueError, "group_size"),
    "group_size and ids": (dict(group_ids=torch.zeros(B, dtype=LONG)), ValueError, "group_size"),
    "group_ids type": (dict(group_size=None, group_ids=[0] * B), TypeError, "group_ids"),
    "group_ids dtype": (dict(group_size=None, group_ids=torch.zeros(B)), TypeError, "group_ids"),
    "group_ids shape": (dict(group_size=None, group_ids=torch.zeros(T, dtype=LONG)), ValueError, "group_ids"),
    "group_ids device": (
        dict(group_size=None, group_ids=torch.zeros(B, dtype=LONG, device="meta")),
        ValueError,
        "group_ids",
    ),
    "no groups": (dict(group_size=None), ValueError, "group_ids or group_size"),
    "group_size with sequence_ids": (dict(sequence_ids=torch.zeros(B, T, dtype=LONG)), ValueError, "group_size"),
    "old_logprobs type": (dict(old_logprobs=0.0), TypeError, "old_logprobs"),
    "old_logprobs dtype": (dict(old_logprobs=torch.zeros(B, T, dtype=LONG)), TypeError, "old_logprobs"),
    "old_logprobs shape": (dict(old_logprobs=torch.zeros(B, T + 1)), ValueError, "old_logprobs"),
    "old_logprobs device": (dict(old_logprobs=torch.zeros(B, T, device="meta")), ValueError, "old_logprobs"),
    "ref_logprobs type": (dict(ref_logprobs=0.0), TypeError, "ref_logprobs"),
    "ref_logprobs shape": (dict(ref_logprobs=torch.zeros(B + 1, T)), ValueError, "ref_logprobs"),
    "rollout_weights type": (dict(rollout_weights=1), TypeError, "rollout_weights"),
    "rollout_weights shape": (dict(rollout_weights=torch.ones(B, 1)), ValueError, "rollout_weights"),
    "config type": (dict(config={"loss_type": "grpo"}), TypeError, "config"),
    "config name": (dict(config="paper"), TypeError, "config"),
    "beta without ref": (dict(ref_logprobs=None, config=CovGRPOConfig(beta=0.1)), ValueError, "ref_logprobs"),
    "normalizer zero": (dict(normalizer=0), ValueError, "normalizer"),
    "normalizer negative": (dict(normalizer=-1.0), ValueError, "normalizer"),
    "normalizer nan": (dict(normalizer=NAN), ValueError, "normalizer"),
    "normalizer inf": (dict(normalizer=INF), ValueError, "normalizer"),
    "normalizer type": (dict(normalizer="8"), TypeError, "normalizer"),
    "normalizer bool": (dict(normalizer=True), TypeError, "normalizer"),
    "normalizer elements": (dict(normalizer=torch.ones(2)), ValueError, "normalizer"),
    "normalizer complex": (dict(normalizer=torch.ones((), dtype=torch.complex64)), TypeError, "normalizer"),
    "normalizer device": (dict(normalizer=torch.ones((), device="meta")), ValueError, "normalizer"),
    "generator type": (dict(generator=3, config=CovGRPOConfig(weighting="clip_cov")), TypeError, "generator"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_LOSS)
def test_covgrpo_loss_arguments(case: str, no_work: None) -> None:
    changes, error, name = WRONG_LOSS[case]
    with pytest.raises(error, match=rf"^{name}\b"):
        covgrpo_loss(**padded(**changes))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(group_size=3, group_ids=None), "group_size"),
        (dict(sequence_ids=None), "sequence_ids"),
        (dict(sequence_ids=None, config=SEQUENCE_RATIO), "sequence_ids"),
        (dict(sequence_ids=None, config=CovGRPOConfig(importance_level="sequence", loss_type="bnpo")), "sequence_ids"),
        (
            dict(
                sequence_ids=None,
                config=CovGRPOConfig(loss_type="dapo", weighting=CovarianceWeighting(centering="sequence")),
            ),
            "sequence_ids",
        ),
        (dict(sequence_ids=torch.zeros(3, dtype=LONG)), "sequence_ids"),
        (dict(group_ids=torch.zeros(3, dtype=LONG)), "group_ids"),
        (dict(advantages=torch.ones(B)), "advantages"),
        (dict(mask=torch.ones(B, T)), "mask"),
    ],
)  # fmt: skip
def test_covgrpo_loss_packed_arguments(changes: dict[str, Any], name: str, no_work: None) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        covgrpo_loss(**packed(**changes))


def test_module_checks_like_the_function(no_work: None) -> None:
    with pytest.raises(TypeError, match=r"^config\b"):
        CovGRPOLoss("paper")(**padded())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^temperature\b"):
        CovGRPOLoss(temperature=0.0)(**padded())
    with pytest.raises(TypeError, match="colour"):
        CovGRPOLoss()(**padded(), colour="red")


def scores(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = dict(
        logprobs=torch.randn(B, T, generator=g), advantages=torch.randn(B, generator=g), mask=None, group_size=3
    )
    return arguments | changes


WRONG_SCORES = {
    "logprobs type": (dict(logprobs=[0.0]), TypeError, "logprobs"),
    "logprobs dtype": (dict(logprobs=torch.zeros(B, T, dtype=LONG)), TypeError, "logprobs"),
    "logprobs shape": (dict(logprobs=torch.zeros(B, T, 2)), ValueError, "logprobs"),
    "logprobs scalar": (dict(logprobs=torch.zeros(())), ValueError, "logprobs"),
    "weighting name": (dict(weighting="covariance"), TypeError, "weighting"),
    "weighting of another kind": (dict(weighting=KLCov()), TypeError, "weighting"),
    "packed group_size": (dict(logprobs=torch.zeros(6), advantages=torch.ones(6)), ValueError, "group_size"),
    **{n: c for n, c in WRONG_LOSS.items() if n.split()[0] in ("advantages", "mask", "group_size", "group_ids", "no")},
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SCORES)
def test_covariance_weights_arguments(case: str, no_work: None) -> None:
    changes, error, name = WRONG_SCORES[case]
    with pytest.raises(error, match=rf"^{name}\b"):
        covariance_weights(**scores(**changes))


@pytest.mark.parametrize("reading", [dict(centering="sequence"), dict(advantage_centering="response")])
def test_covariance_weights_missing_sequences(reading: dict[str, str], no_work: None) -> None:
    ids = torch.zeros(6, dtype=LONG)
    with pytest.raises(ValueError, match=r"^sequence_ids\b"):
        covariance_weights(torch.zeros(6), torch.ones(6), None, group_ids=ids, weighting=CovarianceWeighting(**reading))


WRONG_CONFIG = [
    (CovGRPOConfig, "weighting", "gaussian", ValueError),
    (CovGRPOConfig, "weighting", None, TypeError),
    (CovGRPOConfig, "weighting", CovarianceWeighting, TypeError),
    (CovGRPOConfig, "loss_type", "ppo", ValueError),
    (CovGRPOConfig, "loss_type", None, ValueError),
    (CovGRPOConfig, "loss_type", ["grpo"], ValueError),
    (CovGRPOConfig, "importance_level", "group", ValueError),
    (CovGRPOConfig, "kl_estimator", "k4", ValueError),
    *((CovGRPOConfig, "clip_low", v, e) for v, e in ((-0.1, ValueError), (1.1, ValueError), ("0.2", TypeError))),
    *((CovGRPOConfig, "clip_high", v, e) for v, e in ((-0.1, ValueError), (INF, ValueError), (True, TypeError))),
    *((CovGRPOConfig, "dual_clip", v, e) for v, e in ((1.0, ValueError), (NAN, ValueError), ("3", TypeError))),
    *((CovGRPOConfig, "beta", v, e) for v, e in ((-0.1, ValueError), (NAN, ValueError), (None, TypeError))),
    *((CovGRPOConfig, "entropy_coef", v, e) for v, e in ((INF, ValueError), (NAN, ValueError), (None, TypeError))),
    *(
        (CovGRPOConfig, "max_completion_length", v, e)
        for v, e in ((0, ValueError), (-5, ValueError), (2.5, TypeError), (True, TypeError))
    ),
    (CovarianceWeighting, "scope", "sequence", ValueError),
    (CovarianceWeighting, "centering", "group", ValueError),
    (CovarianceWeighting, "advantage_centering", "sequence", ValueError),
    (CovarianceWeighting, "normalizer", 3, ValueError),
    (CovarianceWeighting, "differentiate_weights", 1, TypeError),
    (CovarianceWeighting, "bandwidth_eps", -1e-8, ValueError),
    (CovarianceWeighting, "bandwidth_eps", "0", TypeError),
    (ClipCov, "ratio", 1.5, ValueError),
    (ClipCov, "ratio", None, TypeError),
    (ClipCov, "low", NAN, ValueError),
    (ClipCov, "low", 5.0, ValueError),  # not less than high
    (ClipCov, "high", INF, ValueError),
    (KLCov, "fraction", -0.1, ValueError),
    (KLCov, "fraction", 2, ValueError),
    (KLCov, "coef", -1.0, ValueError),
    (KLCov, "coef", "1", TypeError),
    (Steer, "min_weight", 0.0, ValueError),
    (Steer, "min_weight", 1.1, ValueError),
    (Steer, "min_weight", "0.8", TypeError),
    (Steer, "min_change", 0.0, ValueError),
    (Steer, "min_change", NAN, ValueError),
    (HighEntropy, "fraction", -0.1, ValueError),
    (HighEntropy, "fraction", 1.5, ValueError),
    (HighEntropy, "fraction", None, TypeError),
]


@pytest.mark.parametrize(
    ("kind", "field", "value", "error"), WRONG_CONFIG, ids=[f"{k.__name__}.{f}={v!r}" for k, f, v, _ in WRONG_CONFIG]
)  # fmt: skip
def test_configuration(kind: type, field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{field}\b"):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (dict(loss_type="dr_grpo"), "max_completion_length"),
        (dict(loss_type="cispo", dual_clip=3.0), "loss_type"),
        (dict(loss_type="cispo", weighting="clip_cov"), "loss_type"),
        (dict(loss_type="cispo", weighting=KLCov()), "loss_type"),
        (dict(importance_level="sequence", weighting="steer"), "importance_level"),
        (dict(importance_level="sequence", weighting=HighEntropy()), "importance_level"),
    ],
)
def test_configuration_that_contradicts_itself(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        CovGRPOConfig(**fields)


@pytest.mark.parametrize("make", [CovGRPOConfig.paper, CovGRPOConfig.author_code])
def test_named_configurations_are_validated(make: Any) -> None:
    with pytest.raises(ValueError, match=r"^beta\b"):
        make(beta=-1.0)
    with pytest.raises(TypeError, match="colour"):
        make(colour="red")
