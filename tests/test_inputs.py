"""Inputs that nobody plans for: tensors that are not what they seem, values that overflow, transforms. Each is refused
by name, or treated as eager PyTorch treats it; no gradient is quieter than eager's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from covgrpo_kernels import (
    ClipCov,
    CovarianceWeighting,
    CovGRPOConfig,
    KLCov,
    covariance_weights,
    covgrpo_loss,
    linear_logprob,
    reference,
)
from covgrpo_kernels.testing import random_batch, rl_head

NAN, INF = math.nan, math.inf
N, D, V = 60, 16, 300


def head(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = rl_head(0, N, D, V, padding=0.0, zero_advantage=0.0)
    return dict(hidden=made["hidden"].to(dtype), weight=made["weight"].to(dtype), targets=made["targets"])


def batch(**changes: Any) -> dict[str, Any]:
    made = random_batch(0, groups=4, group_size=4, length=8, depth=16, vocab=120, dtype=torch.float32)
    made["mask"][:, 0] = True
    return made | changes


# ------------------------------------------------------------------------------------- tensors that are not plain


class OwnLinear(Tensor):
    """A quantized weight, as far as it matters: what it shows is not what `F.linear` computes with."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            hidden, weight, *rest = args
            args = (hidden, 1.5 * weight.as_subclass(Tensor), *rest)
        return super().__torch_function__(function, types, args, kwargs or {})


