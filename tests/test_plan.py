"""The backward plan: what may be left out, the certificate, and that it saves work."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from covgrpo_kernels import covgrpo_loss, linear_logprob, logprob, reference, tiles
from covgrpo_kernels.backward_plan import plan_backward, resolve_grad_tol
from covgrpo_kernels.config import CovGRPOConfig
from covgrpo_kernels.testing import policy_head, random_batch
from covgrpo_kernels.tiles.interface import Head

F64 = torch.float64


def dense_dlogits(logits, targets, g, e, head, temperature):
    """dL/d(raw products) by autograd in float64: with the identity as head they are the hidden states."""
    logits = logits.double().requires_grad_()
    t = 1.0 if temperature is None else temperature.double()
    eye = torch.eye(logits.shape[1], dtype=F64)
    x, h = reference.linear_logprob(logits, eye, targets, temperature=t, logit_scale=head.scale, softcap=head.softcap)
    total = (x * g).sum() + (0 if e is None else (h * e).sum())
    return torch.autograd.grad(total, logits)[0]


def check_certificate(seed, tokens, grad_tol, entropy, softcap, scale, per_token, sure):
    g_ = torch.Generator().manual_seed(seed)
    vocab = 40
    logits = torch.randn(tokens, vocab, generator=g_, dtype=F64) * 3
    targets = torch.randint(0, vocab, (tokens,), generator=g_)
    peaks = torch.rand(tokens, generator=g_) < sure
    logits[peaks, targets[peaks]] += 10 + 10 * torch.rand(int(peaks.sum()), generator=g_, dtype=F64)
    g = torch.randn(tokens, generator=g_, dtype=F64) * 10 ** torch.randn(tokens, generator=g_, dtype=F64)
    g[torch.rand(tokens, generator=g_) < 0.2] = 0
    e = torch.randn(tokens, generator=g_, dtype=F64) * 0.1 if entropy else None
    temperature = torch.rand(tokens, generator=g_, dtype=F64) + 0.3 if per_token else None
    head = Head(scale, softcap)

    eye = torch.eye(vocab, dtype=F64)
    t = 1.0 if temperature is None else temperature
    x, h, m, l = logprob.linear_logprob_op(logits, eye, None, targets, temperature, scale, softcap, True, -100, 0.0)
    plan = plan_backward(x, h, m + l, g, e, head, temperature, grad_tol)
    dz = dense_dlogits(logits, targets, g, e, head, temperature)
    total = dz.abs().sum()
    error = dz[~plan.live].abs().sum()
    # What float64 autograd itself gets wrong: 1 - p of a sure token cancels in it, which it doesn't here.
    slope = (abs(scale) / torch.as_tensor(t)).amax() if tokens else 1.0
    size = g.abs().sum() + (0 if e is None else e.abs().sum())
    noise = 32 * torch.finfo(F64).eps * (1 + logits.abs().max() * slope) * size * slope if tokens else 0.0
    assert error <= plan.error_bound * total + noise
    assert plan.error_bound <= grad_tol
    zero = (g == 0) & (torch.zeros_like(g) if e is None else e).eq(0)
    assert not plan.live[zero].any()
    if grad_tol == 0:
        assert torch.equal(plan.live, ~zero)
    if not entropy and softcap is None and tokens and total > 0:
        # The bound is exact here: what was left out, and that no further row fits.
        assert (plan.error_bound * total - error).abs() <= noise
        rows = dz.abs().sum(1)[plan.live]
        assert not len(rows) or error + rows.min() > grad_tol * total - noise


@given(
    st.integers(0, 2**31), st.sampled_from([0, 1, 2, 30]), st.sampled_from([0.0, 1e-6, 2e-3, 0.1, 0.5]), st.booleans(),
    st.sampled_from([None, 3.0, 30.0]), st.sampled_from([1.0, -0.5, 2.0]), st.booleans(),
    st.sampled_from([0.0, 0.8, 1.0]),
)  # fmt: skip
def test_certificate_holds_against_the_dense_gradient(seed, tokens, grad_tol, entropy, softcap, scale, per_token, sure):
    """|error in dZ|_1 <= bound * |dZ|_1 with bound <= grad_tol, in every case drawn."""
    check_certificate(seed, tokens, grad_tol, entropy, softcap, scale, per_token, sure)


@pytest.mark.parametrize("grad_tol", [2e-3, 0.05])
def test_tolerance_is_kept_and_used(grad_tol):
    check_certificate(5, 400, grad_tol, False, None, 1.0, False, 0.8)
    check_certificate(6, 400, grad_tol, True, None, 1.0, False, 0.8)
    check_certificate(7, 400, grad_tol, True, 10.0, 1.0, True, 0.8)


def products(monkeypatch, run):
    """Rows that entered matrix products while ``run`` ran, where those are PyTorch's."""
    rows = []
    mm = logprob._mm
    with monkeypatch.context() as patch:
        patch.setenv(tiles.VARIABLE, "eager")
        patch.setattr(logprob, "_mm", lambda a, b, out, **k: (rows.append(len(a)), mm(a, b, out, **k))[1])
        run()
    return sum(rows)


