"""What the C++ backend promises beyond the numbers that every backend is tested for: the same bits whatever the
threads, the batch and the cut of the vocabulary, every instruction set, any strides, memory nobody initialised."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import test_logprob
import torch
from hypothesis import given
from hypothesis import strategies as st

from covgrpo_kernels import CovGRPOConfig, covgrpo_loss, engines, kernels, linear_logprob, reference
from covgrpo_kernels.kernels.interface import NO_MAX, VOCAB_BLOCK, Coefficients, LogitTransform, OnlineSoftmax, Tile
from covgrpo_kernels.testing import ErrorBook, policy_head, random_batch, random_head, rms

if os.environ.get("COVGRPO_BUILD_CPP") == "1":
    from covgrpo_kernels.kernels import cpp
else:
    cpp = pytest.importorskip("covgrpo_kernels.kernels.cpp", reason="the C++ extension was not built")

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
HERE = ISAS.index(cpp.isa())
OWN = [
    pytest.param(dtype, id=str(dtype), marks=pytest.mark.skipif(HERE < 3, reason="needs AVX512-BF16"))
    for dtype in (torch.bfloat16, torch.float32)
]
F64 = torch.float64


@pytest.fixture(autouse=True)
def _on_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "cpp")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if ISAS.index(request.param) > HERE:
        pytest.skip(f"the processor has no {request.param}")
    monkeypatch.setenv("COVGRPO_CPU_ISA", request.param)
    return request.param


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scored(hidden, weight, targets, **options):
    """Log-probs and entropies, and gradients of both with coefficients from the targets."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    x, h = linear_logprob(hidden, weight, targets, entropy=True, grad_tol=0.0, **options)
    total = (x * (targets % 7 - 3.2)).sum() + 0.1 * h.sum()
    return x.detach(), h.detach(), *torch.autograd.grad(total, (hidden, weight))


def inputs(dtype, tokens, depth, vocab, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, depth, generator=g).to(dtype)
    weight = (torch.randn(vocab, depth, generator=g) * (3 / max(depth, 1) ** 0.5)).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=g)


def same_bits(a, b):
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------------- instruction sets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", test_logprob.OPTIONS.values(), ids=test_logprob.OPTIONS)
def test_pooled_errors_by_instruction_set(isa, dtype, options):
    test_logprob.test_pooled_errors(dtype, options)


def test_loss_by_instruction_set(isa):
    batch = random_batch(0, groups=4, length=9, vocab=1500, dtype=torch.float32)
    ours, eager = (f(**batch, config=CovGRPOConfig(beta=0.1)) for f in (covgrpo_loss, reference.covgrpo_loss))
    exact = reference.covgrpo_loss(
        **{n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in batch.items()},
        config=CovGRPOConfig(beta=0.1),
    )
    for name in ("logprobs", "weights"):
        error, eager_error = (rms(getattr(r, name).double() - getattr(exact, name)) for r in (ours, eager))
        assert error <= 1.1 * eager_error, name


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_exponential(isa, dtype):
    """Of the gradient of a tile: p = exp(z) where maximum and log_sum are zero and g is -1. Denormals become zero."""
    x = -torch.rand(200, 1000, dtype=dtype) * 90
    x[0, :4] = torch.tensor([0.0, -1e-30, -87.3, -1e30], dtype=dtype)
    result = x.clone()
    coefficients = torch.zeros(4, 200, dtype=dtype)
    coefficients[3] = -1
    cpp.dlogits(
        result, Tile(torch.full((200,), -1), 0, LogitTransform(), None, None), Coefficients(coefficients), result
    )
    exact, eps = x.double().exp(), torch.finfo(dtype).eps
    assert ((result - exact).abs() <= 2 * eps * exact + torch.finfo(dtype).smallest_normal).all()


def test_hyperbolic_tangent(isa):
    """A softcap of 1 makes it the logit, which the running softmax keeps where it is the target's."""
    x = torch.cat([torch.randn(20_000) * 10 ** torch.randn(20_000), torch.tensor([0.0, 0.6249999, 0.625, 1e30, -1e30])])
    running = OnlineSoftmax.empty(len(x), torch.float32, torch.device("cpu"))
    tile = Tile(torch.zeros(len(x), dtype=torch.int64), 0, LogitTransform(1.0, 1.0), None, None)
    cpp.online_softmax_(x.unsqueeze(1).clone(), tile, running, False)
    exact = x.double().tanh()
    assert ((running.target - exact).abs() <= 3 * torch.finfo(torch.float32).eps * exact.abs()).all()


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("sse9", "COVGRPO_CPU_ISA must be 'auto', 'baseline', 'avx2', 'avx512' or 'avx512bf16', got 'sse9'"),
        ("auto", None),
    ],
)
def test_instruction_set_by_its_variable(value, error, monkeypatch):
    monkeypatch.setenv("COVGRPO_CPU_ISA", value)
    if error is None:
        assert ISAS.index(cpp.isa()) >= HERE  # more than the environment of this run may allow
        return
    with pytest.raises(ValueError, match=error):
        cpp.isa()
    with pytest.raises(ValueError, match=error):
        linear_logprob(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1]))
    assert ("cpp", True, f"used on CPUs: {error}") in kernels.report()


