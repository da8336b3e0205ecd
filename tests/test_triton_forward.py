"""The streaming forward of four kernels: against float64 and eager PyTorch, at the edges of its blocks, for sure
tokens, suppressed entries and ties; the same bits whichever rows share a batch, however rows are cut into chunks and
however blocks are loaded; peaks that are never below the logits.

Bits are compared on whole numbers, whose products and sums are exact: the interpreter multiplies with NumPy, which
does not promise the same bits for a row in matrices of different shapes.
"""

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from covgrpo_kernels import reference
from covgrpo_kernels.config import IGNORE_INDEX
from covgrpo_kernels.kernels import interface
from covgrpo_kernels.testing import ErrorBook, bounds, check_draw, policy_head, random_head, rms

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")
fused = importlib.import_module("covgrpo_kernels.kernels.triton.forward")
selection = importlib.import_module("covgrpo_kernels.kernels.triton.select_rows")
numerics = importlib.import_module("covgrpo_kernels.kernels.triton.numerics")
configs = importlib.import_module("covgrpo_kernels.kernels.triton.configs")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On a GPU `-m gpu` chooses all of these.
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXACT = [torch.float32] if DEVICE.type == "cuda" else [torch.float32, F64]
OPTIONS = {
    "plain": {},
    "temperature": dict(temperature="rows"),
    "softcap": dict(softcap=4.0, logit_scale=1.5),
    "all": dict(softcap=4.0, logit_scale=1.5, temperature="rows"),
}
SMALL, LARGE = (16, 32, 16), (256, 256, 64)


def blocks(patch: pytest.MonkeyPatch, sizes: tuple[int, int, int], slices: int = 2, peak_width: int = 0) -> None:
    """Blocks for the interpreter; compiled kernels keep theirs."""
    if DEVICE.type == "cpu":
        cut = configs._blocks(*sizes, 1, 1, slices, True)
        patch.setitem(configs.FORWARD, "interpreter", {itemsize: {0: cut} for itemsize in (2, 4, 8)})
        patch.setattr(interface, "PEAK_WIDTH", peak_width or sizes[1])


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        blocks(patch, SMALL)
        yield


@contextmanager
def split(splits: int | None) -> Iterator[None]:
    """Into that many pieces of the vocabulary; None leaves the choice."""
    with pytest.MonkeyPatch.context() as patch:
        if splits is not None:
            patch.setattr(
                fused, "splits_of", lambda vocab, _: max(min(splits, triton.cdiv(vocab, interface.PEAK_WIDTH)), 1)
            )
        yield


class Forward(NamedTuple):
    logprob: Tensor
    entropy: Tensor
    maximum: Tensor
    log_sum: Tensor
    rows: Tensor
    place: Tensor
    peaks: Tensor | None

    @property
    def stats(self) -> Tensor:
        return torch.stack(self[:4])


def forward(hidden, weight, targets, bias=None, temperature=None, logit_scale=1.0, softcap=None, **options) -> Forward:
    inputs = (None if x is None else x.to(DEVICE) for x in (hidden, weight, bias, targets, temperature))
    options = dict(entropy=True) | options
    stats, rows, place, count, peaks = fused.forward(*inputs, scale=logit_scale, softcap=softcap, **options)
    n = count.item()
    return Forward(*stats.cpu(), rows[:n].cpu(), place.cpu(), None if peaks is None else peaks[:, :n].cpu())


def three_ways(head: dict, dtype: torch.dtype, options: dict, splits: int | None = None) -> tuple[dict, dict, dict]:
    """Ours, eager in the same dtype, and float64, from inputs that dtype can hold."""
    targets = head["targets"]
    if "temperature" in options:
        options = options | dict(temperature=torch.linspace(0.5, 2.0, len(targets)))
    inputs = {n: head[n].to(dtype) for n in ("hidden", "weight", "bias") if head.get(n) is not None}
    with split(splits):
        results = forward(**inputs, targets=targets, **options)
    ours = dict(logprob=results.logprob, entropy=results.entropy)
    names = ("logprob", "entropy")
    eager = reference.linear_logprob(**inputs, targets=targets, **options)
    exact = reference.linear_logprob(**{n: x.double() for n, x in inputs.items()}, targets=targets, **options)
    return ours, dict(zip(names, eager, strict=True)), dict(zip(names, exact, strict=True))


