"""`covgrpo_loss` against the reference: every combination of options, both layouts, every dtype."""

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from interpreter import interpreted

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
    linear_logprob,
    reference,
)  # fmt: skip
from covgrpo_kernels.segments import Segments
from covgrpo_kernels.testing import ErrorBook, random_batch, rms, run_loss

pytestmark = pytest.mark.usefixtures("backend")
F64 = torch.float64
AUTHOR = CovGRPOConfig.author_code().token_weighting
WEIGHTINGS = {
    "none": "none",
    "covariance": "covariance",
    "clip_cov": ClipCov(0.2, -0.5, 0.5),
    "kl_cov": KLCov(0.2, 0.7),
    "steer": Steer(0.3, 0.1),
    "high_entropy": HighEntropy(0.3),
    "author": AUTHOR,
    "differentiated": CovarianceWeighting(differentiate_weights=True),
    "batch by sequence": CovarianceWeighting(scope="batch", centering="sequence", differentiate_weights=True),
    "numel by response": CovarianceWeighting(
        advantage_centering="response", normalizer="numel", differentiate_weights=True
    ),
}
SETTINGS = {
    "plain": {},
    "unclipped": dict(clip_low=None, clip_high=None),
    "all": dict(dual_clip=1.3, beta=0.1, entropy_coef=0.05),
    "one side": dict(clip_low=None, clip_high=0.1, beta=0.1, kl_estimator="k1"),
    "other side": dict(clip_low=0.1, clip_high=None, beta=0.2, kl_estimator="k2"),
}
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


def valid_configs(weighting):
    for loss_type, level, settings in itertools.product(LOSS_TYPES, ("token", "sequence"), SETTINGS.values()):
        no_ppo = settings.get("dual_clip") or isinstance(weighting, (ClipCov, KLCov))
        no_sequence = isinstance(weighting, (Steer, HighEntropy))
        if not (loss_type == "cispo" and no_ppo) and not (level == "sequence" and no_sequence):
            yield CovGRPOConfig(
                weighting=weighting, loss_type=loss_type, importance_level=level, max_completion_length=7, **settings
            )


def same(batch, config, **options):
    """Loss, outputs and gradients equal the reference's within float64 rounding."""
    results = [
        run_loss(f, batch, config, dtype=F64, generator=torch.Generator().manual_seed(5), **o)
        for f, o in ((covgrpo_loss, dict(grad_tol=0.0) | options), (reference.covgrpo_loss, {}))
    ]
    for name, exact in results[1].items():
        assert rms(results[0][name] - exact) <= 1e-11 * (1e-3 + rms(exact)), (name, config)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_option_equals_the_reference(name):
    """Loss, log-probs, weights and all gradients: closed-form coefficients against autograd. (With weights that
    are not differentiated the reference detaches them.)"""
    for seed, config in list(enumerate(valid_configs(WEIGHTINGS[name])))[:: 7 if interpreted() else 1]:
        batch = random_batch(seed, bias=True)
        batch["mask"][2] = False  # a response that is masked altogether
        same(batch, config)


batches = st.builds(
    random_batch, st.integers(0, 2**31), groups=st.integers(1, 3), group_size=st.integers(1, 4),
    length=st.sampled_from([1, 2, 6]), keep=st.sampled_from([0.0, 0.3, 1.0]), vocab=st.sampled_from([1, 2, 30]),
    packed=st.booleans(), shuffled=st.booleans(), bias=st.booleans(),
)  # fmt: skip
configs = st.sampled_from(list(WEIGHTINGS)).flatmap(lambda name: st.sampled_from(list(valid_configs(WEIGHTINGS[name]))))