def test_instructions_that_are_missing(monkeypatch):
    monkeypatch.setenv("COVGRPO_CPU_ISA", "auto")
    if cpp.isa() == "avx512bf16":
        pytest.skip("the processor has all instructions")
    monkeypatch.setenv("COVGRPO_CPU_ISA", "avx512bf16")
    with pytest.raises(RuntimeError, match="COVGRPO_CPU_ISA=avx512bf16 can't run here"):
        cpp.isa()


# ---------------------------------------------------------------------------------------------------------- bits


@given(st.integers(0, 2**31), st.sampled_from([2, 17, 64, 70, 200]), st.sampled_from([1, 7, 64, 130]))
@pytest.mark.parametrize("dtype", OWN)
def test_bits_of_a_row_are_its_own(dtype, seed, tokens, depth):
    """Alone, in any batch: training and scoring agree exactly."""
    hidden, weight, targets = inputs(dtype, tokens, depth, 1300, seed)
    x, h, *_ = scored(hidden, weight, targets)
    for rows in (slice(0, 1), slice(tokens // 2, None), slice(None, None, 3)):
        alone = linear_logprob(hidden[rows], weight, targets[rows], entropy=True)
        assert torch.equal(alone.logprob, x[rows])
        assert torch.equal(alone.entropy, h[rows])


@pytest.mark.parametrize("dtype", OWN)
@pytest.mark.parametrize("tile", [(1024, 2 * VOCAB_BLOCK), (16, VOCAB_BLOCK), (70, 2 * VOCAB_BLOCK)], ids=str)
def test_bits_do_not_depend_on_threads_and_runs(dtype, tile):
    """Not even those of the gradients, for one tile: every sum has a fixed order."""
    hidden, weight, targets = inputs(dtype, 150, 70, 3 * VOCAB_BLOCK + 5)
    results = []
    for count in (1, 2, 4, 2):
        with threads(count), engines.use(tile):
            results.append(scored(hidden, weight, targets))
    assert all(same_bits(results[0], other) for other in results[1:])
    with engines.use((33, VOCAB_BLOCK)):
        assert same_bits(results[0][:2], scored(hidden, weight, targets)[:2])


@pytest.mark.parametrize("dtype", OWN)
def test_bits_do_not_depend_on_where_the_vocabulary_is_cut(dtype):
    hidden, weight, targets = inputs(dtype, 40, 33, 5 * VOCAB_BLOCK + 77)

    def cut_at(*edges):
        running = OnlineSoftmax.empty(40, torch.float32, torch.device("cpu"))
        for a, b in itertools.pairwise(edges):
            workspace = torch.empty(cpp.fused_forward_bytes(40, b - a, 33, dtype), dtype=torch.uint8)
            tile = Tile(targets, a, LogitTransform(), None, None)
            cpp.fused_forward(hidden, weight[a:b], tile, running, True, workspace)
        return running

    whole = cut_at(0, len(weight))
    assert same_bits(whole, cut_at(0, VOCAB_BLOCK, 4 * VOCAB_BLOCK, len(weight)))
    assert same_bits(whole, cut_at(*range(0, 6 * VOCAB_BLOCK, VOCAB_BLOCK), len(weight)))


@pytest.mark.parametrize("dtype", OWN)
@pytest.mark.parametrize("entropy", [False, True])
def test_memory_that_nobody_initialised(dtype, entropy):
    """PyTorch fills new memory with NaN: nothing of it reaches a result, though lanes and rows are padded."""
    hidden, weight, targets = inputs(dtype, 70, 19, VOCAB_BLOCK + 51)
    options = dict(bias=torch.randn(len(weight)).to(dtype), temperature=0.7)
    plain = scored(hidden, weight, targets, **options)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        filled = scored(hidden, weight, targets, **options)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    assert same_bits(plain, filled)


@pytest.mark.parametrize("dtype", OWN)
def test_gradient_of_the_head_is_rounded_once(dtype):
    """To the nearest, ties to even, of the very sums in float32 and times the scale; in one call or in two."""
    hidden, weight, targets = inputs(dtype, 48, 33, 130)
    coefficients = Coefficients(torch.randn(4, 48))
    coefficients.packed[0].abs_().add_(9)

    def called(rows, weight_sum, add, weight_grad):
        size = cpp.fused_backward_bytes(rows.stop - rows.start, 130, 33, dtype, (False, True, False))
        cpp.fused_backward(
            hidden[rows], weight, Tile(targets[rows], 0, LogitTransform(), None, None), coefficients.take(rows),
            hidden_sum=None, weight_sum=weight_sum, add_to_weight=add, weight_grad=weight_grad, weight_scale=0.25,
            bias_sum=None, workspace=torch.empty(size, dtype=torch.uint8),
        )  # fmt: skip

    sums, once, twice = torch.empty(130, 33), torch.empty_like(weight), torch.empty_like(weight)
    called(slice(0, 48), sums, False, None)
    called(slice(0, 48), None, False, once)
    assert torch.equal(once, (sums * 0.25).to(dtype))
    called(slice(0, 16), sums, False, None)
    first = sums.clone()
    called(slice(16, 48), sums, True, twice)
    assert torch.equal(sums, first)
    called(slice(16, 48), sums, True, None)
    assert torch.equal(twice, (sums * 0.25).to(dtype))


# -------------------------------------------------------------------------------------------------------- layout


def laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    rows, columns = x.shape
    if how == "odd address":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(rows, columns)
    if how == "wide rows":
        return torch.cat([x, x.new_full((rows, 3), torch.nan)], 1)[:, :columns]
    if how == "every other column":
        return torch.stack([x, torch.full_like(x, torch.nan)], 2).flatten(1)[:, ::2]
    return x.t().contiguous().t()  # columns side by side


@pytest.mark.parametrize("how", ["odd address", "wide rows", "every other column", "transposed"])
@pytest.mark.parametrize("which", ["hidden", "weight"])
@pytest.mark.parametrize("dtype", OWN)
def test_strides_and_addresses(dtype, which, how):
    hidden, weight, targets = inputs(dtype, 37, 21, VOCAB_BLOCK + 9)
    plain = scored(hidden, weight, targets)
    changed = dict(hidden=hidden, weight=weight)
    changed[which] = laid_out(changed[which], how)
    assert same_bits(plain, scored(**changed, targets=targets))


@pytest.mark.parametrize("dtype", OWN)
def test_one_row_for_all(dtype):
    hidden, weight, targets = inputs(dtype, 1, 12, 60)
    x, _, dh, dw = scored(hidden.expand(5, 12), weight, targets.expand(5))
    expected = scored(hidden.repeat(5, 1), weight, targets.repeat(5))
    assert same_bits((x, dh, dw), (expected[0], *expected[2:]))


# ------------------------------------------------------------------------------------------------- values, errors


@pytest.mark.parametrize("dtype", OWN)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_stay_in_their_row(dtype, bad):
    """And are not hidden: a row of NaN gives NaN, its neighbours in the same vector keep their bits."""
    hidden, weight, targets = inputs(dtype, 20, 8, 200)
    plain = scored(hidden, weight, targets)
    hidden[3, 5] = bad
    x, h, dh, dw = scored(hidden, weight, targets)
    others = torch.arange(20) != 3
    assert x[3].isnan()
    assert dh[3].isnan().all()
    assert dw.isnan().any(1).all()
    assert same_bits((x[others], h[others], dh[others]), [value[others] for value in plain[:3]])


@pytest.mark.parametrize("dtype", OWN)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 89.0, -float("inf")])
def test_bad_bias(dtype, bad):
    """What stands under tokens that are not there takes no part, infinite logits included."""
    hidden, weight, targets = inputs(dtype, 20, 8, 200)
    bias = torch.zeros(200, dtype=dtype)
    bias[17] = bad
    bias.requires_grad_()
    targets[targets == 17] = 18
    x, _, dh, dw = scored(hidden, weight, targets, bias=bias)
    finite = bad in (89.0, -float("inf"))
    assert x.isfinite().all() == finite
    assert x.isnan().all() == (not finite)
    assert dh.isfinite().all() == finite
    assert dw.isfinite().all() == finite
    linear_logprob(hidden, weight, targets, bias=bias, grad_tol=0.0).logprob.sum().backward()
    assert bias.grad.isfinite().all() == finite


