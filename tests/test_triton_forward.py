"""The streaming forward in a single kernel: against float64 and eager PyTorch, at the edges of its blocks, for sure
tokens, suppressed entries and ties; the same bits whichever rows share a batch and however blocks are loaded."""

import importlib
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from covgrpo_kernels import reference
from covgrpo_kernels.config import IGNORE_INDEX
from covgrpo_kernels.testing import ErrorBook, bounds, check_draw, policy_head, random_head, rms
from covgrpo_kernels.tiles.interface import State

pytest.importorskip("triton")
fused = importlib.import_module("covgrpo_kernels.tiles.triton.forward")
configs = importlib.import_module("covgrpo_kernels.tiles.triton.configs")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def blocks(patch: pytest.MonkeyPatch, sizes: tuple[int, int, int], slices: int = 2) -> None:
    """Blocks for the interpreter; compiled kernels keep theirs."""
    config = configs._blocks(*sizes, 1, 1, slices, True)
    patch.setitem(configs.FORWARD, "interpreter", dict.fromkeys((2, 4, 8), config))


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        blocks(patch, SMALL)
        yield


def forward(hidden, weight, targets, bias=None, temperature=None, logit_scale=1.0, softcap=None, **options) -> State:
    inputs = (None if x is None else x.to(DEVICE) for x in (hidden, weight, bias, targets, temperature))
    options = dict(entropy=True) | options
    return State(*(x.cpu() for x in fused.forward(*inputs, scale=logit_scale, softcap=softcap, **options)))


def three_ways(head: dict, dtype: torch.dtype, options: dict, splits: int | None = None) -> tuple[dict, dict, dict]:
    """Ours, eager in the same dtype, and float64, from inputs that dtype can hold."""
    targets, valid = head["targets"], head["targets"] != IGNORE_INDEX
    if "temperature" in options:
        options = options | dict(temperature=torch.linspace(0.5, 2.0, len(targets)))
    inputs = {n: head[n].to(dtype) for n in ("hidden", "weight", "bias") if head.get(n) is not None}
    results = forward(**inputs, targets=targets, splits=splits, **options).results()
    ours = dict(logprob=results.logprob.where(valid, 0), entropy=results.entropy.where(valid, 0))
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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooled_errors(dtype, options, monkeypatch):
    """The rule of the precision contract over 1,200 rows: random and policy-like ones."""
    blocks(monkeypatch, LARGE)
    book = ErrorBook()
    for seed in range(2):
        book.add(*three_ways(random_head(seed, 300, 64, 500, std=2.0, bias=seed == 0), dtype, options))
        book.add(*three_ways(policy_head(seed, 300, 64, 500), dtype, options))
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
@pytest.mark.parametrize("splits", [1, 2, 3, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, EXACT[-1]], ids=str)
def test_any_splits_and_slices(dtype, splits, slices, monkeypatch):
    blocks(monkeypatch, SMALL, slices)
    close(random_head(1, 19, 24, 205, std=3.0, bias=True), dtype, OPTIONS["all"], splits)


@pytest.mark.parametrize("dtype", [*DTYPES, *EXACT[1:]], ids=str)
def test_descriptors_and_pointers_load_the_same(dtype):
    """To the bit, with blocks that overhang in all directions."""
    head = random_head(2, 37, 40, 77, bias=True)
    hidden, weight, bias = (head[n].to(dtype) for n in ("hidden", "weight", "bias"))
    odd = [torch.nn.functional.pad(x, (1, 0))[:, 1:] for x in (hidden, weight)]
    assert fused._describable(hidden)
    assert fused._describable(weight)
    assert not any(fused._describable(x) for x in odd)
    described = forward(hidden, weight, head["targets"].clamp(min=0), bias)
    pointed = State(
        *fused.forward(
            *(x.to(DEVICE) for x in odd), bias.to(DEVICE), head["targets"].clamp(min=0).to(DEVICE), None,
            scale=1.0, softcap=None, entropy=True,
        )
    )  # fmt: skip
    assert all(torch.equal(a, b.cpu()) for a, b in zip(described, pointed, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, *EXACT], ids=str)
@pytest.mark.parametrize("depth", [40, 43])
def test_a_row_alone_is_the_row_in_its_batch(depth, dtype):
    """To the bit, and from run to run."""
    head = random_head(3, 38, depth, 100, std=3.0, bias=True)
    hidden, weight, bias = (head[n].to(dtype) for n in ("hidden", "weight", "bias"))
    targets, temperature = head["targets"].clamp(min=0), torch.linspace(0.5, 2.0, 38)

    def rows(index) -> torch.Tensor:
        return torch.stack(forward(hidden[index], weight, targets[index], bias, temperature[index], softcap=5.0))

    together = rows(slice(None))
    assert together.isfinite().all()
    assert torch.equal(together, rows(slice(None)))
    for i in (0, 7, 16, 37):
        assert torch.equal(together[:, i : i + 1], rows(slice(i, i + 1)))
    order = torch.randperm(38, generator=torch.Generator().manual_seed(0))
    assert torch.equal(together[:, order], rows(order))


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
    x, h, _, _ = forward(hidden.repeat(2, 1), weight, targets).results()
    few = 12 * torch.finfo(dtype).eps
    for i, gap in enumerate(GAPS):
        s = (vocab - 1) * math.exp(-gap)
        entropy = math.log1p(s) + s * gap / (1 + s)
        assert x[i].item() == pytest.approx(-math.log1p(s), rel=few, abs=0)
        assert x[len(GAPS) + i].item() == pytest.approx(-gap - math.log1p(s), rel=few, abs=0)
        assert h[i].item() == pytest.approx(entropy, rel=few, abs=0)
        assert -torch.expm1(x[i]).item() == pytest.approx(s / (1 + s), rel=few, abs=0)