@given(batch=batches, config=configs, metrics=st.booleans(), drop=st.sets(st.sampled_from(["old", "ref", "rollout"])))
def test_any_batch_equals_the_reference(batch, config, metrics, drop):
    """Both layouts, any order of groups, masks down to nothing, optional inputs left out."""
    names = {"old": "old_logprobs", "rollout": "rollout_weights"} | ({} if config.beta else {"ref": "ref_logprobs"})
    batch = {n: v for n, v in batch.items() if n not in [names.get(d) for d in drop]}
    if isinstance(config.token_weighting, KLCov):
        # Equal covariances, as two tokens or equal advantages have: which one is highest is up to rounding.
        mask = batch.get("mask", torch.ones_like(batch["targets"])) != 0
        advantages = batch["advantages"]
        valid = (advantages if advantages.shape == mask.shape else advantages[:, None].expand_as(mask))[mask]
        assume(len(valid) != 2 and len(valid.unique()) > 1)
    same(batch, config, metrics=metrics)


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_gradcheck(differentiated, loss_type):
    """Finite differences where they apply: the gradient through the weights included. Without it the weights are
    constants to the derivative but not to a difference, so they are compared with the reference (above)."""
    weighting = CovarianceWeighting(differentiate_weights=True) if differentiated else "none"
    config = CovGRPOConfig(
        weighting=weighting, loss_type=loss_type, beta=0.1, entropy_coef=0.1, clip_low=None, clip_high=None
    )
    batch = random_batch(3, groups=1, group_size=3, length=3, vocab=5, bias=True)
    if loss_type == "cispo":
        batch.pop("old_logprobs")  # the ratio is a constant to the derivative too
    inputs = [batch.pop(n).requires_grad_() for n in ("hidden", "weight", "bias")]

    def f(hidden, weight, bias):
        return covgrpo_loss(hidden, weight, bias=bias, **batch, config=config, grad_tol=0.0).loss

    if loss_type == "cispo":
        x, _ = reference.linear_logprob(inputs[0], inputs[1], batch["targets"], bias=inputs[2])
        batch["old_logprobs"] = x.detach()
        exact = run_loss(
            reference.covgrpo_loss,
            batch | dict(zip(("hidden", "weight", "bias"), inputs, strict=True)),
            config,
            dtype=F64,
        )
        grads = torch.autograd.grad(f(*inputs), inputs)
        for got, name in zip(grads, ("dhidden", "dweight", "dbias"), strict=True):
            assert rms(got - exact[name]) <= 1e-12
    else:
        assert torch.autograd.gradcheck(f, inputs, fast_mode=interpreted())


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighting", ["none", "covariance", "steer", "high_entropy"])
def test_pooled_errors(dtype, weighting):
    """Over 1,500 tokens no worse than the eager loss in the same dtype. Old log-probs are the current ones, so
    that no draw of rounding decides who is clipped."""
    book = ErrorBook()
    config = CovGRPOConfig(weighting=weighting, beta=0.05, entropy_coef=0.01)
    vocab = 300 if interpreted() else 1500
    for seed in range(12):
        batch = random_batch(seed, groups=2, group_size=4, length=20, depth=32, vocab=vocab)
        batch = {n: v.to(dtype).double() if n in ("hidden", "weight") else v for n, v in batch.items()}
        del batch["old_logprobs"]
        book.add(
            run_loss(covgrpo_loss, batch, config, dtype=dtype, grad_tol=0.0),
            run_loss(reference.covgrpo_loss, batch, config, dtype=dtype),
            run_loss(reference.covgrpo_loss, batch, config, dtype=F64),
        )
    book.ours.pop("loss"), book.eager.pop("loss")  # a dozen scalars are no statistic
    book.check(dtype)