def test_rows_without_coefficient_enter_no_product(monkeypatch):
    """Backward only: one slice of the vocabulary, so products see live rows for logits and dH; dW sees slices."""
    head = policy_head(0, 64, 16, 500)
    hidden = head["hidden"].requires_grad_()
    for live in (0, 1, 7, 64):
        x = linear_logprob(hidden, head["weight"], head["targets"], grad_tol=0.0).logprob
        coefficients = torch.zeros(64)
        coefficients[torch.randperm(64)[:live]] = 1.0
        assert products(monkeypatch, lambda x=x, c=coefficients: x.backward(c)) == 2 * live
    monkeypatch.undo()


def test_rows_without_coefficient_enter_no_product_of_a_backend_of_its_own(monkeypatch):
    cpp = pytest.importorskip("covgrpo_kernels.tiles.cpp", reason="the C++ extension was not built")
    monkeypatch.setenv(tiles.VARIABLE, "cpp")
    if not cpp.multiplies(torch.float32):
        pytest.skip("needs AVX512-BF16")
    head = policy_head(0, 64, 16, 500)
    hidden, rows, grad = head["hidden"].requires_grad_(), [], cpp.grad_products
    monkeypatch.setattr(cpp, "grad_products", lambda hidden, *rest: (rows.append(len(hidden)), grad(hidden, *rest)))
    for live in (0, 1, 7, 64):
        rows.clear()
        coefficients = torch.zeros(64)
        coefficients[torch.randperm(64)[:live]] = 1.0
        linear_logprob(hidden, head["weight"], head["targets"], grad_tol=0.0).logprob.backward(coefficients)
        assert sum(rows) == live


def test_default_tolerance_skips_sure_tokens_in_bf16_and_none_that_matter_in_fp32():
    head = policy_head(1, 512, 64, 2000, zero_advantage=0.3)
    g = head["logprob_grad"]
    x, h, m, l = logprob.linear_logprob_op(
        head["hidden"], head["weight"], None, head["targets"], None, 1.0, None, True, -100, 0.0
    )
    share = {}
    for dtype in (torch.float32, torch.bfloat16):
        plan = plan_backward(x, h, m + l, g, None, Head(1.0, None), None, resolve_grad_tol("auto", dtype))
        share[dtype] = plan.live.float().mean().item()
        assert plan.error_bound <= torch.finfo(dtype).eps / 4
    assert share[torch.bfloat16] < 0.6
    assert share[torch.bfloat16] < share[torch.float32] <= 0.7


def test_loss_reports_the_plan():
    batch = random_batch(0, groups=4, length=9, vocab=30)
    batch["advantages"][:6] = 0
    config = CovGRPOConfig(weighting="none")
    valid = batch["mask"].sum()
    out = covgrpo_loss(**batch, config=config, grad_tol=0.0)
    assert out.metrics["rows/grad_error_bound"] == 0
    clipped = out.metrics["clip/low"] + out.metrics["clip/high"]
    zero = (batch["mask"] & (batch["advantages"] == 0)[:, None]).sum() / valid
    assert out.metrics["rows/live_fraction"].item() == pytest.approx((1 - zero - clipped).item())
    loose = covgrpo_loss(**batch, config=config, grad_tol=0.2).metrics
    assert 0 < loose["rows/grad_error_bound"] <= 0.2
    assert loose["rows/live_fraction"] < out.metrics["rows/live_fraction"]
