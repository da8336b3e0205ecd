"""The operators as PyTorch citizens: autograd, autocast, strides, memory, threads, accumulation."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreter import interpreted
from products import Shapes, recorded_products
from torch import Tensor, nn

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
    operators,
    reference,
)
from covgrpo_kernels.testing import check_draw, random_batch, random_head, rms, run_logprob

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["eager", "cpp", "triton"], indirect=True),
]

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
EPS64 = torch.finfo(torch.float64).eps
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def config(loss_type: str = "grpo", **fields: Any) -> CovGRPOConfig:
    return CovGRPOConfig(loss_type=loss_type, max_completion_length=9, **fields)


CONFIGS = {
    "paper": CovGRPOConfig.paper(),
    "author_code": CovGRPOConfig.author_code(),
    "none": config("bnpo", weighting="none"),
    "clip_cov": config("dapo", weighting=ClipCov(ratio=0.2, low=-50.0, high=50.0)),
    "kl_cov": config("dapo", weighting=KLCov(fraction=0.2)),
    "steer": config(weighting=Steer(0.3)),
    "high_entropy": config("dapo", weighting=HighEntropy(0.3)),
    "cispo": config("cispo", beta=0.1),
    "sequence": config("dr_grpo", importance_level="sequence", entropy_coef=0.1),
}


def inputs(seed: int = 0, dtype: torch.dtype = torch.float32, tokens: int = 7, vocab: int = 13) -> dict[str, Any]:
    """A small head with bias and per-token temperatures; two rows ignored."""
    batch = random_head(seed, tokens, 6, vocab, bias=True)
    batch["targets"] = batch["targets"].abs() % vocab
    batch["targets"][[1, -1]] = -100
    values = {n: v.to(dtype) if v.is_floating_point() else v for n, v in batch.items()}
    return values | dict(temperature=torch.linspace(0.5, 2.0, tokens))


def step(batch: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of `linear_logprob` for coefficients of both outputs."""
    h, w, b = (batch[n].detach().requires_grad_() for n in ("hidden", "weight", "bias"))
    out = linear_logprob(h, w, batch["targets"], bias=b, temperature=batch["temperature"], entropy=True, **options)
    coefficients = [batch["logprob_grad"].to(out.logprob.dtype), batch["entropy_grad"].to(out.logprob.dtype)]
    grads = torch.autograd.grad([*out], [h, w, b], coefficients)
    results = dict(zip(("logprob", "entropy", "dhidden", "dweight", "dbias"), (*out, *grads), strict=True))
    return {n: v.detach() for n, v in results.items()}


def loss_step(batch: dict[str, Any], kind: CovGRPOConfig, **options: Any) -> dict[str, Tensor]:
    h, w = batch["hidden"].detach().requires_grad_(), batch["weight"].detach().requires_grad_()
    generator = torch.Generator().manual_seed(5)
    out = covgrpo_loss(**(batch | dict(hidden=h, weight=w)), config=kind, generator=generator, **options)
    grads = torch.autograd.grad(out.loss, [h, w])
    results = {n: v.detach() for n, v in out._asdict().items() if isinstance(v, Tensor)}
    metrics = {f"metric {n}": v for n, v in out.metrics.items()}
    return results | dict(zip(("dhidden", "dweight"), grads, strict=True)) | metrics


def same_bits(a: Tensor, b: Tensor) -> bool:
    nan = a.isnan() & b.isnan()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.masked_fill(nan, 0), b.masked_fill(nan, 0))