def close(head: dict, dtype: torch.dtype, options: dict, splits: int | None = None) -> None:
    """The single-draw rule; in float64, where eager is the oracle, as near as it is itself: entropies from
    lse - sum p z are off by the rounding of the logits."""
    ours, eager, exact = three_ways(head, dtype, options, splits)
    if dtype == F64:
        largest = (head["hidden"].norm(dim=1).max() * head["weight"].norm(dim=1).max()).item()
        for name, value in exact.items():
            assert rms(ours[name] - value) <= 1e-13 * (1 + largest), name
        return
    rounded = {n: x.to(dtype).double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in head.items()}
    if "temperature" in options:
        options = options | dict(temperature=torch.linspace(0.5, 2.0, len(head["targets"])).double())
    check_draw(ours, eager, exact, bounds(**rounded, dtype=dtype, **options))


def whole_numbers(seed: int, tokens: int, depth: int, vocab: int, dtype: torch.dtype = torch.float32) -> dict:
    """A head of small whole numbers, so that every dtype holds them and every order of a sum gives the same."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=g).to(dtype)

    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < 0.2] = IGNORE_INDEX
    return dict(hidden=draw(tokens, depth), weight=draw(vocab, depth), bias=draw(vocab), targets=targets)


def logits(hidden, weight, bias=None, temperature=None, logit_scale=1.0, softcap=None) -> Tensor:
    """All of them, in float64."""
    z = hidden.double() @ weight.double().T * logit_scale
    z = z if bias is None else z + bias.double() * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z if temperature is None else z / temperature.double().unsqueeze(1)


# ------------------------------------------------------------------------------------------------ which rows


@pytest.mark.parametrize("blocks_", [None, dict(B_N=8, B_C=16), dict(B_N=16, B_C=8)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 40, 75])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_selected_rows(blocks_, tokens, share, monkeypatch):
    if blocks_ is not None:
        monkeypatch.setitem(configs.CONFIGS[configs.architecture(DEVICE)], "select", blocks_ | dict(num_warps=1))
    valid = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens)) < share
    targets = torch.arange(tokens).where(valid, -7)
    rows, place, count = (x.cpu() for x in selection.select_rows(targets.to(DEVICE), -7))
    expected = valid.nonzero().squeeze(1)
    assert rows.dtype == place.dtype == count.dtype == torch.int32
    assert count.tolist() == [len(expected)]
    assert rows[: len(expected)].tolist() == expected.tolist()
    assert place.tolist() == (valid.cumsum(0) - 1).where(valid, -1).tolist()


@pytest.mark.parametrize("layout", ["contiguous", "columns", "transposed", "one row", "every other"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gathered_rows(layout, dtype):
    """Of any strides; columns that fill up 16 bytes and rows without a token are zero."""
    tokens, depth = 20, 21
    values = torch.randn(2 * tokens, 2 * depth, device=DEVICE).to(dtype)
    hidden = {
        "contiguous": values[:tokens, :depth].contiguous(),
        "columns": values[:tokens, 3 : 3 + depth],
        "transposed": values[:depth, :tokens].T,
        "one row": values[:1, :depth].expand(tokens, depth),
        "every other": values[::2, ::2],
    }[layout]
    rows = torch.tensor([1, 2, 5, 7, 8, 13, 19, 999999], dtype=torch.int32, device=DEVICE)
    count = torch.tensor([7], dtype=torch.int32, device=DEVICE)
    padded = selection.padded_depth(depth, dtype.itemsize)
    assert padded * dtype.itemsize % 16 == 0
    assert depth <= padded < depth + 16
    for first, room in ((0, 7), (0, 11), (2, 3), (5, 4), (7, 3)):
        out = torch.full((room, padded), torch.nan, dtype=dtype, device=DEVICE)
        selection.gather_rows(hidden, rows, count, first, out)
        expected = torch.zeros_like(out)
        there = rows[first : min(first + room, 7)].long()
        expected[: len(there), :depth] = hidden[there]
        assert torch.equal(out, expected), (first, room)


def test_tokens_that_are_not_scored():
    """Are zeros, whatever they contain, and change no bit of the others."""
    head = whole_numbers(0, 40, 24, 100)
    clean = forward(**head)
    ignored = head["targets"] == IGNORE_INDEX
    assert 0 < ignored.sum() < 40
    assert clean.stats[:, ignored].count_nonzero() == 0
    assert clean.rows.tolist() == (~ignored).nonzero().squeeze(1).tolist()
    bad = head["hidden"].clone()
    bad[ignored] = torch.nan
    assert torch.equal(forward(**head | dict(hidden=bad)).stats, clean.stats)
    none = forward(**head | dict(targets=torch.full((40,), IGNORE_INDEX)))
    assert none.stats.count_nonzero() == 0
    other = forward(**head | dict(targets=head["targets"].masked_fill(ignored, 3)), ignore_index=3)
    assert other.place[head["targets"] == 3].eq(-1).all()
    assert other.stats[:, ~ignored & (head["targets"] != 3)].equal(clean.stats[:, ~ignored & (head["targets"] != 3)])


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooled_errors(dtype, options, monkeypatch):
    """The rule of the precision contract over 1,024 rows: random and policy-like ones."""
    blocks(monkeypatch, LARGE)
    book = ErrorBook()
    for seed in range(2):
        book.add(*three_ways(random_head(seed, 256, 64, 500, std=2.0, bias=seed == 0), dtype, OPTIONS[options]))
        book.add(*three_ways(policy_head(seed, 256, 64, 500), dtype, OPTIONS[options]))
    book.check(dtype)


@given(
    st.integers(0, 2**31), st.sampled_from([1, 2, 15, 16, 17, 33]), st.sampled_from([1, 8, 15, 16, 17, 40]),
    st.sampled_from([1, 2, 15, 16, 17, 32, 33, 70, 129]), st.sampled_from([*DTYPES, *EXACT]),
    st.sampled_from([0.1, 1.0, 10.0, 100.0]), st.booleans(), st.sampled_from(list(OPTIONS.values())),
    st.sampled_from([None, 1, 2, 3]),
)  # fmt: skip
def test_any_shape(seed, tokens, depth, vocab, dtype, std, bias, options, splits):
    """Shapes around the edges of blocks, whose rows descriptors can and can't describe, flat to extreme logits."""
    close(random_head(seed, tokens, depth, vocab, std=std, bias=bias), dtype, options, splits)


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "splits"), [(EXACT[-1], 1), (torch.bfloat16, 2), (EXACT[-1], 3), (torch.bfloat16, 100)], ids=str
)
def test_any_splits_and_slices(dtype, splits, slices, monkeypatch):
    blocks(monkeypatch, SMALL, slices)
    close(random_head(1, 19, 24, 205, std=3.0, bias=True), dtype, OPTIONS["all"], splits)


