"""STEER (arXiv 2510.10150) and the 80/20 rule (arXiv 2506.01939) by hand, and what their papers leave open."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from covgrpo_kernels import (
    CovarianceWeighting,
    CovGRPOConfig,
    CovGRPOOutput,
    HighEntropy,
    Steer,
    covgrpo_loss,
    entropy_weights,
    linear_logprob,
)
from covgrpo_kernels.testing import random_batch, rms

pytestmark = pytest.mark.usefixtures("backend")
F64 = torch.float64
INF, NAN = math.inf, math.nan


def of_entropies(levels: list[float], seed: int = 0) -> dict[str, Any]:
    """Packed tokens of one response whose logits are the same but for a scale each: equal scales have equal entropies,
    and larger ones smaller entropies."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.tensor(levels, dtype=F64).unsqueeze(1)
    hidden, n = torch.randn(1, 6, generator=g, dtype=F64) * scale, len(levels)
    weight, targets = torch.randn(11, 6, generator=g, dtype=F64), torch.randint(0, 11, (n,), generator=g)
    old = linear_logprob(hidden, weight, targets).logprob - 0.1 * torch.randn(n, generator=g, dtype=F64)
    advantages = torch.randn(n, generator=g, dtype=F64)
    return dict(hidden=hidden, weight=weight, targets=targets, advantages=advantages, old_logprobs=old)


def step(batch: dict[str, Any], config: CovGRPOConfig, **options: Any) -> tuple[CovGRPOOutput, Tensor, Tensor]:
    """Outputs, and exact gradients of hidden states and head."""
    leaves = {name: batch[name].clone().requires_grad_() for name in ("hidden", "weight")}
    out = covgrpo_loss(**(batch | leaves), config=config, grad_tol=0.0, **options)
    return out, *torch.autograd.grad(out.loss, list(leaves.values()))


# ----------------------------------------------------------------------------------------------------- STEER


def test_steer_by_hand() -> None:
    """The paper's formula, its probabilities as they stand there."""
    batch = random_batch(0, groups=3)
    out = covgrpo_loss(**batch, config=CovGRPOConfig(weighting="steer", loss_type="dapo"))
    assert out.entropy is not None
    valid = batch["mask"]
    x, h, old = out.logprobs[valid], out.entropy[valid], batch["old_logprobs"][valid]
    a = batch["advantages"].unsqueeze(1).expand_as(valid)[valid]
    p = x.exp()
    change = (a / old.exp() * p * (1 - p) * (x + h)).abs()
    weights = torch.exp(math.log(0.8) * change / max(change.max().item(), 0.02))
    assert change.max() > 0.02
    assert rms(out.weights[valid] - weights) <= 1e-14
    assert out.weights[valid].min() == pytest.approx(0.8, abs=1e-14)
    assert not out.weights[~valid].any()
    surrogate = torch.minimum((x - old).exp() * a, (x - old).exp().clamp(0.8, 1.2) * a)
    assert rms(out.loss + (weights * surrogate * batch["rollout_weights"][valid]).mean()) <= 1e-14


def test_small_changes_are_left_alone() -> None:
    """Below ``min_change`` the largest one no longer has the least weight."""
    batch = random_batch(1)
    batch["advantages"] = batch["advantages"] * 1e-4
    weights = covgrpo_loss(**batch, config=CovGRPOConfig(weighting="steer")).weights[batch["mask"]]
    assert 0.99 < weights.min() < 1
    less = covgrpo_loss(**batch, config=CovGRPOConfig(weighting=Steer(min_change=1e-6))).weights[batch["mask"]]
    assert less.min() == pytest.approx(0.8, abs=1e-14)


@pytest.mark.parametrize("metrics", [True, False])
def test_a_change_that_is_not_finite_counts_as_none(metrics: bool) -> None:
    """Neither the ratio of one token nor its log-prob decides on the weights of the others; both reach the loss."""
    batch = random_batch(2, keep=1.0)
    batch["advantages"] = torch.linspace(-1, 1, 6, dtype=F64)
    config = CovGRPOConfig(weighting="steer")
    for name in ("old_logprobs", "hidden"):
        for value in (NAN, -INF) if name == "old_logprobs" else (NAN, INF):
            dirty = batch | {name: batch[name].clone()}
            dirty[name][0, 1] = value  # of a negative advantage, which no clip bounds
            out, _, dweight = step(dirty, config, metrics=metrics)
            assert out.weights[0, 1] == 1
            assert out.weights.min() >= 0.8
            assert not out.loss.isfinite()
            assert not dweight.isfinite().any()