class Wrapper(Tensor):
    """Holds a tensor of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*tree_map(lambda x: x.inner if isinstance(x, cls) else x, args), **(kwargs or {}))


class Renamed(Tensor):
    pass


SUBCLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "own linear": lambda x: x.as_subclass(OwnLinear),
    "parameter with an own linear": lambda x: nn.Parameter(x.as_subclass(OwnLinear)),
    "wrapper": Wrapper,
    "renamed": lambda x: x.as_subclass(Renamed),
    "masked": lambda x: torch.masked.masked_tensor(x, x == x),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_tensor_subclasses_are_refused(kind: str, name: str) -> None:
    arguments = head() | dict(bias=torch.zeros(V))
    arguments[name] = SUBCLASSES[kind](arguments[name])
    with pytest.raises(TypeError, match=rf"^{name} must be a plain tensor, got a (OwnLinear|Wrapper|Renamed|Masked)"):
        linear_logprob(**arguments)
    tokens = dict(advantages=torch.ones(N), config=CovGRPOConfig(weighting="none", loss_type="bnpo"))
    with pytest.raises(TypeError, match=rf"^{name} must be a plain tensor"):
        covgrpo_loss(**arguments, **tokens)


def test_a_head_with_an_own_linear_would_be_silently_wrong() -> None:
    """The subclass above does compute with other numbers: what is refused is not harmless."""
    arguments = head()
    x, _ = reference.linear_logprob(**arguments)
    y, _ = reference.linear_logprob(**arguments | dict(weight=arguments["weight"].as_subclass(OwnLinear)))
    assert (x - y).abs().max() > 0.1


def test_what_torch_puts_in_the_place_of_a_tensor_is_accepted() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    arguments = head()
    expected = linear_logprob(**arguments).logprob
    for kind in (nn.Parameter, nn.Buffer, AsyncCollectiveTensor):
        for name in ("hidden", "weight"):
            out = linear_logprob(**arguments | {name: kind(arguments[name])}).logprob
            assert torch.equal(out, expected), kind
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(value) for name, value in arguments.items()}
        assert linear_logprob(**fakes).logprob.shape == (N,)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": Tensor.to_sparse,
    "sparse_csr": Tensor.to_sparse_csr,
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "temperature"])
def test_other_layouts_are_refused(name: str, layout: str) -> None:
    if layout == "sparse_csr" and name in ("bias", "temperature"):
        pytest.skip("has two dimensions at least")
    arguments = head() | dict(bias=torch.ones(V), temperature=torch.ones(N))
    arguments[name] = LAYOUTS[layout](arguments[name])
    with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got .*{layout.split('_')[0]}"):
        linear_logprob(**arguments)


@pytest.mark.parametrize(
    "name", ["targets", "mask", "advantages", "old_logprobs", "ref_logprobs", "rollout_weights", "normalizer"]
)
def test_sparse_tokens_are_refused(name: str) -> None:
    arguments = batch(normalizer=torch.ones(1))
    arguments[name] = arguments[name].to_sparse()
    with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got one of layout torch.sparse_coo"):
        covgrpo_loss(**arguments)


def test_meta_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^hidden must be on a device that holds values, got meta"):
        linear_logprob(**{name: value.to("meta") for name, value in head().items()})


def test_views_that_negate_lazily() -> None:
    arguments = head()
    expected = linear_logprob(**arguments).logprob
    for name in ("hidden", "weight"):
        lazy = torch.complex(arguments[name], -arguments[name]).conj().imag
        assert lazy.is_neg()
        assert torch.equal(linear_logprob(**arguments | {name: lazy}).logprob, expected)


# --------------------------------------------------------------------------------------- transforms of functions


def _score(hidden: Tensor) -> Tensor:
    return linear_logprob(**head() | dict(hidden=hidden)).logprob


def _loss(hidden: Tensor) -> Tensor:
    return covgrpo_loss(**batch(hidden=hidden)).loss


def _weights(logprobs: Tensor) -> Tensor:
    weighting = CovarianceWeighting(differentiate_weights=True)
    return covariance_weights(logprobs, batch()["advantages"], None, group_size=4, weighting=weighting)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], Tensor]]] = {
    "linear_logprob": (_score, lambda: head()["hidden"]),
    "covgrpo_loss": (_loss, lambda: batch()["hidden"]),
    "covariance_weights": (_weights, lambda: batch()["old_logprobs"]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_refused(name: str) -> None:
    """A tangent of zeros would be silently wrong."""
    function, point = FUNCTIONS[name]
    x = point()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"autograd\.Function"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        function(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_is_refused(name: str) -> None:
    function, point = FUNCTIONS[name]
    with pytest.raises(RuntimeError, match=r"vmap|autograd\.Function"):
        torch.func.vmap(function)(point().expand(3, *point().shape))


def test_batched_gradients_are_refused() -> None:
    hidden = head()["hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="Batching rule not implemented for covgrpo"):
        torch.autograd.grad(_score(hidden), hidden, torch.eye(N), is_grads_batched=True)


def test_reverse_mode_of_func_is_the_gradient() -> None:
    hidden = head()["hidden"]
    out, pull_back = torch.func.vjp(_score, hidden)
    leaf = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(_score(leaf), leaf, torch.ones(N))
    assert torch.equal(out, _score(hidden))
    assert torch.equal(pull_back(torch.ones(N))[0], expected)


# ------------------------------------------------------------------------------------ values that are not numbers


def gradients(function: Callable[..., Any], arguments: dict[str, Tensor], g: Tensor, **options: Any) -> list[Tensor]:
    leaves = [arguments[name].clone().requires_grad_() for name in ("hidden", "weight")]
    x = function(*leaves, arguments["targets"], **options)[0]
    return list(torch.autograd.grad(x, leaves, g.to(x.dtype)))


def changed(value: Tensor, where: Any, by: float) -> Tensor:
    value = value.clone()
    value[where] = by
    return value


def with_head(name: str, where: Any, by: float) -> Callable[[dict[str, Tensor], Tensor], tuple[Any, ...]]:
    return lambda arguments, g: (arguments | {name: changed(arguments[name], where, by)}, g, {})


LOUD: dict[str, Callable[[dict[str, Tensor], Tensor], tuple[Any, ...]]] = {
    **{
        f"one coefficient {value}": lambda arguments, g, value=value: (arguments, changed(g, 3, value), {})
        for value in (INF, -INF, NAN)
    },
    "all coefficients infinite": lambda arguments, g: (arguments, g.sign() * INF, {}),
    "a coefficient that overflows with its temperature": lambda arguments, g: (
        arguments, g.sign() * 3e38, dict(temperature=1e-3)
    ),
    **{f"{name} {value}": with_head(name, (4, 2), value) for name in ("hidden", "weight") for value in (INF, NAN)},
    "a state of infinities": with_head("hidden", 4, INF),
    # C++ noted a candidate of tokens that do not exist, and wrote beyond its memory.
    "a bias of infinity": lambda arguments, g: (
        arguments, g, dict(bias=changed(torch.zeros(V, dtype=arguments["hidden"].dtype), 7, INF))
    ),
    "many biases of infinity": lambda arguments, g: (
        arguments | dict(weight=arguments["weight"].repeat(40, 1)), g,
        dict(bias=torch.full((40 * V,), INF, dtype=arguments["hidden"].dtype)),
    ),
    "a target without probability": lambda arguments, g: (
        arguments,
        g,
        dict(bias=changed(torch.zeros(V, dtype=arguments["hidden"].dtype), arguments["targets"][3], -INF)),
    ),
}  # fmt: skip


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LOUD)
def test_no_gradient_is_quieter_than_eager(case: str, dtype: torch.dtype, backend: str) -> None:
    g = torch.randn(N, generator=torch.Generator().manual_seed(1))
    arguments, g, options = LOUD[case](head(dtype), g)
    ours = gradients(linear_logprob, arguments, g, **options)
    eager = gradients(reference.linear_logprob, arguments, g, **options)
    for name, mine, theirs in zip(("hidden", "weight"), ours, eager, strict=True):
        assert not (mine.isfinite().all() and not theirs.isfinite().all()), name


def loss_and_gradients(arguments: dict[str, Any], config: CovGRPOConfig, **options: Any) -> list[Tensor]:
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("hidden", "weight")}
    loss = covgrpo_loss(**(arguments | leaves), config=config, **options).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


CONFIGS = {
    "paper": CovGRPOConfig(),
    "differentiated": CovGRPOConfig(weighting=CovarianceWeighting(differentiate_weights=True)),
    "everything": CovGRPOConfig(beta=0.1, entropy_coef=0.01, dual_clip=3.0),
    "cispo": CovGRPOConfig(weighting="none", loss_type="cispo"),
    "sequence": CovGRPOConfig(weighting="none", importance_level="sequence"),
    "kl_cov": CovGRPOConfig(weighting=KLCov(fraction=0.01)),
}


@pytest.mark.parametrize("metrics", [True, False])
@pytest.mark.parametrize("value", [INF, -INF, NAN, 3e38])
@pytest.mark.parametrize("config", CONFIGS)
def test_rollout_weight_of_a_token_without_a_term(config: str, value: float, metrics: bool) -> None:
    """Zero advantages times an infinite weight were NaN: in the loss, and in dweight everywhere."""
    arguments = batch()
    arguments["advantages"][:4] = 0
    expected = loss_and_gradients(arguments, CONFIGS[config], metrics=metrics)
    if config == "kl_cov":  # the penalty is of the highest covariance, and no advantage of these has one
        assert not expected[1][2, 0].any()
    arguments["rollout_weights"] = changed(arguments["rollout_weights"], (2, 0), value)
    for dirty, clean in zip(loss_and_gradients(arguments, CONFIGS[config], metrics=metrics), expected, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(dirty, clean)


@pytest.mark.parametrize(
    "options", [{}, dict(clip_high=None, dual_clip=3.0), dict(importance_level="sequence")], ids=str
)
@pytest.mark.parametrize("value", [INF, NAN])
def test_rollout_weight_of_a_token_that_a_bound_holds(value: float, options: dict[str, Any], backend: str) -> None:
    """It reaches the loss, as in eager PyTorch; its gradient is zero, whatever that is multiplied with."""
    arguments = batch()
    sign = -1.0 if "dual_clip" in options else 1.0
    arguments["advantages"] = changed(arguments["advantages"], 2, sign)
    old = covgrpo_loss(**arguments).logprobs - 2.0  # ratios of 7
    arguments |= dict(old_logprobs=old, rollout_weights=torch.ones(len(old)))
    config = CovGRPOConfig(weighting="none", **options)
    clean = loss_and_gradients(arguments, config, grad_tol=0.0)
    held = arguments | dict(rollout_weights=changed(arguments["rollout_weights"], 2, value))
    for dirty, before in zip(loss_and_gradients(held, config, grad_tol=0.0)[1:], clean[1:], strict=True):
        assert torch.equal(dirty, before)
    exact = {n: v.double() if v.is_floating_point() else v for n, v in held.items() if isinstance(v, Tensor)}
    leaf = exact["weight"].requires_grad_()
    loss = reference.covgrpo_loss(**(held | exact), config=config).loss
    assert torch.autograd.grad(loss, leaf)[0].isfinite().all()
    assert not loss.isfinite()
    assert not covgrpo_loss(**held, config=config).loss.isfinite()


@pytest.mark.parametrize("value", [INF, NAN])
def test_rollout_weight_of_a_token_that_clip_cov_removes(value: float) -> None:
    arguments, config = batch(), CovGRPOConfig(weighting=ClipCov(ratio=0.5, low=-50.0, high=50.0))

    def step(rollout: Tensor, loss: Any = covgrpo_loss) -> Any:
        generator = torch.Generator().manual_seed(0)
        leaf = arguments["weight"].clone().requires_grad_()
        given = arguments | dict(weight=leaf, rollout_weights=rollout)
        out = loss(**given, config=config, generator=generator)
        return out.weights, out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]

    weights, *clean = step(arguments["rollout_weights"])
    removed = arguments["mask"] & (weights == 0)
    assert removed.any()
    dirty = arguments["rollout_weights"].expand_as(removed).masked_fill(removed, value)
    assert all(map(torch.equal, step(dirty)[1:], clean))
    assert all(x.isfinite().all() for x in step(dirty, reference.covgrpo_loss)[1:])


def test_old_log_probs_of_tokens_that_kl_cov_does_not_penalise() -> None:
    """The penalty is of the chosen tokens alone; what has no advantage has no other term."""
    arguments, config = batch(advantages=torch.zeros(16)), CovGRPOConfig(weighting=KLCov(fraction=0.01))
    _, dhidden, dweight = loss_and_gradients(arguments, config)
    row = next(row for row in range(16) if not dhidden[row, 0].any())
    arguments["old_logprobs"] = changed(arguments["old_logprobs"], (row, 0), INF)
    assert torch.equal(loss_and_gradients(arguments, config)[2], dweight)
    assert reference.covgrpo_loss(**arguments, config=config).loss.isfinite()


@pytest.mark.parametrize("value", [INF, NAN])
def test_rollout_weight_of_a_penalised_token_counts(value: float) -> None:
    """KL-Cov's penalty is multiplied by the rollout weight, and needs no advantage."""
    arguments = batch(advantages=torch.zeros(16))
    arguments["rollout_weights"] = torch.full_like(arguments["rollout_weights"], value)
    loss, _, dweight = loss_and_gradients(arguments, CovGRPOConfig(weighting=KLCov(fraction=0.5)))
    assert not loss.isfinite()
    assert not dweight.isfinite().all()


@pytest.mark.parametrize(
    "config",
    [CovGRPOConfig(), CovGRPOConfig(loss_type="dr_grpo", max_completion_length=7), CovGRPOConfig(loss_type="bnpo")],
    ids=["grpo", "dr_grpo", "bnpo"],
)
def test_large_normalizer(config: CovGRPOConfig) -> None:
    """Its product with the length overflowed, and loss and gradients were zero."""
    # A power of two changes no bit of what does not underflow.
    one, large = (loss_and_gradients(batch(), config, normalizer=2.0**n, metrics=False, grad_tol=0.0) for n in (0, 90))
    for a, b in zip(one, large, strict=True):
        assert b.any()
        assert torch.equal(b * 2.0**90, a)
    assert all(value.any() for value in loss_and_gradients(batch(), config, normalizer=2.0**126, metrics=False))


def test_a_state_that_is_not_finite_shows_in_the_loss() -> None:
    """Even of a token that has no gradient."""
    arguments = batch()
    arguments["advantages"][:4] = 0
    arguments["hidden"] = changed(arguments["hidden"], (2, 0, 3), NAN)
    assert covgrpo_loss(**arguments).loss.isnan()