@triton.jit
def log1p_kernel(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, numerics.log1p(tl.load(x + i)))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_logarithm(dtype):
    """log1p to a few ulp, from where it is its argument to a whole vocabulary of equal logits."""
    x = torch.cat([torch.zeros(1), torch.logspace(-37, 6, 4095)]).to(DEVICE, dtype)
    y = torch.empty_like(x)
    log1p_kernel[(1,)](x, y, B=4096)
    exact = torch.log1p(x.double())
    assert ((y - exact).abs() <= 3 * torch.finfo(dtype).eps * exact).all()


GAPS = [0.0, 1.0, 10.0, 17.0, 25.0, 60.0, 85.0]


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("position", [0, 15, 16, 32, 69])
def test_sure_tokens_keep_their_digits(position, dtype):
    """One logit stands ``gap`` over equal others: -log1p(s) and the entropy have a closed form, and neither may
    cancel (lse - sum p z in float32 is all noise below an entropy of 1e-5)."""
    vocab, other = 70, (position + 1) % 70
    weight = torch.tensor([[1.0, 0.0]], dtype=dtype).repeat(vocab, 1)
    weight[position, 1] = 1.0
    hidden = torch.tensor([[30.0, gap] for gap in GAPS], dtype=dtype)
    targets = torch.tensor([position, other]).repeat_interleave(len(GAPS))
    results = forward(hidden.repeat(2, 1), weight, targets)
    x, h = results.logprob, results.entropy
    for i, gap in enumerate(GAPS):
        # A GPU's exponential of x takes x log2(e) rounded: off by an eps for each unit of x.
        few = (12 + (gap if DEVICE.type == "cuda" else 0)) * torch.finfo(dtype).eps
        s = (vocab - 1) * math.exp(-gap)
        entropy = math.log1p(s) + s * gap / (1 + s)
        assert x[i].item() == pytest.approx(-math.log1p(s), rel=few, abs=0)
        assert x[len(GAPS) + i].item() == pytest.approx(-gap - math.log1p(s), rel=few, abs=0)
        assert h[i].item() == pytest.approx(entropy, rel=few, abs=0)
        assert results.log_sum[i].item() == pytest.approx(math.log1p(s), rel=few, abs=0)
        assert results.maximum[i].item() == 30 + gap
        assert -torch.expm1(x[i]).item() == pytest.approx(s / (1 + s), rel=few, abs=0)