@given(batch=batches, config=configs)
def test_padded_and_packed_are_one_loss(batch, config):
    """Dropping the masked tokens and naming sequences changes nothing (numel counts them, Clip-Cov draws for
    them, so these two do differ)."""
    weighting = config.token_weighting
    if "sequence_ids" in batch or isinstance(weighting, ClipCov) or getattr(weighting, "normalizer", "") == "numel":
        return
    mask = batch["mask"]
    rows = torch.arange(len(mask))
    per_row = dict(sequence_ids=rows, group_ids=batch.get("group_ids", rows // batch.get("group_size", 1)))
    packed = {n: v for n, v in batch.items() if n not in ("mask", "group_size")} | per_row
    packed = {
        n: v if n in ("weight", "bias") else (v if v.ndim > 1 else v[:, None].expand_as(mask))[mask]
        for n, v in packed.items()
    }
    one = run_loss(covgrpo_loss, batch, config, dtype=F64)
    other = run_loss(covgrpo_loss, packed, config, dtype=F64)
    for name in ("loss", "dweight"):
        assert rms(one[name] - other[name]) <= 1e-12 * (1e-3 + rms(one[name]))
    assert rms(one["dhidden"][mask] - other["dhidden"]) <= 1e-12 * (1e-3 + rms(other["dhidden"]))


def test_trainers_own_loss_from_the_parts_is_the_same():
    """linear_logprob + covariance_weights + three lines are the default loss and its gradient."""
    batch = random_batch(8)
    mask = batch["mask"]
    one = run_loss(covgrpo_loss, batch, CovGRPOConfig(clip_low=None, clip_high=None), dtype=F64)
    hidden = batch["hidden"].clone().requires_grad_()
    weight = batch["weight"].clone().requires_grad_()
    x = linear_logprob(hidden, weight, batch["targets"].where(mask, -100)).logprob
    w = covariance_weights(x, batch["advantages"], mask, group_size=3)
    ratio = (x - batch["old_logprobs"]).exp() * mask
    tokens = -(ratio * w * batch["advantages"][:, None] * batch["rollout_weights"])
    (tokens.sum(1) / mask.sum(1).clamp(min=1)).sum().div((mask.sum(1) > 0).sum()).backward()
    assert rms(hidden.grad - one["dhidden"]) < 1e-14
    assert rms(weight.grad - one["dweight"]) < 1e-14


def test_author_code_preset_by_hand():
    """The behaviour described for the author's code, written out once for one group with padding."""
    batch = random_batch(2, groups=1, group_size=4)
    mask, a = batch["mask"], batch["advantages"]
    got = run_loss(covgrpo_loss, batch, CovGRPOConfig.author_code(), dtype=F64)
    h, w = batch["hidden"].clone().requires_grad_(), batch["weight"].clone().requires_grad_()
    x = (h @ w.T).log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    dx = x - (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    c = dx * (a - a.mean())[:, None]
    std = c[mask].std(correction=0) + 1e-8
    kernel = torch.exp(-c.square() / (2 * std.square())) * mask
    weights = mask.numel() * kernel / kernel.sum()
    d = batch["ref_logprobs"] - x
    ratio = (x - batch["old_logprobs"]).exp()
    tokens = -ratio * weights * a[:, None] * batch["rollout_weights"] + 0.04 * (d.exp() - d - 1)
    loss = ((tokens * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    assert rms(got["loss"] - loss.detach()) < 1e-13
    assert rms(got["weights"] - weights.detach()) < 1e-12
    assert rms(got["dhidden"] - h.grad) < 1e-13
    assert rms(got["dweight"] - w.grad) < 1e-12


def test_module_takes_settings_and_overrides():
    batch = random_batch(1)
    module = CovGRPOLoss(CovGRPOConfig(loss_type="dapo"), temperature=0.5, metrics=False)
    expected = covgrpo_loss(**batch, config=CovGRPOConfig(loss_type="dapo"), temperature=0.5, metrics=False)
    assert torch.equal(module(**batch).loss, expected.loss)
    assert module(**batch, metrics=True).metrics
    assert "dapo" in repr(module)


def test_sums_over_long_segments_keep_their_digits():
    """Many tokens in one segment, the others empty or short, in any order: rounded once."""
    ids = torch.zeros(200_000, dtype=torch.long)
    ids[::1000] = 5
    values = torch.full((len(ids),), 0.1)
    sums = Segments.of(ids, 6).sum(values).float()  # by ids there would be as many segments, and programs, as tokens
    sums = sums[sums != 0]
    assert sums.tolist() == [(n * values[0].double()).float().item() for n in (199_800, 200)]