@pytest.mark.parametrize("dtype", OWN)
@pytest.mark.parametrize("tokens", [16, 20])
def test_an_infinite_weight_in_the_gradient_of_the_bias(dtype, tokens):
    """Of an entry that nothing is left of: 16 tokens are computed at a time, and those that are not there have states
    of zero, whose product with it is NaN."""
    hidden, weight, targets = inputs(dtype, tokens, 8, 60)
    hidden = hidden.abs() + 0.1
    weight[17, 2] = -float("inf")
    targets[targets == 17] = 18
    bias = torch.zeros(60, dtype=dtype, requires_grad=True)
    linear_logprob(hidden, weight, targets, bias=bias, grad_tol=0.0).logprob.sum().backward()
    assert bias.grad[17] == 0
    assert bias.grad.isfinite().all()


@pytest.mark.parametrize("dtype", OWN)
def test_denormal_inputs_and_gradients(dtype):
    """Denormal bfloat16 operands count as zero, which no sum of finite float32 products of them could tell; small
    gradients keep what their dtype holds of them."""
    hidden, weight, targets = inputs(dtype, 20, 8, 60)
    tiny = hidden.clone()
    tiny[hidden.abs() < 0.1] = torch.finfo(dtype).smallest_normal / 4
    zero = hidden.clone()
    zero[hidden.abs() < 0.1] = 0
    assert same_bits(scored(tiny, weight, targets)[:1], scored(zero, weight, targets)[:1])
    hidden.requires_grad_()
    x = linear_logprob(hidden, weight, targets, grad_tol=0.0).logprob
    (dh,) = torch.autograd.grad(x, hidden, torch.full((20,), 2.0**-127), retain_graph=True)
    (unit,) = torch.autograd.grad(x, hidden, torch.ones(20))
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (
        (dh.double() - unit.double() * 2.0**-127).abs() <= torch.finfo(dtype).eps * 2.0**-127 * unit.abs() + step
    ).all()


