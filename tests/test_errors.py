"""A wrong value raises by name before any product, or stays where it belongs: NaN, infinities, nothing at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from products import NoProducts
from test_arguments import INF, LONG, NAN, D, N, V, head, padded, without
from torch import Tensor

from covgrpo_kernels import (
    ClipCov,
    CovarianceWeighting,
    CovGRPOConfig,
    HighEntropy,
    KLCov,
    Steer,
    covariance_weights,
    covgrpo_loss,
    engines,
    linear_logprob,
    operators,
)
from covgrpo_kernels.testing import random_batch

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["eager", "cpp", "triton"], indirect=True),
]
PER_TOKEN = ("hidden", "advantages", "old_logprobs", "ref_logprobs", "rollout_weights", "temperature")
CONFIGS = {
    "paper": CovGRPOConfig.paper(),
    "author_code": CovGRPOConfig.author_code(),
    "everything": CovGRPOConfig(beta=0.1, entropy_coef=0.01, dual_clip=3.0),
    "batch_scope": CovGRPOConfig(weighting=CovarianceWeighting(scope="batch", differentiate_weights=True)),
    "none": CovGRPOConfig(weighting="none", loss_type="bnpo"),
    "clip_cov": CovGRPOConfig(weighting=ClipCov(ratio=0.2, low=0.0, high=50.0), loss_type="dapo"),
    "kl_cov": CovGRPOConfig(weighting=KLCov(fraction=0.2), beta=0.1, kl_estimator="k2"),
    "steer": CovGRPOConfig(weighting=Steer(0.3), entropy_coef=0.1),
    "high_entropy": CovGRPOConfig(weighting=HighEntropy(0.3), loss_type="cispo"),
    "cispo": CovGRPOConfig(loss_type="cispo", beta=0.1, kl_estimator="k1"),
    "sequence": CovGRPOConfig(
        importance_level="sequence", loss_type="dr_grpo", max_completion_length=7, entropy_coef=0.1
    ),
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and (
        torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
    )  # fmt: skip


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


def test_nan_among_the_advantages(no_products: None) -> None:
    batch = padded()
    batch["advantages"] = batch["advantages"].index_fill(0, torch.tensor([2]), NAN)
    with pytest.raises(ValueError, match=r"^advantages\b.*NaN"):
        covgrpo_loss(**batch)


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


@pytest.mark.thinned(2)
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


@pytest.mark.thinned(5)
@pytest.mark.parametrize("grad_tol", [0.0, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["hidden", "advantages"])
def test_nonfinite_valid_token(where: str, dtype: torch.dtype, grad_tol: float | str, value: float) -> None:
    """It reaches its outputs, its group's weights, the loss and dW, and stays out of every other group. (A NaN among
    the advantages raises, where an engine reads values.)"""
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


@pytest.mark.thinned(5)
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


@pytest.mark.thinned(5)
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