# ----------------------------------------------------------------------------------------------- high entropy


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "cispo"])
def test_mean_over_those_kept(loss_type: Any) -> None:
    """Loss and gradients are those of the other tokens' absence."""
    levels = torch.linspace(0.1, 3.0, 30, dtype=F64)[torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    batch = of_entropies(levels.tolist())
    out, dhidden, dweight = step(batch, CovGRPOConfig(weighting="high_entropy", loss_type=loss_type))
    kept = levels <= levels.sort().values[5]
    assert torch.equal(out.weights, 5.0 * kept)
    part = {name: value if name == "weight" else value[kept] for name, value in batch.items()}
    alone, dhidden_alone, dweight_alone = step(part, CovGRPOConfig(weighting="none", loss_type=loss_type))
    assert rms(out.loss - alone.loss) <= 1e-14
    assert rms(dweight - dweight_alone) <= 1e-14
    assert rms(dhidden[kept] - dhidden_alone) <= 1e-14
    assert not dhidden[~kept].any()
    assert out.metrics["rows/live_fraction"] <= 0.2


def test_a_given_normalizer_is_of_all_valid_tokens() -> None:
    """Micro-batches with the number of valid tokens of all of them: each is scaled to its own kept ones."""
    parts = [random_batch(seed) for seed in (3, 4)]
    config = CovGRPOConfig(weighting="high_entropy", loss_type="dapo")
    total = sum(int(part["mask"].sum()) for part in parts)
    losses = [covgrpo_loss(**part, config=config).loss * part["mask"].sum() / total for part in parts]
    given = [covgrpo_loss(**part, config=config, normalizer=total).loss for part in parts]
    assert rms(torch.stack(losses) - torch.stack(given)) <= 1e-14


def test_kl_and_entropy_terms_are_of_all_tokens() -> None:
    batch = random_batch(5)
    terms = [
        covgrpo_loss(**batch, config=CovGRPOConfig(weighting=kind, beta=0.1, entropy_coef=0.1)).metrics
        for kind in ("none", "high_entropy")
    ]
    for name in ("loss/kl", "loss/entropy"):
        assert terms[0][name] == terms[1][name] != 0


@pytest.mark.parametrize(
    ("fraction", "tokens", "kept"),
    [(0.2, 1, 1), (0.2, 4, 1), (0.2, 5, 1), (0.2, 6, 2), (0.2, 1000, 200), (0.07, 100, 7), (0.14, 50, 7)],
)
def test_how_many_are_kept(fraction: float, tokens: int, kept: int) -> None:
    """The share rounded up; but 0.07 * 100 is 7.000000000000001."""
    batch = of_entropies(torch.linspace(0.1, 3.0, tokens).tolist())
    weights = covgrpo_loss(**batch, config=CovGRPOConfig(weighting=HighEntropy(fraction), loss_type="dapo")).weights
    assert torch.equal(weights, (torch.arange(tokens) < kept) * torch.tensor(tokens / kept, dtype=F64))


@pytest.mark.parametrize(("fraction", "kept"), [(0.0, 1), (0.1, 1), (0.2, 4), (0.5, 5), (0.6, 10), (1.0, 10)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_entropies_stay_or_go_together(fraction: float, kept: int, dtype: torch.dtype) -> None:
    """As those of the first tokens of all responses to a prompt are: the choice does not depend on their order."""
    levels = [0.1, 0.2, 0.2, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]
    config = CovGRPOConfig(weighting=HighEntropy(fraction), loss_type="dapo")
    for seed in range(3):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        batch = of_entropies([levels[i] for i in order])
        batch |= {name: batch[name].to(dtype) for name in ("hidden", "weight")}
        out = covgrpo_loss(**batch, config=config)
        assert torch.equal(out.weights[order.argsort()] != 0, torch.arange(10) < kept)
        assert out.weights.sum() == pytest.approx(10)


def test_entropies_of_zero() -> None:
    """Those of a policy that is sure of every token are equal, and masked tokens are not among them."""
    batch = random_batch(8, vocab=1)
    weights = covgrpo_loss(**batch, config=CovGRPOConfig(weighting="high_entropy")).weights
    assert torch.equal(weights, batch["mask"].double())


@pytest.mark.parametrize("metrics", [True, False])
@pytest.mark.parametrize(("name", "value"), [("old_logprobs", -1e6), ("old_logprobs", NAN), ("rollout_weights", INF)])
def test_what_is_left_out_has_no_influence(name: str, value: float, metrics: bool) -> None:
    """A weight of zero times what is infinite is no number."""
    batch = random_batch(6)
    config = CovGRPOConfig(weighting="high_entropy")
    clean = step(batch, config, metrics=metrics)
    left_out = batch["mask"] & (clean[0].weights == 0)
    dirty = step(batch | {name: batch[name].masked_fill(left_out, value)}, config, metrics=metrics)
    for got, expected in ((dirty[0].loss, clean[0].loss), *zip(dirty[1:], clean[1:], strict=True)):
        assert torch.equal(got, expected)
    kept = step(batch | {name: batch[name].masked_fill(clean[0].weights != 0, NAN)}, config, metrics=metrics)
    assert kept[0].loss.isnan()
    assert kept[2].isnan().all()


@pytest.mark.parametrize("metrics", [True, False])
def test_a_nan_entropy_is_not_among_the_highest(metrics: bool) -> None:
    """It reaches the loss all the same, and the choice among the other tokens is what it is."""
    batch = of_entropies(torch.linspace(0.1, 3.0, 10).tolist())
    config = CovGRPOConfig(weighting="high_entropy", loss_type="dapo")
    batch["hidden"][7] = NAN
    out, dhidden, dweight = step(batch, config, metrics=metrics)
    assert torch.equal(out.weights.nonzero().flatten(), torch.tensor([0, 1]))
    assert out.loss.isnan()
    assert dweight.isnan().all()
    assert dhidden[7].isnan().all()
    batch["hidden"][:] = NAN
    out = covgrpo_loss(**batch, config=config, metrics=metrics)
    assert torch.equal(out.weights, torch.ones(10, dtype=F64))
    assert out.loss.isnan()


@pytest.mark.parametrize("weighting", ["steer", "high_entropy"])
@pytest.mark.parametrize("metrics", [True, False])
def test_nothing_valid(weighting: Any, metrics: bool) -> None:
    batch = random_batch(7, keep=0.0)
    for part in (batch, {n: v[:0] if n not in ("weight", "group_size") else v for n, v in batch.items()}):
        out, *grads = step(part, CovGRPOConfig(weighting=weighting, beta=0.1), metrics=metrics)
        assert out.loss == 0
        assert not out.weights.any()
        assert not any(grad.any() for grad in grads)


# ------------------------------------------------------------------------------- for a trainer with its own loss


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighting", [Steer(0.5), HighEntropy(0.3)], ids=["steer", "high_entropy"])
def test_weights_are_those_of_the_loss(weighting: Steer | HighEntropy, packed: bool) -> None:
    """Whatever stands under the mask."""
    for seed in range(5):
        batch = random_batch(seed, packed=packed, shuffled=packed)
        out = covgrpo_loss(**batch, config=CovGRPOConfig(weighting=weighting))
        mask = batch.get("mask")
        inputs = [out.logprobs, out.entropy, batch["advantages"], batch["old_logprobs"]]
        if mask is not None:
            inputs = [x if x is None or x.shape != mask.shape else x.masked_fill(~mask, NAN) for x in inputs]
        x, h, a, old = inputs
        got = entropy_weights(x, h, a, mask, weighting=weighting, old_logprobs=old)  # type: ignore[arg-type]
        assert torch.equal(got, out.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_no_gradient_and_are_float32(dtype: torch.dtype) -> None:
    x = -torch.rand(2, 4, dtype=dtype).requires_grad_()
    weights = entropy_weights(x, torch.rand(2, 4), torch.ones(2), None, weighting=Steer())
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
    assert 0.79 < weights.min() < weights.max() < 1


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        (dict(logprobs=torch.zeros(2, 4, dtype=torch.int64)), TypeError, "logprobs"),
        (dict(logprobs=torch.zeros(2, 4, 1)), ValueError, "logprobs"),
        (dict(entropy=None), TypeError, "entropy"),
        (dict(entropy=torch.zeros(2)), ValueError, "entropy"),
        (dict(advantages=torch.zeros(4)), ValueError, "advantages"),
        (dict(mask=torch.ones(2)), ValueError, "mask"),
        (dict(old_logprobs=torch.zeros(8)), ValueError, "old_logprobs"),
        (dict(weighting=CovarianceWeighting()), TypeError, "weighting"),
        (dict(weighting="steer"), TypeError, "weighting"),
        (dict(process_group="world"), TypeError, "process_group"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], name: str) -> None:
    arguments: dict[str, Any] = dict(
        logprobs=torch.zeros(2, 4), entropy=torch.zeros(2, 4), advantages=torch.zeros(2), mask=None, weighting=Steer()
    )
    with pytest.raises(error, match=rf"^{name}\b"):
        entropy_weights(**(arguments | changes))