@pytest.mark.parametrize("vocab", [1, 15, 16, 33, 100])
def test_equal_logits_are_uniform(vocab):
    """Every entry is a maximum, in every slice, tile and split: all but one belong to the sum."""
    results = forward(torch.full((2, 1), 2.0), torch.ones(vocab, 1), torch.tensor([0, vocab - 1]))
    assert results.maximum.tolist() == [2.0, 2.0]
    for value in (-results.logprob, results.entropy, results.log_sum):
        assert value.tolist() == [pytest.approx(math.log(vocab), rel=1e-6, abs=0)] * 2


@pytest.mark.parametrize("allowed", [[3], [40, 41], [3, 129, 131], [0, 16, 32, 63, 64, 149]], ids=str)
def test_suppressed_entries(allowed):
    """-inf in the bias takes an entry out: of slices, tiles and splits in part or whole, without a NaN."""
    head = random_head(4, 5, 8, 150)
    hidden, weight, columns = head["hidden"].to(EXACT[-1]), head["weight"].to(EXACT[-1]), torch.tensor(allowed)
    bias = torch.full((150,), -torch.inf, dtype=hidden.dtype)
    bias[allowed] = 0.5
    place = torch.arange(5) % len(allowed)
    results = forward(hidden, weight, columns[place], bias)
    assert results.stats.isfinite().all()
    logprob, entropy = reference.linear_logprob(hidden.double(), weight[allowed].double(), place)
    few = 100 * torch.finfo(hidden.dtype).eps
    assert rms(results.logprob - logprob) <= few * (1 + rms(logprob))
    assert rms(results.entropy - entropy) <= few * (1 + rms(entropy))


