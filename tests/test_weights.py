"""Properties of the covariance weights, drawn by hypothesis, against the reference and the paper's facts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter import fewer

from covgrpo_kernels import CovarianceWeighting, CovGRPOConfig, covariance_weights, reference, weighting
from covgrpo_kernels.testing import random_batch, rms

pytestmark = pytest.mark.usefixtures("backend")
F64 = torch.float64
EPS = torch.finfo(F64).eps
WEIGHTINGS = {
    "paper": CovarianceWeighting(),
    "batch": CovarianceWeighting(scope="batch"),
    "sequence": CovarianceWeighting(centering="sequence"),
    "response": CovarianceWeighting(advantage_centering="response"),
    "numel": CovarianceWeighting(normalizer="numel"),
    "author": CovGRPOConfig.author_code().token_weighting,
}
batches = st.builds(
    random_batch, st.integers(0, 2**31), groups=st.integers(1, 3), group_size=st.integers(1, 4),
    length=st.sampled_from([1, 2, 7]), keep=st.sampled_from([0.2, 0.75, 1.0]),
    packed=st.booleans(), shuffled=st.booleans(),
)  # fmt: skip


def test_a_share_of_the_tokens_is_rounded_down():
    """In float32 the product of 0.29 and 100 is 29."""
    for share, tokens in ((0.29, 100), (0.7, 90), (0.3, 100_000), (2e-4, 3_000_001)):
        chosen = weighting._share_of(torch.ones(tokens, dtype=torch.bool), share)
        assert chosen == max(int(share * tokens), 1)


def arguments(batch):
    ids = {n: batch[n] for n in ("group_ids", "group_size", "sequence_ids") if n in batch}
    mask = batch.get("mask", torch.ones_like(batch["targets"]))
    return (batch["old_logprobs"], batch["advantages"], mask), ids


def groups_of(batch):
    """[N] group of every token, by the words of the layout."""
    shape = batch["targets"].shape
    if "group_size" in batch:
        return (torch.arange(shape[0]) // batch["group_size"])[:, None].expand(shape).flatten()
    ids = batch["group_ids"]
    return (ids if ids.shape == shape else ids[:, None].expand(shape)).flatten()


def sensitivity(args, ids, weighting=None, of=reference.covariance_weights):
    """By how much (RMS) the reference's weights, or what else is made of them, change where log-probs and advantages
    are off by an epsilon of the largest of them: what rounding in float64 amounts to on these data."""
    x, advantages, mask = (value.double() for value in args)
    g = torch.Generator().manual_seed(0)

    def shaken(value):
        size = value.abs().max() if value.numel() else 0.0
        return value + EPS * size * (2 * torch.rand(value.shape, generator=g, dtype=F64) - 1)

    def made(x, advantages):
        return of(x, advantages, mask, **ids, weighting=weighting)

    return max(rms(made(shaken(x), shaken(advantages)) - made(x, advantages)) for _ in range(2))


def assert_equal_weights(got, expected, *sensitivities):
    """Up to the rounding of two computations, a few operations each."""
    assert rms(got - expected) <= 16 * sum(sensitivities) + 8 * EPS * rms(expected)


@pytest.mark.parametrize("name", WEIGHTINGS)
@given(batch=batches)
def test_equals_the_reference(name, batch):
    args, ids = arguments(batch)
    expected = reference.covariance_weights(*args, **ids, weighting=WEIGHTINGS[name])
    got = covariance_weights(*args, **ids, weighting=WEIGHTINGS[name])
    assert_equal_weights(got, expected, sensitivity(args, ids, WEIGHTINGS[name]))


@given(batch=batches)
def test_facts_of_the_weights(batch):
    """Sum n per group, zero under the mask, and W <= exp((1 + mean(c)^2 / s2) / 2)."""
    (x, advantages, mask), ids = arguments(batch)
    weights = covariance_weights(x, advantages, mask, **ids).flatten()
    valid, groups = mask.flatten() != 0, groups_of(batch)
    a = (advantages if advantages.shape == x.shape else advantages[:, None].expand_as(x)).flatten()
    assert (weights[~valid] == 0).all()
    for i in groups.unique():
        rows = valid & (groups == i)
        n = int(rows.sum())
        assert weights[rows].sum().item() == pytest.approx(n, rel=(n + 8) * EPS)
        if n:
            c = (x.flatten()[rows] - x.flatten()[rows].mean()) * (a[rows] - a[rows].mean())
            s2 = (c - c.mean()).square().mean()
            rounding = 16 * EPS * x.flatten()[rows].abs().max() * a[rows].abs().max()  # of each c, and so of s
            exponent = (1 + c.mean().square() / s2) / 2
            if s2.sqrt() > rounding:
                slack = 4 * exponent * rounding / s2.sqrt() + (n + 8) * EPS
                assert (weights[rows] <= exponent.exp() * (1 + slack)).all()
            else:
                assert (weights[rows] == 1).all()
        if n <= 2:
            assert (weights[rows] == 1).all()


@given(batch=batches, factor=st.sampled_from([1e-3, 0.5, 3.0, 1e3]), shift=st.sampled_from([-5.0, 0.0, 2.0]))
def test_positive_scale_of_either_deviation_is_nothing(batch, factor, shift):
    (x, a, mask), ids = arguments(batch)
    weights, here = covariance_weights(x, a, mask, **ids), sensitivity((x, a, mask), ids)
    for args in ((x, a * factor + shift, mask), (x * factor + shift, a, mask)):
        assert_equal_weights(covariance_weights(*args, **ids), weights, here, sensitivity(args, ids))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["two tokens", "one token", "constant logprobs", "constant advantages"])
def test_no_variance_means_one(case, dtype):
    """The literal formula gives NaN or noise here: rounding leaves c different by an epsilon."""
    for seed in range(fewer(50)):
        g = torch.Generator().manual_seed(seed)
        rows, length = {"two tokens": (2, 1), "one token": (1, 1)}.get(case, (4, 9))
        x = -torch.rand(rows, length, generator=g, dtype=F64) * 10
        a = torch.randn(rows, generator=g, dtype=F64)
        if case == "constant logprobs":
            x = x[:1, :1].expand(rows, length)
        if case == "constant advantages":
            a = a[:1].expand(rows)
        mask = torch.ones(rows, length)
        w = covariance_weights(x.to(dtype), a.to(dtype), mask, group_size=rows)
        assert (w == 1).all(), (seed, w)


@given(batch=batches, garbage=st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_nothing_under_the_mask_matters(batch, garbage):
    (x, a, mask), ids = arguments(batch)
    mask = mask.clone()
    mask.view(-1)[::2] = 0
    weights = covariance_weights(x, a, mask, **ids)
    assert torch.equal(covariance_weights(x.where(mask != 0, garbage), a, mask, **ids), weights)


@given(batch=batches, bad=st.sampled_from([float("nan"), float("inf")]))
def test_bad_values_stay_in_their_group_and_are_not_hidden(batch, bad):
    (x, a, mask), ids = arguments(batch)
    valid, groups = mask.flatten() != 0, groups_of(batch)
    if not valid.any():
        return
    row = int(valid.nonzero()[0])
    weights = covariance_weights(x, a, mask, **ids).flatten()
    x = x.clone()
    x.view(-1)[row] = bad
    poisoned = covariance_weights(x, a, mask, **ids).flatten()
    inside = valid & (groups == groups[row])
    assert poisoned[inside].isnan().all()
    assert torch.equal(poisoned[~inside], weights[~inside])


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_gradient_of_the_weights(name):
    """The closed form against autograd through the reference."""
    weighting = replace(WEIGHTINGS[name], differentiate_weights=True)
    args, ids = arguments(random_batch(4, groups=2, group_size=3, length=4, shuffled=True))
    coefficients = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0), dtype=F64)

    def gradient(of):
        def of_logprobs(x, *rest, **options):
            x = x.clone().requires_grad_()
            return torch.autograd.grad(of(x, *rest, **options), x, coefficients)[0]

        return of_logprobs

    expected = gradient(reference.covariance_weights)
    got = gradient(covariance_weights)(*args, **ids, weighting=weighting)
    assert_equal_weights(got, expected(*args, **ids, weighting=weighting), sensitivity(args, ids, weighting, expected))
    x = args[0].clone().requires_grad_()
    assert not covariance_weights(x, *args[1:], **ids, weighting=WEIGHTINGS["paper"]).requires_grad


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_both_layouts_agree(name):
    for shuffled in (False, True):
        padded, packed = (random_batch(9, groups=3, length=6, packed=p, shuffled=shuffled) for p in (False, True))
        (x, a, mask), ids = arguments(padded)
        kind = WEIGHTINGS[name]
        if kind.normalizer == "numel":
            mask = torch.ones_like(mask)
            packed = random_batch(9, groups=3, length=6, packed=True, shuffled=shuffled, keep=1.0)
        expected = covariance_weights(x, a, mask, **ids, weighting=kind)[mask]
        args, ids = arguments(packed)
        assert_equal_weights(
            covariance_weights(*args, **ids, weighting=kind), expected, 2 * sensitivity(args, ids, kind)
        )
