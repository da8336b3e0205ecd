"""The error contract: a wrong argument raises by name before any work, a wrong value stays where it belongs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from products import NoProducts
from torch import Tensor

from covgrpo_kernels import (
    ClipCov,
    CovarianceWeighting,
    CovGRPOConfig,
    CovGRPOLoss,
    KLCov,
    covariance_weights,
    covgrpo_loss,
    engines,
    kernels,
    linear_logprob,
    operators,
)
from covgrpo_kernels.testing import random_batch

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["eager", "cpp", "triton"], indirect=True),
]
NAN, INF = float("nan"), float("inf")
N, D, V = 5, 4, 11
PER_TOKEN = ("hidden", "advantages", "old_logprobs", "ref_logprobs", "rollout_weights", "temperature")
CONFIGS = {
    "paper": CovGRPOConfig.paper(),
    "author_code": CovGRPOConfig.author_code(),
    "everything": CovGRPOConfig(beta=0.1, entropy_coef=0.01, dual_clip=3.0),
    "batch_scope": CovGRPOConfig(weighting=CovarianceWeighting(scope="batch", differentiate_weights=True)),
    "none": CovGRPOConfig(weighting="none", loss_type="bnpo"),
    "clip_cov": CovGRPOConfig(weighting=ClipCov(ratio=0.2, low=0.0, high=50.0), loss_type="dapo"),
    "kl_cov": CovGRPOConfig(weighting=KLCov(fraction=0.2), beta=0.1, kl_estimator="k2"),
    "cispo": CovGRPOConfig(loss_type="cispo", beta=0.1, kl_estimator="k1"),
    "sequence": CovGRPOConfig(
        importance_level="sequence", loss_type="dr_grpo", max_completion_length=7, entropy_coef=0.1
    ),
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and (
        torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
    )  # fmt: skip


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


# ------------------------------------------------------------------------------------------ wrong arguments

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
    "generator type": (dict(generator=3, config=CONFIGS["clip_cov"]), TypeError, "generator"),
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
        (dict(sequence_ids=None, config=CONFIGS["sequence"]), "sequence_ids"),
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


# ------------------------------------------------------------------------- values that the operator looks at


@pytest.fixture
def no_products() -> Iterator[None]:
    with engines.use(NoProducts()):
        yield


@pytest.mark.parametrize("bad", [-1, V, 2**40, -2])
def test_target_out_of_range(bad: int, no_products: None) -> None:
    targets = torch.arange(N)
    targets[3] = bad
    with pytest.raises(ValueError, match=rf"^targets\b.*\[0, {V}\).*got {bad}"):
        linear_logprob(**head(targets=targets))
    tokens = dict(advantages=torch.ones(N), config=CovGRPOConfig(weighting="none", loss_type="bnpo"))
    with pytest.raises(ValueError, match=rf"^targets\b.*got {bad}"):
        covgrpo_loss(**head(targets=targets), **tokens)


def test_ignored_target_is_not_out_of_range() -> None:
    """`ignore_index` moves, and what was the default is out of range then."""
    targets = torch.tensor([3, V + 4, 0, V + 4, 2])
    out = linear_logprob(**head(targets=targets), ignore_index=V + 4)
    assert torch.equal(out.logprob == 0, targets == V + 4)
    # An id inside the vocabulary may be the one that is ignored.
    assert linear_logprob(**head(targets=targets % V), ignore_index=3).logprob[0] == 0
    with pytest.raises(ValueError, match=r"^targets\b.*-100"):
        linear_logprob(**head(targets=torch.full((N,), -100)), ignore_index=0)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, -INF, INF])
@pytest.mark.parametrize("shape", ["token", "scalar"])
def test_temperature_value(bad: float, shape: str, no_products: None) -> None:
    temperature = torch.ones(N) if shape == "token" else torch.ones(())
    temperature[-1 if shape == "token" else ()] = bad
    with pytest.raises(ValueError, match=r"^temperature\b"):
        linear_logprob(**head(temperature=temperature))


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN])
def test_normalizer_value(bad: float, no_products: None) -> None:
    """A tensor's value can be looked at on a CPU, where that needs no synchronisation."""
    with pytest.raises(ValueError, match=r"^normalizer\b"):
        covgrpo_loss(**padded(normalizer=torch.tensor(bad)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_normalizer_dtype_leaves_the_loss_alone(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A one-element tensor promotes what it meets: the loss became float64 and its backward raised."""
    results = []
    for normalizer in (4, torch.full(shape, 4, dtype=dtype)):
        batch = padded(normalizer=normalizer)
        batch["hidden"].requires_grad_()
        loss = covgrpo_loss(**batch).loss
        assert loss.dtype == torch.float32
        loss.backward()
        results.append((loss.detach(), batch["hidden"].grad))
    for number, tensor in zip(*results, strict=True):
        assert same_bits(number, tensor)


# --------------------------------------------------------------------------------------- NaN and infinities


def token_batch(seed: int, **options: Any) -> dict[str, Any]:
    """Every optional per-token input, advantages and temperatures among them; three groups of two responses."""
    batch = random_batch(seed, groups=3, group_size=2, length=6, **options)
    shape = batch["targets"].shape
    g = torch.Generator().manual_seed(seed)
    if batch["advantages"].shape != shape:
        batch["advantages"] = batch["advantages"].unsqueeze(1).expand(shape).clone()
    batch["temperature"] = torch.rand(shape, generator=g).to(batch["hidden"].dtype) + 0.5
    if "mask" in batch:
        batch["mask"][:, 0] = True
        batch["mask"][:, 1] = False
    return batch


def run(batch: dict[str, Any], config: CovGRPOConfig, **options: Any) -> dict[str, Tensor]:
    hidden, weight = batch["hidden"].clone().requires_grad_(), batch["weight"].clone().requires_grad_()
    bias = torch.linspace(-1, 1, len(weight)).to(weight.dtype).requires_grad_()
    out = covgrpo_loss(
        **(batch | dict(hidden=hidden, weight=weight, bias=bias)), config=config,
        generator=torch.Generator().manual_seed(5), **options,
    )  # fmt: skip
    names = ("dhidden", "dweight", "dbias")
    grads = dict(zip(names, torch.autograd.grad(out.loss, (hidden, weight, bias)), strict=True))
    outputs = {n: v for n, v in out._asdict().items() if isinstance(v, Tensor)}
    return {n: v.detach() for n, v in outputs.items()} | grads | {f"metric {n}": v for n, v in out.metrics.items()}


def poison(batch: dict[str, Any], where: Tensor, value: float) -> dict[str, Any]:
    """Everything under ``where`` replaced: ``value`` in floats, ids far outside the vocabulary in targets."""
    dirty = dict(batch)
    for name in PER_TOKEN:
        dirty[name] = batch[name].clone()
        dirty[name][where] = value
    dirty["targets"] = batch["targets"].masked_fill(where, 10**9 if value > 0 else -(2**33))
    return dirty


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", CONFIGS)
def test_masked_content_changes_no_bit(name: str, value: float) -> None:
    """0 * NaN, 0 * inf, a mean over masked tokens, a target out of range: padding is full of them."""
    batch = token_batch(1, dtype=torch.float32)
    clean = run(batch, CONFIGS[name])
    dirty = run(poison(batch, ~batch["mask"], value), CONFIGS[name])
    assert clean.keys() == dirty.keys()
    for n, expected in clean.items():
        assert expected.isfinite().all(), n
        assert same_bits(dirty[n], expected), n
    for n in ("logprobs", "entropy", "weights", "dhidden"):
        assert not dirty[n][~batch["mask"]].any(), n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("metrics", [True, False])
def test_masked_content_without_metrics_and_in_other_dtypes(dtype: torch.dtype, metrics: bool) -> None:
    batch = token_batch(2, dtype=dtype)
    batch["advantages"][:2] = 0
    options = dict(metrics=metrics, logit_scale=0.5, softcap=5.0)
    for config in (CONFIGS["paper"], CONFIGS["everything"]):
        clean = run(batch, config, **options)
        dirty = run(poison(batch, ~batch["mask"], NAN), config, **options)
        for n, expected in clean.items():
            assert same_bits(dirty[n], expected), n


@pytest.mark.parametrize("packed", [False, True])
def test_target_minus_100_is_a_mask(packed: bool) -> None:
    """The tokens that -100 masks may hold anything else too, with and without a mask."""
    batch = token_batch(3, dtype=torch.float32, packed=packed, keep=0.9)
    ignored = torch.zeros_like(batch["targets"], dtype=torch.bool)
    ignored.view(-1)[::4] = True
    batch["targets"] = batch["targets"].masked_fill(ignored, -100)
    dirty = poison(batch, ignored, NAN) | dict(targets=batch["targets"])
    results = [run(b, CONFIGS["everything"]) for b in (batch, dirty)]
    for n, expected in results[0].items():
        assert expected.isfinite().all(), n
        assert same_bits(results[1][n], expected), n
    if not packed:
        explicit = without(dirty, "mask") | dict(mask=batch["mask"] & ~ignored)
        explicit["targets"] = explicit["targets"].masked_fill(ignored, V * 1000)
        for n, value in run(explicit, CONFIGS["everything"]).items():
            assert same_bits(value, results[0][n]), n


def test_masked_content_in_linear_logprob() -> None:
    batch = head(targets=torch.tensor([3, -100, 0, -100, 2]), temperature=torch.full((N,), 0.7))
    where = batch["targets"] == -100
    results = []
    for value in (0.5, NAN, INF):
        h, w = batch["hidden"].masked_fill(where.unsqueeze(1), value).requires_grad_(), batch["weight"].clone()
        w.requires_grad_()
        t = batch["temperature"].masked_fill(where, value)
        out = linear_logprob(h, w, batch["targets"], temperature=t, entropy=True)
        # NaN coefficients on ignored rows as well: a trainer may divide by their zero count.
        g = torch.linspace(1, 2, N).masked_fill(where, value)
        results.append((*out, *torch.autograd.grad([out.logprob, out.entropy], (h, w), [g, g])))
    for dirty in results[1:]:
        for value, expected in zip(dirty, results[0], strict=True):
            assert expected.isfinite().all()
            assert same_bits(value, expected)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("grad_tol", [0.0, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["hidden", "advantages"])
def test_nonfinite_valid_token(where: str, dtype: torch.dtype, grad_tol: float | str, value: float) -> None:
    """A NaN reaches its outputs, its group's weights, the loss and dW, and stays out of every other group."""
    batch = token_batch(4, dtype=dtype)
    clean = run(batch, CONFIGS["everything"], grad_tol=grad_tol)
    dirty_batch = batch | {where: batch[where].clone()}
    dirty_batch[where][3, 0] = value
    if where == "advantages" and math.isnan(value) and operators.reads_values(batch["hidden"]):
        with pytest.raises(ValueError, match=r"^advantages must be numbers, got NaN for 1 valid tokens"):
            run(dirty_batch, CONFIGS["everything"], grad_tol=grad_tol)
        return
    dirty = run(dirty_batch, CONFIGS["everything"], grad_tol=grad_tol)

    valid = batch["mask"]
    group = torch.zeros_like(valid)
    group[2:4] = True
    token = torch.zeros_like(valid)
    token[3, 0] = where == "hidden"
    for n in ("logprobs", "entropy"):
        assert not dirty[n][token].isfinite().any(), n
        assert same_bits(dirty[n][~token], clean[n][~token]), n
    assert dirty["weights"][group & valid].isnan().all()
    assert same_bits(dirty["weights"][~(group & valid)], clean["weights"][~(group & valid)])
    assert dirty["loss"].isnan()
    assert not dirty["dweight"].isfinite().any()
    assert not dirty["dhidden"][group & valid].isfinite().any()
    if grad_tol == 0.0:
        assert same_bits(dirty["dhidden"][~group], clean["dhidden"][~group])
    assert dirty["dhidden"][~(group & valid)].isfinite().all()
    assert not dirty["dhidden"][~valid].any()


NAN_COEFFICIENTS = [
    (where, config)
    for where in ("old_logprobs", "ref_logprobs", "rollout_weights", "hidden")
    for config in ("none", "everything", "kl_cov", "cispo", "sequence")
    if (where != "ref_logprobs" or CONFIGS[config].beta != 0) and (where != "hidden" or config == "none")
]


@pytest.mark.parametrize(("where", "config"), NAN_COEFFICIENTS)
def test_nan_in_one_valid_token(where: str, config: str) -> None:
    """Clamps and comparisons swallow NaN: `NaN < x` is False, and a clipped token has no gradient. Where no
    weights tie tokens together, it stays with its token (its sequence, where the ratio is the sequence's)."""
    batch = token_batch(5, dtype=torch.float32)
    kind = CONFIGS[config]
    clean = run(batch, kind, grad_tol=0.0)
    dirty_batch = batch | {where: batch[where].clone()}
    dirty_batch[where][3, 0] = NAN
    dirty = run(dirty_batch, kind, grad_tol=0.0)
    assert dirty["loss"].isnan()
    # The gradient of k1 is one, whatever the reference.
    if not (where == "ref_logprobs" and kind.kl_estimator == "k1"):
        assert dirty["dweight"].isnan().all()
        assert dirty["dhidden"][3, 0].isnan().all()
    token = torch.zeros_like(batch["mask"])
    token[3, 0] = True
    reached = token.clone()
    if config == "sequence":
        reached[3] = batch["mask"][3]
    assert same_bits(dirty["dhidden"][~reached], clean["dhidden"][~reached])
    assert same_bits(dirty["weights"], clean["weights"])
    for n in ("logprobs", "entropy"):
        assert dirty[n][token].isnan().all() == (where == "hidden"), n
        assert same_bits(dirty[n][~token], clean[n][~token]), n


def test_nan_in_weight_is_everywhere() -> None:
    batch = token_batch(6, dtype=torch.float32)
    batch["weight"] = batch["weight"].clone()
    batch["weight"][7, 1] = NAN
    out = run(batch, CONFIGS["paper"])
    assert out["loss"].isnan()
    assert out["logprobs"][batch["mask"]].isnan().all()
    assert out["weights"][batch["mask"]].isnan().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["logprobs", "advantages"])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_nan_variance_is_not_zero_variance(tokens: int, where: str, value: float) -> None:
    """The guard for scopes without variance would turn a NaN into weights of one."""
    x, a = torch.linspace(-2, -1, 2 * tokens), torch.linspace(-1, 1, 2 * tokens)
    (x if where == "logprobs" else a)[0] = value
    ids = torch.arange(2 * tokens) // tokens
    weights = covariance_weights(x, a, None, group_ids=ids)
    assert weights[:tokens].isnan().all()
    assert weights[tokens:].isfinite().all()
    assert weights[tokens:].sum() == pytest.approx(tokens, rel=8 * torch.finfo(torch.float32).eps)


def test_zero_variance_beside_nan() -> None:
    x = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, NAN, -2.0], [-3.0, -3.0, -3.0]])
    weights = covariance_weights(x, torch.tensor([1.0, 1.0, 0.0]), None, group_size=1)
    assert torch.equal(weights[[0, 2]], torch.ones(2, 3))
    assert weights[1].isnan().all()


