"""The kernels around the head against their specification in PyTorch: segments, their sums, the terms of each token."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import covgrpo_kernels.operators  # noqa: F401  # registers what `Segments` calls
from covgrpo_kernels import kernels
from covgrpo_kernels.kernels import eager
from covgrpo_kernels.segments import Segments
from covgrpo_kernels.token_terms import METRICS, TermOptions, TokenInputs, TokenTerms, token_terms

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["triton", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True),
]
NAN, INF = float("nan"), float("inf")
DEVICE = torch.device("cpu")  # the fixture names the GPU where the tests run there
PLAIN = dict(
    cispo=False, ratio_low=0.8, ratio_high=1.2, dual_clip=None, penalty=0.0, max_length=None, beta=0.0,
    kl_estimator="k3", entropy_coef=0.0, share_grad=False, differentiate_weights=False, metrics=True,
)  # fmt: skip
SETTINGS = {
    "plain": {},
    "no bounds": dict(ratio_low=None, ratio_high=None),
    "low bound": dict(ratio_high=None, differentiate_weights=True),
    "all": dict(dual_clip=1.3, beta=0.1, entropy_coef=0.05, differentiate_weights=True),
    "k1": dict(beta=0.1, kl_estimator="k1", ratio_low=None),
    "k2": dict(max_length=512, beta=0.2, kl_estimator="k2", entropy_coef=-0.1),
    "penalty": dict(penalty=0.7, ratio_low=None, ratio_high=None),
    "cispo": dict(cispo=True, differentiate_weights=True),
    "cispo without bound": dict(cispo=True, ratio_high=None, beta=0.1),
}


CUTS = {"segments": dict(B_T=32), "sums": dict(B_T=16), "terms": dict(B_T=32), "totals": dict(B_B=2)}


def use_small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Under the interpreter programs of few tokens, so that a few dozen tokens make several."""
    configs = sys.modules[f"{kernels.select(DEVICE).__name__}.configs"]
    for name, cut in CUTS.items():
        patch.setitem(configs.CONFIGS["interpreter"], name, cut)


@pytest.fixture(autouse=True)
def small_blocks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        use_small_blocks(monkeypatch)


