"""Numbers of `linear_logprob`: against float64 and eager PyTorch, at the edges of chunks, for sure tokens."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter import interpreted

from covgrpo_kernels import engines, kernels, linear_logprob, reference
from covgrpo_kernels.kernels.interface import VOCAB_BLOCK, Coefficients, LogitTransform, OnlineSoftmax, Tile
from covgrpo_kernels.testing import ErrorBook, bounds, check_draw, policy_head, random_head, rms, run_logprob

pytestmark = pytest.mark.usefixtures("backend")
DEVICE = torch.device("cpu")
F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "softcap": dict(softcap=4.0, logit_scale=1.5, temperature=1.3),
}


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 4 rows and one block: every test shape has several of both."""
    with engines.use((4, VOCAB_BLOCK)):
        yield


def three_ways(head: dict, dtype: torch.dtype, **options) -> tuple[dict, dict, dict]:
    """Ours, eager in the same dtype, and float64, from inputs that dtype can hold."""
    head = {n: v.to(dtype).double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in head.items()}
    ours = run_logprob(lambda *a, **k: linear_logprob(*a, entropy=True, **k), **head, dtype=dtype, **options)
    options.pop("grad_tol", None)
    return (
        ours,
        run_logprob(reference.linear_logprob, **head, dtype=dtype, **options),
        run_logprob(reference.linear_logprob, **head, dtype=F64, **options),
    )


@pytest.mark.thinned(4)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooled_errors(dtype, options):
    """The rule of the precision contract over 1,200 rows: random and policy-like ones, several chunks."""
    book = ErrorBook()
    vocab = 300 if interpreted() else 2500
    for seed in range(4):
        head = random_head(seed, 150, 48, vocab, std=2.0, bias=seed % 2 == 0)
        if seed % 2:
            head.pop("bias")
        book.add(*three_ways(head, dtype, grad_tol=0.0, **options))
    for seed in range(4):
        book.add(*three_ways(policy_head(seed, 150, 64, vocab), dtype, grad_tol=0.0, **options))
    book.check(dtype)


edges = st.sampled_from([1, 2, 3, VOCAB_BLOCK - 1, VOCAB_BLOCK, VOCAB_BLOCK + 1, 2 * VOCAB_BLOCK, 2 * VOCAB_BLOCK + 3])


