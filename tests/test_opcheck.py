"""The operators under PyTorch's own checks: opcheck, and torch.compile around them.

Both see an operator from outside, its inputs and outputs, and are slow. So the cases hold every pair of values of any
two of their parameters, the backend among them, and not all combinations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_operators import config, head_loss, inputs, same_bits
from torch import Tensor

from covgrpo_kernels import CovarianceWeighting, CovGRPOConfig, covgrpo_loss
from covgrpo_kernels.inputs import flatten_tokens
from covgrpo_kernels.plan import BackwardPlan, min_probability
from covgrpo_kernels.testing import check_draw, leaf, random_batch, rl_head, rms
from covgrpo_kernels.weighting import weighting_scopes

BACKENDS = ("eager", "cpp", "triton")
on_all_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def check(op: Any, arguments: tuple[Any, ...]) -> None:
    """Schema, autograd registration, fake against real, AOT dispatch with dynamic shapes."""
    torch.library.opcheck(op, arguments, rtol=0.0, atol=0.0)


# -------------------------------------------------------------------------------------------------- opcheck

OPTIONS = {
    "plain": dict(bias=False, temperature=False, head=(1.0, None), entropy=False),
    "bias": dict(bias=True, temperature=False, head=(1.0, None), entropy=False),
    "temperatures, entropy": dict(bias=False, temperature=True, head=(0.5, None), entropy=True),
    "all": dict(bias=True, temperature=True, head=(0.5, 3.0), entropy=True),
}


def operands(name: str, dtype: torch.dtype, requires_grad: bool) -> tuple[Any, ...]:
    option, batch = OPTIONS[name], inputs(dtype=dtype)
    h, w, b = (leaf(batch[n], dtype, requires_grad) for n in ("hidden", "weight", "bias"))
    t = batch["temperature"].to(torch.promote_types(dtype, torch.float32)) if option["temperature"] else None
    return h, w, b if option["bias"] else None, batch["targets"], t, *option["head"]


FORWARD = [
    (backend, name, (torch.float32, torch.bfloat16)[(i + j) % 2], (0.0, 5e-3)[(i + j // 2) % 2])
    for i, backend in enumerate(BACKENDS)
    for j, name in enumerate(OPTIONS)
]


@pytest.mark.parametrize(("backend", "name", "dtype", "grad_tol"), FORWARD, indirect=["backend"])
def test_opcheck_forward(backend: str, name: str, dtype: torch.dtype, grad_tol: float) -> None:
    # What the notes of a forward with a tolerance have room for, but not used for ignored rows, may hold anything.
    ignore_index = -100 if grad_tol == 0.0 else 0
    h, w, b, targets, *options = operands(name, dtype, False)
    arguments = (h, w, b, targets.abs() % 12 + 1 if ignore_index == 0 else targets, *options)
    check(
        torch.ops.covgrpo.head_forward,
        (*arguments, OPTIONS[name]["entropy"], ignore_index, min_probability(grad_tol)),
    )


NEEDS = ([True] * 3, [True, False, False], [False, True, False], [False, False, True])
# Four options times four needs; the bits of i ^ j, and of i ^ 2j in the field of four elements, choose the others, so
# that each of those meets every option and every need.
TIMES_TWO = (0, 2, 3, 1)
BACKWARD = [
    (("all", "some", "none", "some")[i ^ j], name, needs, (*BACKENDS, "cpp")[i ^ TIMES_TWO[j]])
    for i, name in enumerate(OPTIONS)
    for j, needs in enumerate(NEEDS)
]


def test_the_cases_hold_every_pair() -> None:
    for cases in (FORWARD, BACKWARD):
        for a, first in enumerate(zip(*cases, strict=True)):
            for second in list(zip(*cases, strict=True))[a + 1 :]:
                pairs = {(str(x), str(y)) for x, y in zip(first, second, strict=True)}
                assert len(pairs) == len({x for x, _ in pairs}) * len({y for _, y in pairs})


@pytest.mark.parametrize(("live", "name", "needs", "backend"), BACKWARD, indirect=["backend"])
def test_opcheck_backward(live: str, name: str, needs: list[bool], backend: str) -> None:
    arguments = operands(name, torch.bfloat16, False)
    with torch.no_grad():
        packed, notes = torch.ops.covgrpo.head_forward(*arguments, True, -100, 0.0)
    valid = arguments[3] != -100
    rows = {"all": valid, "some": valid & (torch.arange(7) % 3 != 0), "none": valid & False}[live]
    g = torch.linspace(-1, 1, 7) * rows
    e = g.flip(0) * rows if OPTIONS[name]["entropy"] else None
    plan = torch.ops.covgrpo.plan_backward(*arguments, packed, notes, g, e, 0.0, None)
    check(torch.ops.covgrpo.head_backward, (*arguments, packed, notes, g, e, plan, None, 0.0, needs, False))


@on_all_backends
def test_opcheck_backward_with_sparse_rows(backend: str) -> None:
    head = rl_head(0, 64, 16, 600)
    g, e = head["logprob_grad"], head["entropy_grad"]
    arguments = (head["hidden"], head["weight"], None, head["targets"], None, 1.0, None)
    min_prob = min_probability(5e-3)
    packed, notes = torch.ops.covgrpo.head_forward(*arguments, True, -100, min_prob)
    planning = (*arguments, packed, notes, g, e, 5e-3, None)
    check(torch.ops.covgrpo.plan_backward, planning)
    plan = torch.ops.covgrpo.plan_backward(*planning)
    assert BackwardPlan(*plan[: len(BackwardPlan._fields)]).sparse.any()
    given = (*arguments, packed, notes, g, e, plan, torch.tensor(0.5), min_prob, [True, True, False], False)
    check(torch.ops.covgrpo.head_backward, given)


def test_opcheck_plan_of_the_unbiased_mode() -> None:
    arguments = operands("all", torch.bfloat16, False)
    packed, notes = torch.ops.covgrpo.head_forward(*arguments, True, -100, 0.0)
    g, uniform = torch.linspace(-1, 1, 7), torch.linspace(0, 0.9, 7, dtype=torch.float64)
    for grad_tol in (0.0, 0.3):
        check(torch.ops.covgrpo.plan_backward, (*arguments, packed, notes, g, None, grad_tol, uniform))


READINGS = {"paper": CovarianceWeighting(), "author": CovGRPOConfig.author_code().token_weighting}
WEIGHTS = [
    (backend, reading, bool((i + j) % 2)) for i, backend in enumerate(BACKENDS) for j, reading in enumerate(READINGS)
]


@pytest.mark.parametrize(("backend", "reading", "shuffled"), WEIGHTS, indirect=["backend"])
def test_opcheck_covariance_weights(backend: str, reading: str, shuffled: bool) -> None:
    kind = READINGS[reading]
    assert isinstance(kind, CovarianceWeighting)
    batch = random_batch(0, dtype=torch.float32, shuffled=shuffled)
    valid = batch["mask"].flatten()
    ids = {n: batch[n] for n in ("group_ids", "group_size") if n in batch}
    tokens = flatten_tokens(
        batch["targets"], batch["advantages"], valid, dtype=torch.float32,
        group_ids=ids.get("group_ids"), group_size=ids.get("group_size"), sequence_ids=None,
    )  # fmt: skip
    assert tokens.sequences is not None
    arguments = (
        batch["old_logprobs"].flatten().where(valid, 0), tokens.advantages, valid,
        weighting_scopes(tokens, kind).tensors(), tokens.sequences.tensors(),
        kind.centering, kind.advantage_centering, kind.normalizer, kind.bandwidth_eps,
    )  # fmt: skip
    check(torch.ops.covgrpo.covariance_weights, arguments)


# ------------------------------------------------------------------------------------------------- compiled


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def policy_loss(batch: dict[str, Any], hidden: Tensor, weight: Tensor, weighting: Any = "covariance") -> Tensor:
    kind = config(beta=0.1, entropy_coef=0.01, weighting=weighting)
    out = covgrpo_loss(**(batch | dict(hidden=hidden, weight=weight)), config=kind)
    return out.loss + 0 * out.metrics["weight/ess"]


def trained(function: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    h, w = (batch[n].detach().clone().requires_grad_() for n in ("hidden", "weight"))
    loss = function(batch, h, w)
    return (loss.detach(), *torch.autograd.grad(loss, [h, w]))


def check_compiled(function: Any, batches: list[dict[str, Any]], first: int, **options: Any) -> None:
    """The bits of eager execution, without a compilation after the first batches."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    for i, batch in enumerate(batches):
        with torch._dynamo.config.patch(error_on_recompile=i >= first):
            results = trained(compiled, batch)
        for value, expected in zip(results, trained(function, batch), strict=True):
            assert same_bits(value, expected)