def test_rows_without_a_distribution():
    """No finite logit, or one that is NaN: that row's numbers are NaN, and no other's."""
    head = random_head(5, 4, 8, 90)
    hidden, weight, targets = head["hidden"].float(), head["weight"].float(), torch.arange(4)
    nothing = forward(hidden, weight, targets, torch.full((90,), -torch.inf))
    assert nothing.logprob.isnan().all()
    assert nothing.entropy.isnan().all()
    assert nothing.maximum.isnan().all()
    healthy = forward(hidden, weight, targets)
    for value in (torch.nan, torch.inf):
        broken = hidden.clone()
        broken[2, 3] = value
        results = forward(broken, weight, targets)
        others = [0, 1, 3]
        assert results.logprob[2].isnan()
        assert results.entropy[2].isnan()
        assert torch.equal(results.stats[:, others], healthy.stats[:, others])


def test_targets_outside_of_the_vocabulary():
    """Give NaN, also where the last tile overhangs; the other statistics don't depend on them."""
    head = random_head(6, 6, 8, 70)
    hidden, weight = head["hidden"].float(), head["weight"].float()
    results = forward(hidden, weight, torch.tensor([-2, -1, 70, 80, 2**40, 69]))
    assert results.logprob.isnan().tolist() == [True] * 5 + [False]
    assert torch.equal(results.stats[1:], forward(hidden, weight, torch.arange(6)).stats[1:])


def test_without_entropy():
    """The other statistics are the same, to the bit."""
    head = random_head(7, 20, 8, 90, std=3.0)
    inputs = head["hidden"].float(), head["weight"].float(), head["targets"].clamp(min=0)
    with_, without = forward(*inputs), forward(*inputs, entropy=False)
    assert all(torch.equal(with_.stats[i], without.stats[i]) for i in (0, 2, 3))
    assert (with_.entropy > with_.log_sum).all()


# ------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize(("depth", "dtype"), [(40, torch.bfloat16), (43, torch.float16), (43, EXACT[-1])], ids=str)
def test_a_row_alone_is_the_row_in_its_batch(depth, dtype):
    """To the bit, from run to run, in any order, beside rows that are not scored."""
    head = whole_numbers(3, 38, depth, 100, dtype)
    head["targets"] = head["targets"].clamp(min=0)
    temperature = torch.linspace(0.5, 2.0, 38)

    def rows(index, targets=head["targets"]) -> Tensor:
        return forward(
            head["hidden"][index], head["weight"], targets[index], head["bias"], temperature[index], softcap=5.0
        ).stats

    together = rows(slice(None))
    assert together.isfinite().all()
    assert torch.equal(together, rows(slice(None)))
    for i in (7, 16, 37):
        assert torch.equal(together[:, i : i + 1], rows(slice(i, i + 1)))
    order = torch.randperm(38, generator=torch.Generator().manual_seed(0))
    assert torch.equal(together[:, order], rows(order))
    others_ignored = head["targets"].where(torch.arange(38) % 3 == 1, IGNORE_INDEX)
    assert torch.equal(together[:, 1::3], rows(slice(None), others_ignored)[:, 1::3])


@pytest.mark.parametrize("room", [7, 16])
def test_chunks_change_no_bit(room, monkeypatch):
    """Neither of the statistics nor of the peaks; the last chunks have no scored row at all."""
    head = whole_numbers(4, 41, 24, 150)
    head["targets"][8:16] = IGNORE_INDEX
    whole = forward(**head, peaks=True)
    monkeypatch.setattr(fused, "chunk_rows", lambda *_: room)
    cut = forward(**head, peaks=True)
    assert torch.equal(whole.stats, cut.stats)
    assert torch.equal(whole.peaks.float(), cut.peaks.float())