@pytest.mark.parametrize("vocab", [1, 15, 16, 33, 100])
def test_equal_logits_are_uniform(vocab):
    """Every entry is a maximum, in every slice, tile and split: all but one belong to the sum."""
    state = forward(torch.full((2, 1), 2.0), torch.ones(vocab, 1), torch.tensor([0, vocab - 1]))
    assert state.maximum.tolist() == [2.0, 2.0]
    assert state.total.tolist() == [vocab - 1.0] * 2
    assert state.moment.tolist() == [0.0, 0.0]
    assert state.target.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("allowed", [[3], [40, 41], [3, 129, 131], [0, 16, 32, 63, 64, 149]], ids=str)
def test_suppressed_entries(allowed):
    """-inf in the bias takes an entry out: of slices, tiles and splits in part or whole, without a NaN."""
    head = random_head(4, 5, 8, 150)
    hidden, weight, columns = head["hidden"].to(EXACT[-1]), head["weight"].to(EXACT[-1]), torch.tensor(allowed)
    bias = torch.full((150,), -torch.inf, dtype=hidden.dtype)
    bias[allowed] = 0.5
    place = torch.arange(5) % len(allowed)
    state = forward(hidden, weight, columns[place], bias)
    assert all(value.isfinite().all() for value in state)
    logprob, entropy = reference.linear_logprob(hidden.double(), weight[allowed].double(), place)
    few = 100 * torch.finfo(hidden.dtype).eps
    assert rms(state.results().logprob - logprob) <= few * (1 + rms(logprob))
    assert rms(state.results().entropy - entropy) <= few * (1 + rms(entropy))


def test_rows_without_a_distribution():
    """No finite logit, or one that is NaN: that row's numbers are NaN, and no other's."""
    head = random_head(5, 4, 8, 90)
    hidden, weight, targets = head["hidden"].float(), head["weight"].float(), torch.arange(4)
    nothing = forward(hidden, weight, targets, torch.full((90,), -torch.inf)).results()
    assert nothing.logprob.isnan().all()
    assert nothing.maximum.isnan().all()
    healthy = forward(hidden, weight, targets).results()
    for value in (torch.nan, torch.inf):
        broken = hidden.clone()
        broken[2, 3] = value
        results = forward(broken, weight, targets).results()
        others = [0, 1, 3]
        assert results.logprob[2].isnan()
        assert results.entropy[2].isnan()
        assert all(torch.equal(a[others], b[others]) for a, b in zip(results, healthy, strict=True))


def test_targets_outside_of_the_vocabulary():
    """Give NaN, also where the last tile overhangs; the statistics don't depend on them."""
    head = random_head(6, 6, 8, 70)
    hidden, weight = head["hidden"].float(), head["weight"].float()
    state = forward(hidden, weight, torch.tensor([IGNORE_INDEX, -1, 70, 80, 2**40, 69]))
    assert state.target.isnan().tolist() == [True] * 5 + [False]
    healthy = forward(hidden, weight, torch.arange(6))
    assert all(torch.equal(a, b) for a, b in zip(state[:3], healthy[:3], strict=True))


def test_without_entropy():
    """The other statistics are the same, to the bit; the moment stays zero."""
    head = random_head(7, 20, 8, 90, std=3.0)
    inputs = head["hidden"].float(), head["weight"].float(), head["targets"].clamp(min=0)
    with_, without = forward(*inputs), forward(*inputs, entropy=False)
    assert all(torch.equal(with_[i], without[i]) for i in (0, 1, 3))
    assert with_.moment.abs().min() > 0
    assert without.moment.count_nonzero() == 0


@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_fold(rows, vocab):
    state = forward(torch.randn(rows, 4), torch.randn(vocab, 4), torch.zeros(rows, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(state[:3], State.empty(rows, torch.float32, "cpu")[:3], strict=True))
    assert state.target.isnan().all()


def test_no_depth():
    """Logits are the bias alone."""
    state = forward(torch.randn(2, 0), torch.randn(3, 0), torch.tensor([0, 2]), torch.tensor([1.0, 1.0, 1.0]))
    assert state.total.tolist() == [2.0, 2.0]
    assert state.target.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("column", [0, 1], ids=["descriptors", "pointers"])
def test_offsets_beyond_32_bits(column):
    """Rows of a weight that start more than 2^31 entries into its storage; most of that is never touched."""
    depth, stride, vocab = 8, 1 << 24, 140
    shape = (vocab, stride)
    storage = torch.zeros(shape, device=DEVICE) if DEVICE.type == "cuda" else torch.from_numpy(np.zeros(shape, "f4"))
    weight = storage[:, column : column + depth]
    assert fused._describable(weight) == (column == 0)
    last = vocab - 2
    assert last * stride > 2**31
    weight[last] = 1.0
    x = forward(torch.ones(1, depth), weight, torch.tensor([last])).results().logprob
    assert x.item() == pytest.approx(-math.log1p((vocab - 1) * math.exp(-depth)), rel=1e-6, abs=0)


def test_what_it_refuses():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
    with pytest.raises(TypeError, match=r"float32.*bfloat16"):
        forward(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match="rows of weight must be contiguous"):
        forward(hidden, torch.randn(4, 5, device=DEVICE).T, targets)


def test_traffic():
    assert fused.traffic(2, 3, 5, 2) == ((2 + 5) * 3 * 2 + 2 * 8, 2 * 4 * 4, 2 * 2 * 3 * 5)