def assert_same_bits(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(ours[name], value), name


def assert_rounding(ours: dict[str, Tensor], expected: dict[str, Tensor], *names: str) -> None:
    """Equal up to the order of a few dozen float64 additions; those of the loss are of terms of order one."""
    for name in names:
        size = 1.0 if name == "loss" else expected[name].abs().max().item() if expected[name].numel() else 0.0
        error = (ours[name] - expected[name]).abs().max().item() if expected[name].numel() else 0.0
        assert error <= 64 * EPS64 * max(size, 1e-3), f"{name}: {error:.2e} of {size:.2e}"


@pytest.fixture
def products(backend: str, request: pytest.FixtureRequest) -> Iterator[Shapes]:
    """Shapes of the products that the backend makes, of the test's parameter ``dtype`` if it has one."""
    with recorded_products(request.node.callspec.params.get("dtype", torch.float32)) as shapes:
        yield shapes


def head_loss(batch: dict[str, Any], hidden: Tensor, weight: Tensor) -> Tensor:
    out = linear_logprob(
        hidden, weight, batch["targets"], bias=batch["bias"], temperature=0.7, softcap=9.0, entropy=True
    )
    x, e = batch["logprob_grad"], batch["entropy_grad"]
    return (out.logprob * x).sum() + (out.entropy * e).sum()


# ----------------------------------------------------------------------------------- differentiation


@pytest.mark.parametrize("which", ["linear_logprob", "covgrpo_loss"])
def test_double_backward_raises(which: str) -> None:
    """Silence would be a wrong gradient penalty."""
    if which == "linear_logprob":
        batch = inputs()
        h = batch["hidden"].requires_grad_()
        loss = head_loss(batch, h, batch["weight"].requires_grad_())
    else:
        batch = random_batch(0, dtype=torch.float32)
        h = batch["hidden"].requires_grad_()
        loss = covgrpo_loss(**batch).loss
    (grad,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*create_graph=True"):
        torch.autograd.grad(grad.square().sum(), h)


def test_double_backward_through_weights_raises() -> None:
    kind = CovarianceWeighting(differentiate_weights=True)
    x = torch.randn(2, 3, requires_grad=True)
    weights = covariance_weights(x, torch.randn(2), None, group_size=2, weighting=kind)
    (grad,) = torch.autograd.grad(weights.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["linear_logprob", "covgrpo_loss"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_only_the_needed_products(which: str, needs: tuple[bool, bool], dtype: torch.dtype, products: Shapes) -> None:
    """A frozen head is half of a user's runs: three units instead of four, and exactly the gradients asked for."""
    batch = random_batch(1, dtype=dtype, length=4, keep=1.0)
    n, d, v = batch["targets"].numel(), batch["hidden"].shape[-1], len(batch["weight"])
    h, w = batch["hidden"].requires_grad_(needs[0]), batch["weight"].requires_grad_(needs[1])
    if which == "linear_logprob":
        loss = linear_logprob(h, w, batch["targets"], grad_tol=0.0).logprob.square().sum()
    else:
        unclipped = config(weighting="none", clip_low=None, clip_high=None)
        loss = covgrpo_loss(**batch, config=unclipped, grad_tol=0.0).loss
    assert products.take() == [((n, d), (d, v))]
    assert loss.requires_grad == any(needs)
    if not any(needs):
        return
    loss.backward()
    expected = [((n, d), (d, v))]
    expected += [((n, v), (v, d))] if needs[0] else []
    expected += [((v, n), (n, d))] if needs[1] else []
    assert products.take() == expected
    for x, need in ((h, needs[0]), (w, needs[1])):
        assert (x.grad is not None) == need
        assert not need or (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("which", ["linear_logprob", "covgrpo_loss"])
def test_bias_alone(which: str, products: Shapes) -> None:
    """Everything frozen but the bias: its gradient needs no product but the recomputed logits, and is the same."""
    batch = random_batch(1, keep=1.0, bias=True, dtype=torch.float32)
    grads = []
    for frozen in (False, True):
        h, w = (batch[n].detach().clone().requires_grad_(not frozen) for n in ("hidden", "weight"))
        b = batch["bias"].detach().clone().requires_grad_()
        if which == "linear_logprob":
            loss = linear_logprob(h, w, batch["targets"], bias=b).logprob.square().sum()
        else:
            loss = covgrpo_loss(**(batch | dict(hidden=h, weight=w, bias=b))).loss
        products.take()
        loss.backward()
        assert len(products.take()) == (1 if frozen else 3)
        grads.append(b.grad)
    assert same_bits(grads[0], grads[1])


def test_dead_rows_enter_no_product(products: Shapes) -> None:
    """Rows without a coefficient cost nothing backward, ignored rows nothing at all."""
    batch = inputs()
    h, w = batch["hidden"].requires_grad_(), batch["weight"].requires_grad_()
    x = linear_logprob(h, w, batch["targets"], grad_tol=0.0).logprob
    assert [a[0] for a, _ in products.take()] == [5]
    g = batch["logprob_grad"].clone()
    g[[0, 2]] = 0
    x.backward(g)
    assert {a for a, _ in products.take()} == {(3, 6), (3, 13), (13, 3)}
    dead = torch.ones(7, dtype=torch.bool)
    dead[3:6] = False
    assert torch.equal((h.grad == 0).all(1), dead)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", ["linear_logprob", "covgrpo_loss"])
def test_nothing_live(which: str, dtype: torch.dtype, products: Shapes) -> None:
    """Zero coefficients everywhere: zeros of the right shape, dtype and device, and no product."""
    batch = random_batch(2, dtype=dtype, bias=True)
    variables = [batch[n].requires_grad_() for n in ("hidden", "weight", "bias")]
    if which == "linear_logprob":
        loss = linear_logprob(*variables[:2], batch["targets"], bias=variables[2]).logprob.sum() * 0
    else:
        batch["advantages"] = torch.zeros_like(batch["advantages"])
        loss = covgrpo_loss(**batch).loss
    products.take()
    loss.backward()
    assert products.take() == []
    for x in variables:
        assert (x.grad.dtype, x.grad.device) == (dtype, x.device)
        assert torch.equal(x.grad, torch.zeros_like(x))


class TiedModel(nn.Module):
    """Embedding and head are one parameter, reached on two ways."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(13, 6, generator=g, dtype=torch.float64).to(dtype))
        self.mix = nn.Parameter(torch.randn(6, 6, generator=g, dtype=torch.float64).to(dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(F.embedding(ids, self.embedding) @ self.mix)


@pytest.mark.parametrize("which", ["linear_logprob", "covgrpo_loss"])
def test_tied_weights(which: str) -> None:
    batch = random_batch(3, vocab=13)
    ids = batch["targets"].roll(1, 1)

    def gradients(module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        model = TiedModel(dtype)
        hidden = model(ids)
        if which == "linear_logprob":
            loss = module.linear_logprob(hidden, model.embedding, batch["targets"])[0].square().sum()
        else:
            others = {n: v for n, v in batch.items() if n not in ("hidden", "weight")}
            loss = module.covgrpo_loss(hidden, model.embedding, **others).loss
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    import covgrpo_kernels

    oracle = gradients(reference, torch.float64)
    eps = torch.finfo(torch.float32).eps
    bound = {n: 8 * eps * rms(v) for n, v in oracle.items()}
    check_draw(gradients(covgrpo_kernels, torch.float32), gradients(reference, torch.float32), oracle, bound)
    ours = gradients(covgrpo_kernels, torch.float64)
    assert_rounding(ours, oracle, *oracle)


def test_gradient_reaches_only_through_the_loss() -> None:
    batch = random_batch(4, dtype=torch.float32)
    batch["hidden"].requires_grad_()
    batch["old_logprobs"].requires_grad_()
    batch["advantages"].requires_grad_()
    out = covgrpo_loss(**batch, config=config(entropy_coef=0.1))
    assert out.loss.requires_grad
    for value in (out.logprobs, out.entropy, out.weights, *out.metrics.values()):
        assert not value.requires_grad
    out.loss.backward()
    assert batch["old_logprobs"].grad is None
    assert batch["advantages"].grad is None


@pytest.mark.parametrize("dtype", FLOATS)
def test_output_dtypes(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    out = step(inputs(dtype=dtype))
    assert {n: v.dtype for n, v in out.items()} == dict(
        logprob=wide, entropy=wide, dhidden=dtype, dweight=dtype, dbias=dtype
    )
    results = loss_step(random_batch(0, dtype=dtype), CONFIGS["paper"])
    for name, value in results.items():
        assert value.dtype == (dtype if name in ("dhidden", "dweight") else wide), name
    weights = covariance_weights(torch.zeros(2, 3, dtype=dtype), torch.zeros(2), None, group_size=2)
    assert weights.dtype == wide


def test_saved_input_changed_in_place() -> None:
    """Torch's own check of versions, for inputs that are saved and for those of the loss."""
    batch = inputs()
    for name in ("hidden", "weight", "targets"):
        h, w = (batch[n].detach().clone().requires_grad_() for n in ("hidden", "weight"))
        y = batch["targets"].clone()
        out = linear_logprob(h * 1, w * 1, y)
        changed = linear_logprob(hidden := h * 1, weight := w * 1, y).logprob.sum()
        with torch.no_grad():
            dict(hidden=hidden, weight=weight, targets=y)[name].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            changed.backward()
        if name != "targets":
            out.logprob.sum().backward()
    for name in ("hidden", "weight"):
        batch = random_batch(0, dtype=torch.float32)
        batch[name] = batch[name].requires_grad_() * 1
        loss = covgrpo_loss(**batch).loss
        with torch.no_grad():
            batch[name].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_are_never_written(name: str) -> None:
    batch = random_batch(5, dtype=torch.bfloat16, bias=True)
    batch["advantages"][:3] = 0
    before = {n: v.clone() for n, v in batch.items() if isinstance(v, Tensor)}
    for metrics in (True, False):
        loss_step(batch, CONFIGS[name], metrics=metrics)
    head = inputs(dtype=torch.float64)
    head_before = {n: v.clone() for n, v in head.items()}
    step(head, softcap=5.0, logit_scale=0.5)
    for batch_now, batch_before in ((batch, before), (head, head_before)):
        for n, value in batch_before.items():
            assert same_bits(batch_now[n].detach(), value), n


# -------------------------------------------------------------------------------------------------- strides


def strided(x: Tensor, how: str) -> Tensor:
    """The same values in another memory layout."""
    if how == "every second":
        return torch.stack([x, torch.full_like(x, 3)], dim=-1)[..., 0]
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.cat([torch.full_like(x[:1], 2), x])[1:]  # an offset


@pytest.mark.thinned(4)
@pytest.mark.parametrize("how", ["every second", "transposed", "offset"])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "targets", "temperature", "logprob_grad"])
def test_strides_linear_logprob(name: str, how: str) -> None:
    """Values decide, not the memory layout; a product may round differently on a transposed operand."""
    batch = inputs(dtype=torch.float64)
    if name != "weight":
        batch["weight"] = batch["weight"].contiguous()
    changed = batch | {name: strided(batch[name], how)}
    assert torch.equal(changed[name], batch[name])
    expected, ours = step(batch), step(changed)
    assert_rounding(ours, expected, *expected)
    assert ours["dhidden"].shape == batch["hidden"].shape


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_of_all_but_the_matrices(dtype: torch.dtype) -> None:
    """In every engine, of which there are several for 16 bits."""
    batch = inputs(dtype=dtype, tokens=24, vocab=70)
    expected = step(batch)
    for name in ("bias", "targets", "temperature"):
        assert_same_bits(step(batch | {name: strided(batch[name], "every second")}), expected)
    for one in (torch.tensor(0.7), torch.tensor([0.7]).expand(24)):
        assert_same_bits(step(batch | dict(temperature=one)), step(batch | dict(temperature=torch.full((24,), 0.7))))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, default: torch.dtype) -> None:
    batch = inputs(dtype=dtype, tokens=24, vocab=70)
    of_loss, kind = random_batch(6, dtype=dtype), config("dapo", weighting=ClipCov(ratio=0.2, low=-50.0, high=50.0))
    expected = step(batch, grad_tol=0.0), loss_step(of_loss, kind)
    torch.set_default_dtype(default)
    try:
        found = step(batch, grad_tol=0.0), loss_step(of_loss, kind)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, before in zip(found, expected, strict=True):
        assert_same_bits(ours, before)


def test_expanded_inputs_and_gradients() -> None:
    """Stride zero: `sum().backward()`, one hidden state for all tokens, one column for all entries."""
    batch = inputs(dtype=torch.float64)
    for changes in (
        dict(hidden=batch["hidden"][:1].expand(7, 6)),
        dict(hidden=batch["hidden"][:, :1].expand(7, 6)),
        dict(weight=batch["weight"][:, :1].expand(13, 6)),
        dict(targets=batch["targets"][:1].expand(7)),
        dict(temperature=batch["temperature"][:1].expand(7)),
        dict(logprob_grad=batch["logprob_grad"][:1].expand(7), entropy_grad=torch.ones(()).expand(7)),
    ):
        expanded = batch | changes
        whole = {n: v.clone(memory_format=torch.contiguous_format) for n, v in expanded.items()}
        expected = step(whole)
        assert_rounding(step(expanded), expected, *expected)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("how", ["every second", "transposed", "offset"])
@pytest.mark.parametrize("name", ["hidden", "weight", "targets", "mask", "old_logprobs", "ref_logprobs"])
def test_strides_covgrpo_loss(name: str, how: str) -> None:
    batch = random_batch(6)
    kind = config(beta=0.1, entropy_coef=0.1)
    changed = batch | {name: strided(batch[name], how)}
    assert torch.equal(changed[name], batch[name])
    assert_rounding(loss_step(changed, kind), loss_step(batch, kind), "loss", "dhidden", "dweight", "weights")


def test_nothing_is_kept_for_a_backward_that_cannot_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `no_grad`, and where nothing requires a gradient: candidates cost time and memory."""
    seen, forward = [], operators.forward
    monkeypatch.setattr(operators, "forward", lambda *a, **k: seen.append(k["needs_grad"]) or forward(*a, **k))
    batch = random_batch(0, dtype=torch.bfloat16)
    leaf = batch | dict(weight=batch["weight"].clone().requires_grad_())
    covgrpo_loss(**batch)
    covgrpo_loss(**leaf)
    with torch.no_grad():
        covgrpo_loss(**leaf)
        linear_logprob(leaf["hidden"], leaf["weight"], leaf["targets"])
    linear_logprob(leaf["hidden"], leaf["weight"], leaf["targets"])
    assert seen == [False, True, False, False, True]


def test_leading_shapes_are_only_views() -> None:
    batch = inputs(tokens=12)
    flat = linear_logprob(batch["hidden"], batch["weight"], batch["targets"], entropy=True)
    for shape in ((12,), (3, 4), (2, 3, 2), (1, 12)):
        out = linear_logprob(
            batch["hidden"].view(*shape, 6), batch["weight"], batch["targets"].view(shape), entropy=True
        )
        assert out.logprob.shape == out.entropy.shape == shape
        assert same_bits(out.logprob.flatten(), flat.logprob)
        assert same_bits(out.entropy.flatten(), flat.entropy)
    for dtype in (torch.int32, torch.uint8, torch.int8):
        targets = batch["targets"].clamp(min=0)
        narrow = linear_logprob(batch["hidden"], batch["weight"], targets.to(dtype))
        assert same_bits(narrow.logprob, linear_logprob(batch["hidden"], batch["weight"], targets).logprob)
    one = linear_logprob(batch["hidden"][0], batch["weight"], batch["targets"][0])
    assert one.logprob.shape == ()


# ------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("which", ["linear_logprob", "covgrpo_loss"])
def test_autocast_is_explicit_casting(which: str) -> None:
    """Same bits as casting by hand, float32 gradients for float32 master weights."""
    if which == "linear_logprob":
        batch, run, names = inputs(7, torch.float32), step, ("hidden", "weight", "bias")
    else:
        batch, names = random_batch(7, dtype=torch.float32), ("hidden", "weight")

        def run(batch: dict[str, Any]) -> dict[str, Tensor]:
            return loss_step(batch, config(entropy_coef=0.1, beta=0.1))

    with torch.autocast("cpu", torch.bfloat16):
        ours = run(batch)
    expected = run(batch | {n: batch[n].bfloat16() for n in names})
    for name in names:
        assert ours[f"d{name}"].dtype == torch.float32
        expected[f"d{name}"] = expected[f"d{name}"].float()
    assert_same_bits(ours, expected)


def test_autocast_stays_out_of_the_products() -> None:
    """Products in bfloat16 cost 0.05 nats; ours stay float32 within, also in a backward under autocast."""
    batch = random_head(8, 128, 64, 512, std=4.0)
    rounded = {n: v.bfloat16() if n in ("hidden", "weight") else v for n, v in batch.items() if v is not None}
    exact = {n: v.double() if v.is_floating_point() else v for n, v in rounded.items()}
    oracle = run_logprob(reference.linear_logprob, **exact, dtype=torch.float64)
    eager = run_logprob(reference.linear_logprob, **exact, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run_logprob(linear_logprob, **exact, dtype=torch.float32, entropy=True)
    for name in ("logprob", "entropy"):
        error, eager_error = rms(ours[name] - oracle[name]), rms(eager[name] - oracle[name])
        assert error <= 0.1 * eager_error, name
    eps = torch.finfo(torch.float32).eps
    check_draw(ours, eager, oracle, {n: 8 * eps * rms(v) for n, v in oracle.items()})


def test_autocast_leaves_float64_alone() -> None:
    """As `F.linear` does: autocast is for float32 and below."""
    batch = inputs(dtype=torch.float64)
    expected = step(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(batch["hidden"], batch["weight"]).dtype == torch.float64
        assert_same_bits(step(batch), expected)


def test_autocast_brings_mixed_dtypes_together() -> None:
    """Normed hidden states are float32 under autocast, the head may be bfloat16 already."""
    batch = inputs()
    expected = linear_logprob(batch["hidden"].bfloat16(), batch["weight"].bfloat16(), batch["targets"])
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_logprob(batch["hidden"], batch["weight"].bfloat16(), batch["targets"])
    assert same_bits(ours.logprob, expected.logprob)


# --------------------------------------------------------------------------------- determinism and memory


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """`torch.empty` returns NaN."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was[0], warn_only=was[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


def everything(dtype: torch.dtype) -> dict[str, Tensor]:
    batch = random_batch(9, dtype=dtype, groups=3)
    batch["advantages"][:3] = 0
    results = {f"head {n}": v for n, v in step(inputs(9, dtype, vocab=1500), softcap=5.0).items()}
    for name in ("author_code", "sequence") if interpreted() else CONFIGS:
        kind = CONFIGS[name]
        for metrics in (True, False):
            out = loss_step(batch, kind, metrics=metrics)
            results |= {f"{name} {metrics} {n}": v for n, v in out.items()}
    return results


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_run(dtype: torch.dtype) -> None:
    assert_same_bits(everything(dtype), everything(dtype))


@pytest.mark.thinned(2)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_uninitialised_memory_is_not_read(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    expected = everything(dtype)
    request.getfixturevalue("nan_memory")
    assert_same_bits(everything(dtype), expected)


def test_two_threads_at_once(backend: str) -> None:
    """No state is shared: interleaved calls give what each gives alone."""
    if backend == "triton":
        pytest.skip("Triton's interpreter is not for two threads")
    batches = [inputs(s, vocab=3000, tokens=40) for s in (1, 2)]
    losses = [random_batch(s, dtype=torch.float32, length=20) for s in (1, 2)]
    expected = [(step(h), loss_step(b, CONFIGS["cispo"])) for h, b in zip(batches, losses, strict=True)]
    results: list[list[Any]] = [[], []]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(8):
            results[i].append((step(batches[i]), loss_step(losses[i], CONFIGS["cispo"])))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for found, wanted in zip(results, expected, strict=True):
        assert len(found) == 8
        for pair in found:
            for ours, alone in zip(pair, wanted, strict=True):
                assert_same_bits(ours, alone)


def test_backward_in_another_thread() -> None:
    batch = inputs()
    h = batch["hidden"].requires_grad_()
    loss = head_loss(batch, h, batch["weight"])
    (expected,) = torch.autograd.grad(loss, h, retain_graph=True)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert same_bits(h.grad, expected)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", CONFIGS)
def test_module_copies_and_pickles(name: str) -> None:
    module = CovGRPOLoss(CONFIGS[name], temperature=0.7, softcap=9.0, grad_tol=0.0)
    batch = random_batch(0, dtype=torch.float32)

    def run(m: CovGRPOLoss) -> Tensor:
        return m(**batch, generator=torch.Generator().manual_seed(1)).loss

    direct = covgrpo_loss(
        **batch, config=CONFIGS[name], temperature=0.7, softcap=9.0, grad_tol=0.0,
        generator=torch.Generator().manual_seed(1),
    ).loss  # fmt: skip
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.config == module.config
        assert repr(other) == repr(module)
        assert same_bits(run(other), direct)
    # Keywords of a call win over those of the module.
    assert module(**batch, temperature=2.0).loss != run(module)
    assert module(**batch, metrics=False).metrics == {}
    assert not list(module.parameters())
    assert not module.state_dict()


# ------------------------------------------------------------------------------------------- accumulation


@pytest.mark.thinned(5)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_accumulation_equals_the_full_batch(loss_type: str, level: str, packed: bool) -> None:
    """Micro-batches of whole groups, of unequal token counts, with the denominator of them all."""
    batch = random_batch(10, groups=4, length=7, keep=0.6, packed=packed)
    if not packed:
        batch["mask"][3] = False  # a response without a token counts nowhere
        batch["group_ids"] = torch.arange(12) // batch.pop("group_size")
    kind = config(loss_type, importance_level=level, beta=0.1, entropy_coef=0.01)
    full = loss_step(batch, kind, grad_tol=0.0)
    if loss_type in ("grpo", "dr_grpo"):
        total = len(batch["sequence_ids"].unique()) if packed else int(batch["mask"].any(1).sum())
    else:
        total = len(batch["targets"]) if packed else int(batch["mask"].sum())

    parts: dict[str, Any] = dict(loss=0.0, dweight=0.0, dhidden=[], weights=[])
    for groups in ([0], [1, 2], [3]):
        ids = batch["group_ids"]
        rows = torch.isin(ids, ids.unique()[groups])
        micro = {n: v[rows] if isinstance(v, Tensor) and n not in ("weight", "bias") else v for n, v in batch.items()}
        for normalizer in (total, torch.tensor(float(total), dtype=torch.float64)):
            out = loss_step(micro, kind, grad_tol=0.0, normalizer=normalizer)
        parts["loss"] = parts["loss"] + out["loss"]
        parts["dweight"] = parts["dweight"] + out["dweight"]
        parts["dhidden"].append(out["dhidden"])
        parts["weights"].append(out["weights"])
    parts["dhidden"], parts["weights"] = torch.cat(parts["dhidden"]), torch.cat(parts["weights"])
    assert_rounding(parts, full, "loss", "dweight", "dhidden", "weights")


def test_accumulation_into_grad() -> None:
    """`backward` adds to what is there."""
    batch = inputs()
    h, w = batch["hidden"].requires_grad_(), batch["weight"].requires_grad_()
    head_loss(batch, h, w).backward()
    once = h.grad.clone(), w.grad.clone()
    head_loss(batch, h, w).backward()
    assert same_bits(h.grad, 2 * once[0])
    assert same_bits(w.grad, 2 * once[1])


# -------------------------------------------------------------------------------------------------- metrics

WEIGHTINGS = {
    **CONFIGS,
    "batch_scope": config("dapo", weighting=CovarianceWeighting(scope="batch", differentiate_weights=True)),
    "beta": config(beta=0.1),
    "none_sequence": config("bnpo", weighting="none", importance_level="sequence"),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_without_metrics_the_loss_is_the_same(name: str, packed: bool) -> None:
    batch = random_batch(11, groups=4, packed=packed)
    batch["advantages"] = batch["advantages"].clone()
    batch["advantages"][: len(batch["advantages"]) // 2] = 0
    full = loss_step(batch, WEIGHTINGS[name], grad_tol=0.0)
    lean = loss_step(batch, WEIGHTINGS[name], grad_tol=0.0, metrics=False)
    assert not [n for n in lean if n.startswith("metric")]
    assert ("entropy" in lean) == (WEIGHTINGS[name].entropy_coef != 0)
    assert_rounding(lean, full, "loss", "dhidden", "dweight", "weights")
    scored = ~lean["logprobs"].isnan()
    assert scored.any()
    assert_rounding(
        dict(x=lean["logprobs"][scored]), dict(x=full["logprobs"][scored]), "x"
    )  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_without_metrics_and_advantages(name: str) -> None:
    """KL-Cov's penalty |x - old| does not go away with the advantages: its rows influence the loss."""
    batch = random_batch(12)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    full = loss_step(batch, WEIGHTINGS[name], grad_tol=0.0)
    lean = loss_step(batch, WEIGHTINGS[name], grad_tol=0.0, metrics=False)
    assert_rounding(lean, full, "loss", "dhidden", "dweight")


@pytest.mark.parametrize(
    ("name", "scored"),
    [
        ("paper", "group"),
        ("none", "token"),
        ("none_sequence", "sequence"),
        ("clip_cov", "batch"),
        ("kl_cov", "batch"),
        ("steer", "token"),
        ("high_entropy", "batch"),
        ("batch_scope", "batch"),
        ("beta", "batch"),
        ("sequence", "batch"),  # has an entropy bonus
    ],
)
def test_without_metrics_idle_rows_are_not_scored(name: str, scored: str, products: Shapes) -> None:
    """Exactly the rows that influence something enter a product: the group's, the sequence's, the token's own."""
    batch = random_batch(13, groups=3, length=6, dtype=torch.float32)
    mask = batch["mask"]
    mask[3] = True
    a = torch.zeros(mask.shape)
    a[3, 2], a[7] = 1.5, -0.5
    batch["advantages"] = a
    wanted = {
        "token": mask & (a != 0),
        "sequence": mask & (a != 0).any(1, keepdim=True),
        "group": mask & (torch.arange(9) >= 3).unsqueeze(1),
        "batch": mask,
    }[scored]
    out = covgrpo_loss(**batch, config=WEIGHTINGS[name], metrics=False)
    assert [a[0] for a, _ in products.take()] == [int(wanted.sum())]
    assert torch.equal(out.logprobs.isnan(), mask & ~wanted)
    assert not out.logprobs[~mask].any()
    covgrpo_loss(**batch, config=WEIGHTINGS[name], metrics=True)
    assert [a[0] for a, _ in products.take()] == [int(mask.sum())]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_metrics_against_the_reference(estimator: str, packed: bool) -> None:
    """Every metric from the reference's log-probs, entropies and weights, in the plainest way."""
    batch = random_batch(14, groups=3, length=8, packed=packed)
    kind = config(
        "bnpo", beta=0.2, kl_estimator=estimator, entropy_coef=0.03, dual_clip=1.4, clip_low=0.1, clip_high=0.15
    )
    out = covgrpo_loss(**batch, config=kind, grad_tol=0.0)
    exact = reference.covgrpo_loss(**batch, config=kind)
    valid = torch.ones_like(batch["targets"], dtype=torch.bool) if packed else batch["mask"]
    group = batch["group_ids"] if packed else (torch.arange(9) // 3).unsqueeze(1).expand_as(valid)
    a = batch["advantages"] if packed else batch["advantages"].unsqueeze(1).expand_as(valid)
    x, h, w = exact.logprobs[valid], exact.entropy[valid], exact.weights[valid]
    a, group = a[valid], group[valid]
    r = (x - batch["old_logprobs"][valid]).exp()
    d = batch["ref_logprobs"][valid] - x
    kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[estimator]
    wa = w * a
    surrogate = torch.minimum(r * wa, r.clamp(0.9, 1.15) * wa)
    surrogate = surrogate.where(a > 0, torch.maximum(surrogate, 1.4 * wa))
    c = torch.zeros_like(x)
    for i in group.unique():
        rows = group == i
        c[rows] = (x[rows] - x[rows].mean()) * (a[rows] - a[rows].mean())
    low, high = (a < 0) & (r < 0.9), (a > 0) & (r > 1.15)
    dual = (a < 0) & (r > 1.4)
    quantiles = dict(q01=0.01, q20=0.2, q50=0.5, q80=0.8, q99=0.99)
    expected = {
        "loss/policy": -(surrogate * batch["rollout_weights"][valid]).mean(),
        "loss/kl": 0.2 * kl.mean(),
        "loss/entropy": -0.03 * h.mean(),
        "entropy": h.mean(),
        "kl": kl.mean(),
        "ratio/mean": r.mean(),
        "ratio/max": r.max(),
        "ratio/non_finite": torch.zeros((), dtype=torch.float64),
        "weight/mean": w.mean(),
        "weight/min": w.min(),
        "weight/max": w.max(),
        "weight/ess": w.sum() ** 2 / w.square().sum() / len(w),
        "clip/low": low.double().mean(),
        "clip/high": high.double().mean(),
        "clip/dual": dual.double().mean(),
        "covariance/mean": c.mean(),
        "covariance/std": c.std(correction=0),
        **{f"covariance/{n}": c.quantile(q, interpolation="nearest") for n, q in quantiles.items()},
        "rows/live_fraction": torch.ones((), dtype=torch.float64),  # entropy bonus
        "rows/dense_fraction": torch.ones((), dtype=torch.float64),
        "rows/grad_error_bound": torch.zeros((), dtype=torch.float64),
        "rows/invalid_targets": torch.zeros((), dtype=torch.float64),
        "rows/invalid_advantages": torch.zeros((), dtype=torch.float64),
    }
    for name in ("clip/low", "clip/high", "clip/dual", "loss/kl"):
        assert expected[name] != 0, f"the batch does not exercise {name}"
    assert set(out.metrics) == set(expected)
    assert all(v.shape == () for v in out.metrics.values())
    assert_rounding(out.metrics, expected, *expected)
    parts = sum(out.metrics[f"loss/{part}"] for part in ("policy", "kl", "entropy"))
    assert_rounding(dict(loss=parts), dict(loss=exact.loss), "loss")


def test_live_fraction_and_error_bound() -> None:
    """Without entropy and KL the clipped and the masked are not live; with a tolerance, the small ones neither."""
    batch = random_batch(15, groups=3, length=8)
    kind = config(weighting="none")
    out = covgrpo_loss(**batch, config=kind, grad_tol=0.0)
    valid = batch["mask"]
    a = batch["advantages"].unsqueeze(1).expand_as(valid)
    r = (out.logprobs - batch["old_logprobs"]).exp()
    clipped = ((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8))
    expected = (valid & ~clipped).sum().double() / valid.sum()
    assert 0 < expected < 1
    assert_rounding(out.metrics, {"rows/live_fraction": expected}, "rows/live_fraction")
    loose = covgrpo_loss(**batch, config=kind, grad_tol=0.2).metrics
    assert loose["rows/live_fraction"] < expected
    assert 0 < loose["rows/grad_error_bound"] <= 0.2


def test_clip_cov_draws_from_its_generator() -> None:
    batch = random_batch(16, groups=4, length=9)
    kind = CONFIGS["clip_cov"]

    def weights(seed: int) -> Tensor:
        return covgrpo_loss(**batch, config=kind, generator=torch.Generator().manual_seed(seed)).weights

    torch.manual_seed(0)
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    state = torch.get_rng_state()
    weights(3)
    assert torch.equal(torch.get_rng_state(), state)