def test_rows_of_a_chunk(monkeypatch):
    monkeypatch.setattr(fused, "WORKSPACE_BYTES", 100 << 20)
    unit = 2048
    for tokens in (0, 1, 100, 5000, 8192, 16384, 131072, 1_000_000):
        for bytes_of_a_row in (100, 4000, 10_000, 30_000):
            room = fused.chunk_rows(tokens, bytes_of_a_row)
            assert room * bytes_of_a_row <= max(100 << 20, unit * bytes_of_a_row)
            chunks = -(-tokens // room) if room else 0
            if room < tokens:
                most = max((100 << 20) // bytes_of_a_row // unit, 1) * unit
                assert room % unit == 0
                assert room - tokens / chunks < unit, "chunks are uneven"
                assert (chunks - 1) * most < tokens, "one chunk too many"
            assert fused.launches(tokens, room) == 1 + 3 * chunks


@pytest.mark.parametrize("dtype", [torch.bfloat16, EXACT[-1]], ids=str)
def test_descriptors_and_pointers_load_the_same(dtype):
    """To the bit, with blocks that overhang in all directions."""
    head = whole_numbers(2, 37, 40, 77, dtype)
    odd = [torch.nn.functional.pad(head[n].to(DEVICE), (1, 0))[:, 1:] for n in ("hidden", "weight")]
    assert fused.describable(head["weight"])
    assert not fused.describable(odd[1])
    inputs = (x.to(DEVICE) for x in (head["bias"], head["targets"]))
    pointed, *_ = fused.forward(*odd, *inputs, None, scale=1.0, softcap=None, entropy=True)
    assert torch.equal(forward(**head).stats, pointed.cpu())


# ------------------------------------------------------------------------------------------------------ peaks


def rounded_up(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not less than x, by search among the neighbours of the nearest one."""
    near = x.to(torch.bfloat16)
    neighbours = torch.stack([torch.nextafter(near, torch.full_like(near, to)) for to in (-torch.inf, torch.inf)])
    candidates = torch.cat([neighbours, near.unsqueeze(0)]).double()
    return candidates.where(candidates >= x.double(), torch.inf).amin(0)


@triton.jit
def round_up_kernel(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, numerics.round_up_to_bfloat16(tl.load(x + i)))


def test_rounding_up():
    """Never below, and the nearest that is not; of every kind of number."""

    def of(x: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=torch.bfloat16, device=DEVICE)
        round_up_kernel[(1,)](x.to(DEVICE), y, B=len(x))
        return y.cpu()

    tiny, large = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    special = [0.0, 1.0, 1.0 + 2**-7, 1.0 + 2**-23, 1.0 + 2**-8, 255.999, 3.389e38, large, tiny, 1e-40, 1e-45]
    numbers = torch.tensor([*special, *(-x for x in special), torch.inf, -torch.inf])
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([numbers, nans])
    g = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (8192 - len(values),), generator=g).to(torch.int32).view(torch.float32)
    x = torch.cat([values, anything])
    y = of(x).double()
    nan = x.isnan()
    assert nans.isnan().all()
    assert y.isnan().equal(nan)
    assert (y[~nan] >= x[~nan].double()).all()
    assert y[~nan].equal(rounded_up(x[~nan]))
    for dtype in EXACT[1:]:
        x = (torch.randn(4096, generator=g, dtype=F64) * 100).to(dtype)
        y = of(x).double()
        assert (y >= x).all()
        assert ((y - x) <= 2**-7 * x.abs()).all()


@pytest.mark.parametrize(
    ("width", "tile", "splits"), [(32, 32, 100), (64, 32, 1), (64, 32, 2), (64, 16, 100), (128, 32, 2)]
)
def test_peaks(width, tile, splits, monkeypatch):
    """The largest logit of every scored row and tile, rounded up, whatever the width of the product's own tiles; by
    place, and the last tile overhangs."""
    blocks(monkeypatch, (16, tile, 16), 2, width)
    width = interface.PEAK_WIDTH
    head = whole_numbers(5, 37, 24, 2 * width + 21)
    head["bias"] *= 1001  # beyond the eight bits of bfloat16
    with split(splits):
        results, without = forward(**head, peaks=True), forward(**head)
    z = head["hidden"] @ head["weight"].T + head["bias"]
    assert (z > 0).any()
    assert (z < 0).any()
    z = torch.nn.functional.pad(z[results.rows.long()], (0, width - 21), value=-torch.inf)
    expected = z.view(len(z), 3, width).amax(2).T
    assert torch.equal(results.peaks.double(), rounded_up(expected))
    assert torch.equal(results.stats, without.stats), "peaks change no statistics"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, EXACT[-1]], ids=str)
def test_peaks_are_of_the_logits(dtype, options):
    """After scale, softcap, temperature and bias, within the rounding of the logits."""
    head = random_head(6, 21, 24, 70, std=3.0, bias=True)
    hidden, weight, bias = (head[n].to(dtype) for n in ("hidden", "weight", "bias"))
    settings = options | (dict(temperature=torch.linspace(0.5, 2.0, 21)) if "temperature" in options else {})
    results = forward(hidden, weight, head["targets"], bias, **settings, peaks=True)
    z = logits(hidden, weight, bias, **settings)
    width = interface.PEAK_WIDTH
    z = torch.nn.functional.pad(z[results.rows.long()], (0, -70 % width), value=-torch.inf)
    expected = z.view(len(z), -1, width).amax(2).T
    error = results.peaks.double() - expected
    noise = 1e-5 * (1 + expected.abs())
    assert (error >= -noise).all()
    assert (error <= 2**-7 * expected.abs() + noise).all()


def test_peaks_of_bad_rows():
    """Suppressed entries, infinite ones and NaN: a peak is not below any number of its tile."""
    hidden = torch.tensor([[1.0], [torch.inf], [torch.nan], [-1.0]])
    weight = torch.arange(1.0, 71).unsqueeze(1)
    bias = torch.zeros(70)
    bias[:32] = -torch.inf
    peaks = forward(hidden, weight, torch.full((4,), 40), bias, peaks=True).peaks.float()
    if interface.PEAK_WIDTH == 32:
        assert peaks[0, [0, 3]].tolist() == [-torch.inf, -torch.inf]
    assert peaks[-1, [0, 1]].tolist() == [70.0, torch.inf]
    assert peaks[-1, 3].item() >= -65


# ------------------------------------------------------------------------------------------ edges and limits


@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_fold(rows, vocab):
    results = forward(torch.randn(rows, 4), torch.randn(vocab, 4), torch.zeros(rows, dtype=torch.int64), peaks=True)
    assert results.stats.shape == (4, rows)
    assert results.peaks.shape == (-(-vocab // interface.PEAK_WIDTH), rows)
    assert results.logprob.isnan().all()
    assert results.maximum.isnan().all()
    assert results.log_sum.count_nonzero() == 0


def test_no_depth():
    """Logits are the bias alone."""
    results = forward(torch.randn(2, 0), torch.randn(3, 0), torch.tensor([0, 2]), torch.tensor([1.0, 1.0, 1.0]))
    assert results.logprob.tolist() == [pytest.approx(-math.log(3))] * 2
    assert results.maximum.tolist() == [1.0, 1.0]


def far_apart(rows: int, depth: int, column: int = 0) -> Tensor:
    """[rows, depth] zeros, the last row more than 2^31 entries behind the first; most of that is never touched. As much
    memory lies before them, so that an offset of 32 bits reads another zero and does not end the process."""
    stride = 1 << 24
    assert (rows - 1) * stride > 2**31
    shape = (rows + 128, stride)
    if DEVICE.type == "cuda":
        storage = torch.zeros(shape, dtype=torch.float16, device=DEVICE)
    else:
        storage = torch.from_numpy(np.zeros(shape, "f2"))
    return storage[128:, column : column + depth]


@pytest.mark.parametrize("column", [0, 1], ids=["descriptors", "pointers"])
def test_offsets_beyond_32_bits(column):
    depth, vocab = 8, 140
    weight = far_apart(vocab, depth, column)
    assert fused.describable(weight) == (column == 0)
    weight[-2] = 1.0
    x = forward(torch.ones(1, depth).half(), weight, torch.tensor([vocab - 2])).logprob
    assert x.item() == pytest.approx(-math.log1p((vocab - 1) * math.exp(-depth)), rel=1e-6, abs=0)


def test_hidden_states_beyond_32_bits():
    depth, tokens = 8, 140
    hidden = far_apart(tokens, depth)
    hidden[-1] = 1.0
    weight = torch.zeros(2, depth).half()
    weight[1] = 1.0
    x = forward(hidden, weight, torch.ones(tokens, dtype=torch.int64)).logprob
    assert x[-1].item() == pytest.approx(-math.log1p(math.exp(-depth)), rel=1e-6, abs=0)


def test_what_it_refuses():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
    with pytest.raises(TypeError, match=r"float32.*bfloat16"):
        forward(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match="rows of weight must be contiguous"):
        forward(hidden, torch.randn(4, 5, device=DEVICE).T, targets)


def test_traffic():
    assert fused.traffic(2, 3, 5, 2) == ((2 + 5) * 3 * 2 + 2 * 8, 2 * 4 * 4, 2 * 2 * 3 * 5)


class Calls(TorchDispatchMode):
    """Kernels that were launched, and operations of PyTorch that are not of the interpreter itself and run on the
    device."""

    FREE = frozenset(["empty", "empty_like", "new_empty", "promote_types", "unbind"])

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.operations: list[str] = []
        self.inside = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not self.inside and name not in self.FREE:
            self.operations.append(name)
        return function(*args, **kwargs or {})

    def __enter__(self):
        interpreter = importlib.import_module("triton.runtime.interpreter")
        self.patch = pytest.MonkeyPatch()
        run, calls = interpreter.InterpretedFunction.run, self

        def counted(kernel, *args, **kwargs):
            calls.kernels.append(kernel.fn.__name__)
            calls.inside = True
            try:
                return run(kernel, *args, **kwargs)
            finally:
                calls.inside = False

        self.patch.setattr(interpreter.InterpretedFunction, "run", counted)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what the interpreter runs")
@pytest.mark.parametrize("room", [None, 16])
def test_launches(room, monkeypatch):
    """Four kernels, three more for each further chunk, and nothing of PyTorch but memory: no copy, no wait."""
    head = whole_numbers(7, 40, 24, 100)
    if room is not None:
        monkeypatch.setattr(fused, "chunk_rows", lambda *_: room)
    with Calls() as calls:
        fused.forward(*(head[n] for n in ("hidden", "weight", "bias", "targets")), None,
                      scale=1.0, softcap=None, entropy=True, peaks=True)  # fmt: skip
    chunks = 1 if room is None else 3
    chunk = ["gather_rows_kernel", "forward_kernel", "merge_kernel"]
    assert calls.kernels == ["select_rows_kernel", *chunks * chunk]
    assert len(calls.kernels) == fused.launches(40, room or 40)
    assert calls.operations == []


@pytest.mark.gpu
def test_a_graph_holds_it():
    """Captured once, replayed on other inputs with another number of scored rows."""
    heads = [{n: x.cuda() for n, x in whole_numbers(seed, 300, 64, 1000, torch.bfloat16).items()} for seed in (8, 9)]

    def run(hidden, weight, bias, targets):
        return fused.forward(hidden, weight, bias, targets, None, scale=1.0, softcap=None, entropy=True, peaks=True)

    expected = [run(**head)[0] for head in heads]
    static = {n: x.clone() for n, x in heads[0].items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = run(**static)[0]
    for head, stats_expected in zip(heads, expected, strict=True):
        for name, value in head.items():
            static[name].copy_(value)
        graph.replay()
        assert torch.equal(stats, stats_expected)