# -------------------------------------------------------------------------------------- nothing, or no tokens


@pytest.mark.parametrize("metrics", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_masked(name: str, dtype: torch.dtype, metrics: bool) -> None:
    batch = token_batch(7, dtype=dtype)
    nothing = torch.ones_like(batch["mask"])
    batch = poison(batch, nothing, NAN) | dict(mask=torch.zeros(nothing.shape))
    out = run(batch, CONFIGS[name], metrics=metrics)
    assert out["loss"] == 0
    for n, value in out.items():
        assert value.isfinite().all(), n
        assert not value.any(), n


EMPTY = {
    "no rows": dict(groups=0),
    "no columns": dict(length=0),
    "no tokens packed": dict(keep=0.0, packed=True),
    "no responses packed": dict(groups=0, packed=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("name", CONFIGS)
def test_empty_batch(name: str, shape: str, dtype: torch.dtype) -> None:
    batch = random_batch(8, dtype=dtype, **EMPTY[shape])
    out = run(batch, CONFIGS[name])
    assert out["loss"] == 0
    assert out["logprobs"].shape == out["entropy"].shape == out["weights"].shape == batch["targets"].shape
    assert out["dhidden"].shape == batch["hidden"].shape
    for n, value in out.items():
        assert value.isfinite().all(), n
        assert not value.any(), n


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 0, 3)])
def test_empty_linear_logprob(shape: tuple[int, ...]) -> None:
    h, w = torch.zeros(*shape, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    out = linear_logprob(h, w, torch.zeros(shape, dtype=LONG), entropy=True)
    assert out.logprob.shape == out.entropy.shape == shape
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert h.grad.shape == h.shape
    assert torch.equal(w.grad, torch.zeros(V, D))


def test_no_depth_and_no_vocabulary() -> None:
    """D = 0 is a uniform distribution; V = 0 has none, so that every row must be ignored."""
    out = linear_logprob(torch.zeros(3, 0), torch.zeros(V, 0), torch.arange(3), entropy=True)
    limit = 2 * torch.finfo(torch.float32).eps * math.log(V)
    assert (out.logprob + math.log(V)).abs().max() <= limit
    assert (out.entropy - math.log(V)).abs().max() <= limit
    h, w = torch.ones(3, D, requires_grad=True), torch.zeros(0, D, requires_grad=True)
    x = linear_logprob(h, w, torch.full((3,), -100)).logprob
    x.sum().backward()
    assert torch.equal(x.detach(), torch.zeros(3))
    assert torch.equal(h.grad, torch.zeros(3, D))
    with pytest.raises(ValueError, match=r"^targets\b"):
        linear_logprob(h, w, torch.zeros(3, dtype=LONG))


def test_empty_covariance_weights() -> None:
    for shape in ((0,), (0, 4), (6, 0)):
        ids = torch.zeros(shape[0], dtype=LONG)
        for reading in (CovarianceWeighting(), CovarianceWeighting(scope="batch", normalizer="numel")):
            weights = covariance_weights(torch.zeros(shape), torch.zeros(shape), None, group_ids=ids, weighting=reading)
            assert weights.shape == shape


@pytest.mark.parametrize("reading", [CovarianceWeighting(), CONFIGS["author_code"].weighting])
def test_masked_covariance_weights(reading: CovarianceWeighting) -> None:
    """An empty scope divides zero by zero unless someone thought of it; its neighbours keep their bits."""
    x, a, mask = torch.randn(4, 3), torch.randn(4, 3), torch.ones(4, 3)
    mask[:2] = 0
    mask[2, 1] = 0
    clean = covariance_weights(x, a, mask, group_size=2, weighting=reading)
    for value in (NAN, INF, -INF):
        dirty_x, dirty_a = x.masked_fill(mask == 0, value), a.masked_fill(mask == 0, value)
        dirty = covariance_weights(dirty_x, dirty_a, mask, group_size=2, weighting=reading)
        assert same_bits(dirty, clean)
    assert clean.isfinite().all()
    assert not clean[mask == 0].any()