def draw(tokens: int, dtype: torch.dtype, *, optional: bool, seed: int = 0) -> TokenInputs:
    """Ratios around the bounds, every third token masked, a quarter without an advantage."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return (torch.randn(tokens, generator=g, dtype=torch.float64) * scale).to(dtype).where(valid, 0)

    def some(value: Tensor) -> Tensor | None:
        return value if optional else None

    valid = torch.rand(tokens, generator=g) > 0.3
    x = -normal().abs()
    advantages = normal().where(torch.rand(tokens, generator=g) > 0.25, 0)
    segment = torch.randint(0, 9, (tokens,), generator=g)
    segments = Segments.of(segment, 9)
    values = TokenInputs(
        x, normal().abs(), advantages, valid, some(x - normal(0.3)), some(x - normal(0.2)),
        some(normal().abs()), some(normal().abs()), some((torch.rand(tokens, generator=g) > 0.5) & valid),
        normal().double(), some(segment), some(segments.sum(valid)), None, torch.tensor(7),
    )  # fmt: skip
    return on_device(values)


def on_device(values: TokenInputs) -> TokenInputs:
    return TokenInputs(*(None if value is None else value.to(DEVICE) for value in values))


def both(inputs: TokenInputs, options: TermOptions) -> tuple[TokenTerms, TokenTerms]:
    """Of the kernel, and in float64 by the specification."""
    wide = (v.double() if v is not None and v.is_floating_point() else v for v in inputs)
    return kernels.select(DEVICE).token_terms(inputs, options), token_terms(TokenInputs(*wide), options)


def check(ours: TokenTerms, exact: TokenTerms, dtype: torch.dtype) -> None:
    """The kernel computes in float64 and rounds the ratio and what it returns."""
    eps = torch.finfo(dtype).eps
    for name, value, expected in zip(TokenTerms._fields, ours, exact, strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(
            value.double(),
            expected,
            rtol=16 * eps,
            atol=16 * eps,
            equal_nan=True,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_option(name: str, dtype: torch.dtype) -> None:
    for optional, shared, metrics in itertools.product((True, False), (True, False), (True, False)):
        settings: dict[str, Any] = PLAIN | SETTINGS[name] | dict(share_grad=shared, metrics=metrics)
        inputs = draw(100, dtype, optional=optional)
        if shared and optional:
            inputs = inputs._replace(mean_log_ratio=torch.linspace(-1, 1, 9, dtype=torch.float64, device=DEVICE))
        if not optional and settings["beta"]:
            inputs = inputs._replace(ref=torch.zeros_like(inputs.logprobs))
        ours, exact = both(inputs, TermOptions(**settings))
        check(ours, exact, dtype)
        assert ours.logprob_grad.any() or shared
        assert len(ours.metrics) == (len(METRICS) if metrics else 0)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 32, 300, 251])
def test_any_number_of_tokens(tokens: int) -> None:
    for seed in range(3):
        inputs = draw(tokens, torch.float32, optional=True, seed=seed)
        check(*both(inputs, TermOptions(**PLAIN | SETTINGS["all"])), torch.float32)
        nothing = inputs._replace(valid=torch.zeros_like(inputs.valid))
        for value in kernels.select(DEVICE).token_terms(nothing, TermOptions(**PLAIN | SETTINGS["all"])):
            assert not value.any()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name", ["logprobs", "entropy", "advantages", "old", "ref", "rollout", "weights", "covariance"]
)
@pytest.mark.parametrize("setting", ["all", "cispo", "penalty"])
def test_what_is_not_finite(setting: str, name: str, value: float) -> None:
    """Under the mask it changes no bit; in a valid token it shows where it shows in the specification."""
    options = TermOptions(**PLAIN | SETTINGS[setting])
    inputs = draw(50, torch.float32, optional=True)
    masked, own = int((~inputs.valid).nonzero()[0]), int((inputs.valid & (inputs.advantages != 0)).nonzero()[3])
    clean = kernels.select(DEVICE).token_terms(inputs, options)
    for token in (masked, own):
        changed = getattr(inputs, name).clone()
        changed[token] = value
        dirty = inputs._replace(**{name: changed})
        ours, _ = both(dirty, options)
        if token == masked:
            assert all(torch.equal(a, b) for a, b in zip(ours, clean, strict=True))
        else:
            for n, a, b in zip(TokenTerms._fields, ours, eager.token_terms(dirty, options), strict=True):
                assert torch.equal(a.isnan(), b.isnan()), n
                assert torch.equal(a.isinf(), b.isinf()), n


@pytest.mark.parametrize("ratio", [INF, NAN])
def test_a_zero_advantage_has_no_policy_term(ratio: float) -> None:
    for setting in ("plain", "cispo"):
        options = TermOptions(**PLAIN | SETTINGS[setting])
        inputs = draw(50, torch.float32, optional=True)._replace(penalised=None)
        token = int((inputs.valid & (inputs.advantages == 0)).nonzero()[0])
        clean = kernels.select(DEVICE).token_terms(inputs, options)
        old, weights = inputs.old.clone(), inputs.weights.clone()
        old[token], weights[token] = -ratio, NAN
        dirty = kernels.select(DEVICE).token_terms(inputs._replace(old=old, weights=weights), options)
        assert torch.equal(dirty.loss, clean.loss)
        assert torch.equal(dirty.logprob_grad, clean.logprob_grad)
        assert dirty.metrics[METRICS.index("ratio/non_finite")] == 1


def test_metrics_change_no_bit_of_the_rest() -> None:
    inputs = draw(100, torch.float32, optional=True)
    rich, lean = (
        kernels.select(DEVICE).token_terms(inputs, TermOptions(**PLAIN | SETTINGS["all"] | dict(metrics=metrics)))
        for metrics in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(rich[:-1], lean[:-1], strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_segments(dtype: torch.dtype) -> None:
    """Equal ids are one segment, in the order of the ids; sums are those of the specification."""
    g = torch.Generator().manual_seed(1)
    for tokens, ids in ((0, 1), (1, 1), (2, 2), (7, 3), (80, 1), (80, 10), (80, 2**62)):
        value = torch.randint(0, min(ids, torch.iinfo(dtype).max), (tokens,), generator=g).to(dtype).to(DEVICE)
        ours, expected = kernels.select(DEVICE).segments_of_ids(value), eager.segments_of_ids(value)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, expected, strict=True))
        segments = Segments(*ours, tokens)
        assert torch.equal(
            segments.gather(segments.sum(torch.ones(tokens, device=DEVICE))), (value == value[:, None]).sum(0)
        )
        values = torch.randn(tokens, 3, generator=g).to(DEVICE).T
        for summed in (values, values > 0):
            torch.testing.assert_close(
                kernels.select(DEVICE).segment_sums(summed, segments.offsets, segments.order),
                eager.segment_sums(summed, segments.offsets, segments.order), rtol=1e-12, atol=1e-12,
            )  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(name: str, optional: bool) -> None:
    """Schema, fake against real, dispatch with dynamic shapes."""
    inputs = draw(20, torch.float32, optional=optional)
    options = TermOptions(**PLAIN | SETTINGS[name] | dict(share_grad=optional, metrics=optional))
    torch.library.opcheck(torch.ops.covgrpo.token_terms, ([*inputs], *options), rtol=0.0, atol=0.0)
    ids = torch.randint(0, 5, (20,), device=DEVICE)
    torch.library.opcheck(torch.ops.covgrpo.segments_of_ids, (ids,), rtol=0.0, atol=0.0)
    _, offsets, order = torch.ops.covgrpo.segments_of_ids(ids)
    sums = (torch.rand(2, 20, device=DEVICE), offsets, order if optional else None)
    torch.library.opcheck(torch.ops.covgrpo.segment_sums, sums, rtol=0.0, atol=0.0)
    stats = [torch.rand(20, dtype=torch.float64, device=DEVICE) for _ in range(3)]
    scope = [offsets.new_zeros(20), offsets.new_tensor([0, 20])]
    gradient = (torch.rand(20, device=DEVICE), [*stats, stats[0][:1] + 1], ids > 0, scope, scope, "sequence", 0.0)
    torch.library.opcheck(torch.ops.covgrpo.covariance_weights_grad, gradient, rtol=0.0, atol=0.0)