@pytest.mark.parametrize("dtype", OWN)
def test_weights_a_hundred_times_too_large(dtype):
    hidden, weight, targets = inputs(dtype, 40, 64, 700)
    weight = (weight.float() * 100).to(dtype)
    exact = reference.linear_logprob(hidden.double(), weight.double(), targets)[0]
    x = linear_logprob(hidden, weight, targets).logprob
    size = (hidden.double().abs() @ weight.double().abs().T).amax(1)
    assert ((x - exact).abs() <= 8 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize(("tokens", "depth", "vocab"), [(600, 896, 3000), (1100, 64, 2500)])
@pytest.mark.parametrize("dtype", OWN)
def test_pooled_errors_of_long_sums(dtype, tokens, depth, vocab):
    """Sums over a real depth, over many tokens and entries: a chain of additions as long has more rounding errors than
    a product that is cut."""
    book = ErrorBook()
    for seed in range(2):
        for head in (random_head(seed, tokens, depth, vocab, std=2.0), policy_head(seed, tokens, depth, vocab)):
            head = head | dict(targets=head["targets"].clamp(min=0), bias=None)
            head = {n: v.to(dtype).double() if n in ("hidden", "weight") else v for n, v in head.items()}
            book.add(*test_logprob.three_ways(head, dtype, grad_tol=0.0))
    book.check(dtype)


def test_what_would_be_a_write_out_of_bounds_is_refused():
    tile = Tile(torch.zeros(3, dtype=torch.int64), 0, LogitTransform(), None, None)
    running = OnlineSoftmax.empty(2, torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="another size"):
        cpp.online_softmax_(torch.zeros(3, 5), tile, running, False)
    running = OnlineSoftmax.empty(3, F64, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="another dtype"):
        cpp.online_softmax_(torch.zeros(3, 5), tile, running, False)
    assert (running.maximum == NO_MAX).all()


@pytest.mark.skipif(HERE < 3, reason="needs AVX512-BF16")
def test_a_small_workspace_is_refused(monkeypatch):
    hidden, weight, targets = inputs(torch.float32, 5, 8, 60)
    running = OnlineSoftmax.empty(5, torch.float32, torch.device("cpu"))
    arguments = (hidden, weight, Tile(targets, 0, LogitTransform(), None, None), running, False)
    with pytest.raises(RuntimeError, match="the workspace is too small"):
        cpp.fused_forward(*arguments, torch.empty(10, dtype=torch.uint8))
    monkeypatch.setenv("COVGRPO_CPU_ISA", "avx512")
    workspace = torch.empty(cpp.fused_forward_bytes(5, 60, 8, torch.float32), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="fused products need AVX512-BF16"):
        cpp.fused_forward(*arguments, workspace)


def test_a_build_that_is_asked_for_in_vain_is_an_error():
    """COVGRPO_BUILD_CPP by its values, without building: setup.py stops before it compiles."""
    root = os.path.dirname(os.path.dirname(__file__))

    def setup(value):
        return subprocess.run(
            [sys.executable, "setup.py", "--quiet", "--name"], cwd=root, capture_output=True, text=True,
            env=os.environ | dict(COVGRPO_BUILD_CPP=value),
        )  # fmt: skip

    result = setup("yes")
    assert result.returncode != 0
    assert "COVGRPO_BUILD_CPP must be 0, 1 or auto, got 'yes'" in result.stderr
    assert setup("0").stdout.strip() == "covgrpo-kernels"