@given(
    st.integers(0, 2**31), st.sampled_from([0, 1, 2, 3, 4, 5, 9]), st.sampled_from([0, 1, 3, 17]), edges,
    st.sampled_from(DTYPES), st.sampled_from([0.1, 1.0, 10.0, 100.0]), st.booleans(),
    st.sampled_from(list(OPTIONS.values())),
    st.sampled_from([(4, VOCAB_BLOCK), (1024, 2 * VOCAB_BLOCK), (1, VOCAB_BLOCK), (3, 2 * VOCAB_BLOCK)]),
)  # fmt: skip
def test_any_shape(seed, tokens, depth, vocab, dtype, std, bias, options, tile):
    """Shapes around the edges of tiles, empty ones included, flat to extreme logits."""
    head = random_head(seed, tokens, depth, vocab, std=std, bias=bias)
    head["hidden"] = head["hidden"].clamp(-100, 100)
    with engines.use(tile):
        ours, eager_, oracle = three_ways(head, dtype, grad_tol=0.0, **options)
    rounded = {n: v.to(dtype).double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in head.items()}
    bound = bounds(**rounded, dtype=dtype, **options)
    for name, exact in oracle.items():
        is_finite = exact.to(ours[name].dtype).isfinite()
        assert ours[name].isfinite()[is_finite].all(), name
        assert eager_[name].isfinite()[~ours[name].isfinite()].logical_not().all(), name
    finite = {n: oracle[n].isfinite() & eager_[n].isfinite() for n in oracle}
    check_draw(*({n: results[n].where(finite[n], 0) for n in oracle} for results in (ours, eager_, oracle)), bound)


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "options",
    [*OPTIONS.values(), dict(ignore_index=3), dict(temperature=torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=F64))],
    ids=[*OPTIONS, "ignore_index", "per token"],
)
@pytest.mark.parametrize("outputs", ["logprob", "entropy", "both"])
def test_gradcheck(outputs, options, small_tiles):
    head = random_head(0, 4, 3, 7, bias=True)
    targets = torch.tensor([0, 3, 6, 2])

    def f(hidden, weight, bias):
        x, h = linear_logprob(hidden, weight, targets, bias=bias, entropy=True, grad_tol=0.0, **options)
        return (x,) if outputs == "logprob" else (h,) if outputs == "entropy" else (x, h)

    inputs = [head[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    # The fast mode looks at one random combination of the derivatives, not at each.
    assert torch.autograd.gradcheck(f, inputs, fast_mode=interpreted())


@pytest.mark.parametrize("live", ["alternate", "all but the first", "all"])
def test_many_tiles_agree_with_the_reference(live, small_tiles):
    """Row blocks and vocabulary slices that don't divide anything, rows without a coefficient among them."""
    head = random_head(1, 15, 6, 3 * VOCAB_BLOCK + 77, std=3.0, bias=True)
    dead = {"alternate": slice(0, None, 2), "all but the first": slice(0, 1), "all": slice(0, 0)}[live]
    head["logprob_grad"][dead] = 0
    head["entropy_grad"][dead] = 0
    if live == "all":
        head["targets"].clamp_(min=0)
    ours, eager_, oracle = three_ways(head, F64, grad_tol=0.0, **OPTIONS["softcap"])
    check_draw(ours, eager_, oracle, bounds(**head, dtype=F64, **OPTIONS["softcap"]))
    ours, eager_, oracle = three_ways(head, torch.bfloat16, grad_tol=0.0, **OPTIONS["softcap"])
    for name, exact in oracle.items():
        assert rms(ours[name] - exact) <= 1.1 * rms(eager_[name] - exact), name


def folded(logits, targets, widths):
    logits, targets = logits.to(DEVICE), targets.to(DEVICE)
    running = OnlineSoftmax.empty(len(logits), logits.dtype, DEVICE)
    first = 0
    for width in widths:
        products = logits[:, first : first + width].clone()
        tile = Tile(targets, first, LogitTransform(), None, None)
        kernels.select(DEVICE).online_softmax_(products, tile, running, True)
        first += width
    assert first == logits.shape[1]
    return running.stats().packed.cpu()


@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_same_logits_same_bits_however_they_are_cut(seed, rows, blocks, rest):
    """Given equal logits, any chunking in multiples of VOCAB_BLOCK gives equal bits."""
    g = torch.Generator().manual_seed(seed)
    vocab = sum(blocks) * VOCAB_BLOCK + rest
    logits = torch.randn(rows, vocab, generator=g) * 5
    targets = torch.randint(0, vocab, (rows,), generator=g)
    tail = [rest] if rest else []
    one_by_one = folded(logits, targets, [VOCAB_BLOCK] * sum(blocks) + tail)
    assert torch.equal(one_by_one, folded(logits, targets, [b * VOCAB_BLOCK for b in blocks] + tail))
    assert torch.equal(one_by_one, folded(logits, targets, [sum(blocks) * VOCAB_BLOCK, *tail]))
    each = torch.cat(
        [
            folded(r, t, [sum(blocks) * VOCAB_BLOCK, *tail])
            for r, t in zip(logits.split(1), targets.split(1), strict=True)
        ],
        1,
    )
    assert torch.equal(one_by_one, each)


@pytest.mark.parametrize("options", [{}, dict(entropy=True), dict(softcap=4.0, scale=1.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradient_of_a_tile_in_the_dtype_of_its_product(dtype, options, backend):
    """Written to another tile, or to the same one, and rounded once: at most half an epsilon more than in float64.
    (The interpreter cuts bfloat16 off instead of rounding it.)"""
    g = torch.Generator().manual_seed(0)
    transform = LogitTransform(options.get("scale", 1.0), options.get("softcap"))
    products, bias = torch.randn(37, 700, generator=g) * 3, torch.randn(700, generator=g)
    temperature, targets = torch.rand(37, generator=g) + 0.5, torch.randint(0, 1400, (37,), generator=g)
    coefficients = [torch.randn(37, generator=g), torch.randn(37, generator=g) if options.get("entropy") else None]

    def gradient(accumulator, out_dtype):
        def there(x):
            return None if x is None else x.to(DEVICE, accumulator)

        tile = Tile(targets.to(DEVICE), 300, transform, there(bias), there(temperature))
        running = OnlineSoftmax.empty(37, accumulator, torch.device(DEVICE))
        ops = kernels.select(DEVICE)
        ops.online_softmax_(there(products).clone(), tile, running, True)
        stats = running.stats()
        stats.packed[0].nan_to_num_(nan=-3.0)  # of targets elsewhere
        z = there(products).clone()
        out = z if out_dtype == accumulator else torch.empty_like(z, dtype=out_dtype)
        ops.dlogits(z, tile, Coefficients.of(stats, *(there(c) for c in coefficients)), out)
        return out.double().cpu()

    exact, inputs = gradient(F64, F64), gradient(torch.float32, torch.float32)
    half = torch.finfo(dtype).eps / (1 if backend == "triton" and dtype == torch.bfloat16 else 2)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    off = (inputs - exact).abs()
    assert rms(off) <= 64 * torch.finfo(torch.float32).eps * rms(exact)
    assert ((gradient(torch.float32, dtype) - inputs).abs() <= half * inputs.abs() + smallest).all()


def exponent_roundings(gap):
    """A GPU's float32 exponential rounds its exponent, so that exp(-gap) is off by half an epsilon for each of gap."""
    return gap if torch.device(DEVICE).type == "cuda" else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("position", [0, VOCAB_BLOCK - 1, VOCAB_BLOCK, 2 * VOCAB_BLOCK + 6])
@pytest.mark.parametrize("gap", [0.0, 1.0, 10.0, 17.0, 25.0, 60.0, 85.0])
def test_sure_tokens_keep_their_digits(gap, position, dtype):
    """One logit stands ``gap`` over equal others: -log1p(s) and the entropy have a closed form, and neither may
    cancel (lse - sum p z in float32 is all noise below an entropy of 1e-5)."""
    vocab = 2 * VOCAB_BLOCK + 7
    logits = torch.zeros(2, vocab, dtype=dtype)
    logits[:, position] = gap
    logits += 30.0
    other = (position + 1) % vocab
    x, h, _, _ = folded(logits, torch.tensor([position, other]), [2 * VOCAB_BLOCK, 7])
    s = (vocab - 1) * math.exp(-gap)
    entropy = math.log1p(s) + s * gap / (1 + s)
    few = (12 + exponent_roundings(gap)) * torch.finfo(dtype).eps
    assert x[0].item() == pytest.approx(-math.log1p(s), rel=few, abs=0)
    assert x[1].item() == pytest.approx(-gap - math.log1p(s), rel=few, abs=0)
    assert h[0].item() == pytest.approx(entropy, rel=few, abs=0)
    assert -torch.expm1(x[0]).item() == pytest.approx(s / (1 + s), rel=few, abs=0)


def test_gradient_of_sure_tokens_keeps_its_digits():
    """1 - p of the target's own entry comes from the log-prob, not from 1 minus an exponential."""
    gap, vocab = 20.0, 50
    weight = torch.eye(vocab)
    hidden = torch.zeros(1, vocab)
    hidden[0, 7] = gap
    hidden.requires_grad_()
    linear_logprob(hidden, weight, torch.tensor([7]), grad_tol=0.0).logprob.sum().backward()
    s = (vocab - 1) * math.exp(-gap)
    few = (8 + exponent_roundings(gap)) * torch.finfo(torch.float32).eps
    assert hidden.grad[0, 7].item() == pytest.approx(s / (1 + s), rel=few, abs=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_rows_of_dlogits_sum_to_zero(dtype, options, small_tiles):
    """With the identity as head, dhidden is dL/dz; before softcap's slope its rows sum to zero."""
    vocab, options = VOCAB_BLOCK + 40, {n: v for n, v in options.items() if n != "softcap"}
    hidden = (torch.randn(9, vocab, dtype=dtype) * 6).requires_grad_()
    x, h = linear_logprob(
        hidden, torch.eye(vocab, dtype=dtype), torch.arange(9) * 100, entropy=True, grad_tol=0.0, **options
    )
    (x * torch.randn(9, dtype=dtype) + h * torch.randn(9, dtype=dtype)).sum().backward()
    few = 30 * torch.finfo(dtype).eps
    assert (hidden.grad.sum(1).abs() <= few * hidden.grad.abs().sum(1)).all()


@given(st.integers(0, 2**31), st.sampled_from(DTYPES), st.sampled_from([7, VOCAB_BLOCK + 5]))
def test_vocabulary_order_is_nothing(seed, dtype, vocab):
    head = random_head(seed, 6, 8, vocab, std=4.0, bias=True)
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(vocab))
    targets = head["targets"]
    permuted = head | dict(
        weight=head["weight"][order],
        bias=head["bias"][order],
        targets=targets.where(targets < 0, place[targets.clamp(min=0)]),
    )
    ours, _, _ = three_ways(head, dtype, grad_tol=0.0)
    other, eager_, oracle = three_ways(permuted, dtype, grad_tol=0.0)
    ours |= dict(dweight=ours["dweight"][order], dbias=ours["dbias"][order])
    check_draw(ours, eager_, oracle, bounds(**permuted, dtype=dtype))
    check_draw(other, eager_, oracle, bounds(**permuted, dtype=dtype))


@given(st.integers(0, 2**31), st.sampled_from([1, 3, 16, 33]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_row_alone_is_the_row_in_its_batch(seed, tokens, dtype):
    """Up to the rounding of its matrix product, whose blocking may depend on the batch."""
    head = random_head(seed, tokens, 64, 300, std=3.0)
    head["targets"].clamp_(min=0)
    hidden, weight = head["hidden"].to(dtype), head["weight"].to(dtype)
    rows = sorted({0, tokens // 2, tokens - 1})
    together = linear_logprob(hidden, weight, head["targets"]).logprob[rows]
    alone = torch.cat([linear_logprob(hidden[[i]], weight, head["targets"][[i]]).logprob for i in rows])
    size = (hidden[rows].double().abs() @ weight.double().abs().T).amax(1)
    assert ((together - alone).abs() <= 4 * torch.finfo(torch.float32).eps * (math.sqrt(64) * size + 8)).all()


def test_suppressed_entries():
    """-inf in the bias takes an entry out: of blocks in part or whole, without a NaN; a row of nothing is NaN. The
    numbers are those of a head of the other entries, by the rule for 1,024 rows."""
    vocab, allowed = 3 * VOCAB_BLOCK + 5, torch.tensor([3, 2 * VOCAB_BLOCK + 1, 2 * VOCAB_BLOCK + 9])
    places = torch.arange(1024) % 3
    head = random_head(4, 1024, 8, vocab, bias=True)
    head = {n: v.float().double() if v.is_floating_point() else v for n, v in head.items()}
    left = head | dict(weight=head["weight"][allowed], bias=head["bias"][allowed], targets=places)
    suppressed = torch.full((vocab,), -torch.inf, dtype=F64)
    suppressed[allowed] = left["bias"]
    whole = head | dict(bias=suppressed, targets=allowed[places])
    ours = run_logprob(linear_logprob, **whole, dtype=torch.float32, entropy=True, grad_tol=0.0)
    eager_, oracle = (run_logprob(reference.linear_logprob, **left, dtype=dtype) for dtype in (torch.float32, F64))
    for name in ("dweight", "dbias"):
        gradient = ours[name].reshape(vocab, -1)
        assert gradient.any(1).nonzero().squeeze(1).tolist() == allowed.tolist()
        ours[name] = ours[name][allowed]
    book = ErrorBook()
    book.add(ours, eager_, {n: oracle[n] for n in ("logprob", "entropy", "dhidden")})
    book.check(torch.float32)
    check_draw(ours, eager_, oracle, bounds(**left, dtype=torch.float32))
    nothing = torch.full((vocab,), -torch.inf)
    for dtype in (torch.float32, torch.bfloat16, F64):
        rows = (head["hidden"][:4].to(dtype), head["weight"].to(dtype), allowed[places[:4]])
        x, h = linear_logprob(*rows, bias=nothing.to(dtype), entropy=True)
        assert x.isnan().all()
        assert h.isnan().all()


def test_equal_logits_are_uniform():
    """Every entry is a maximum: the ties but one belong to the sum, in every block."""
    vocab = 2 * VOCAB_BLOCK + 11
    x, h = linear_logprob(
        torch.zeros(3, 4), torch.randn(vocab, 4), torch.tensor([0, VOCAB_BLOCK, vocab - 1]), entropy=True
    )
    few = 3 * torch.finfo(torch.float32).eps
    assert x.tolist() == pytest.approx([-math.log(vocab)] * 3, rel=few, abs=0)
    assert h.tolist() == pytest.approx([math.log(vocab)] * 3, rel=few, abs=0)


def test_small_coefficients_survive_float16():
    """A loss averaged over 1e6 tokens has entries of dZ below float16's smallest. Where the products take float16
    operands (a GPU; here that is played), dZ must not lose them when it is rounded."""

    class Float16Operands(engines.Chunked):
        def operand_dtype(self, rows):
            return rows.dtype

        def multiply_(self, a, b, out, *, add=False):
            out.copy_(a.float() @ b.float() + (out if add else 0))

    head = random_head(3, 40, 16, 300)
    head |= dict(logprob_grad=head["logprob_grad"] * 1e-7, entropy_grad=None)
    head["hidden"] = head["hidden"] * 100
    with engines.use(Float16Operands(kernels.select(torch.device("cpu")))):
        ours, _, oracle = three_ways(head, torch.float16, grad_tol=0.0)
    error = rms(ours["dweight"].double() - oracle["dweight"])
    assert error <= torch.finfo(torch.float16).eps * rms(oracle["dweight"]) + 2.0**-25


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e30])
def test_coefficients_of_any_size(size):
    """The power of two that scales coefficients has to be one that float32 holds, both ways."""
    hidden = torch.randn(5, 8, requires_grad=True)
    x = linear_logprob(hidden, torch.randn(30, 8), torch.arange(5), grad_tol=0.0).logprob
    (unit,) = torch.autograd.grad(x, hidden, torch.ones(5), retain_graph=True)
    (scaled,) = torch.autograd.grad(x, hidden, torch.full((5,), size))
    smallest = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    coefficient, few = torch.tensor(size).double(), 8 * torch.finfo(torch.float32).eps
    assert ((scaled - unit * coefficient).abs() <= few * coefficient * unit.abs().max() + smallest).all()


def test_offsets_beyond_32_bits():
    """Rows of a weight that start more than 2^31 entries into its storage; most of that is never touched."""
    depth, stride = 8, 1 << 17
    vocab = (1 << 14) + 3 * VOCAB_BLOCK
    weight = torch.from_numpy(np.zeros((vocab, stride), dtype=np.float32))[:, :depth]
    last = vocab - 2
    assert last * weight.stride(0) > 2**31
    weight[last] = 1.0
    hidden = torch.full((1, depth), 1.0, requires_grad=True)
    x = linear_logprob(hidden, weight, torch.tensor([last]), grad_tol=0.0).logprob
    s = (vocab - 1) * math.exp(-depth)
    few = 12 * torch.finfo(torch.float32).eps
    assert x.item() == pytest.approx(-math.log1p(s), rel=few, abs=0)
    x.backward()
    assert hidden.grad[0].tolist() == pytest.approx([s / (1 + s)] * depth, rel=few, abs=0)