@on_all_backends
def test_compile_linear_logprob(backend: str, fresh_dynamo: None) -> None:
    """One graph for the first number of tokens, one dynamic graph for all others, no graph break."""
    check_compiled(head_loss, [inputs(i, tokens=i) for i in (5, 6, 8, 11, 12)], first=2)


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("weighting", ["covariance", "steer", "high_entropy"])
def test_compile_covgrpo_loss(backend: str, weighting: str, fresh_dynamo: None) -> None:
    """The same for the length of responses."""
    function = functools.partial(policy_loss, weighting=weighting)
    check_compiled(function, [random_batch(i, length=i, dtype=torch.float32) for i in (5, 6, 8, 11)], first=2)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_compile_packed_with_configurations(backend: str, fresh_dynamo: None) -> None:
    """Group and sequence ids, no metrics: the token count is the only size that changes."""

    def function(batch: dict[str, Any], hidden: Tensor, weight: Tensor) -> Tensor:
        return covgrpo_loss(
            **(batch | dict(hidden=hidden, weight=weight)), config=CovGRPOConfig.author_code(), metrics=False
        ).loss

    batches = [random_batch(i, length=i, packed=True, shuffled=True, dtype=torch.float32) for i in (5, 8, 11)]
    check_compiled(function, batches, first=1, dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_compile_with_inductor(backend: str, fresh_dynamo: None) -> None:
    """Inductor fuses what surrounds the operators; it must not see inside them."""
    batch = inputs(3)
    results = []
    for function in (head_loss, torch.compile(head_loss, fullgraph=True)):
        loss, dhidden, dweight = trained(function, batch)
        results.append(dict(loss=loss, dhidden=dhidden, dweight=dweight))
    oracle_batch = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    loss, dhidden, dweight = trained(head_loss, oracle_batch)
    oracle = dict(loss=loss, dhidden=dhidden, dweight=dweight)
    eps = torch.finfo(torch.float32).eps
    check_draw(results[1], results[0], oracle, {n: 8 * eps * max(1.0, rms(v)) for n, v in oracle.items()})
