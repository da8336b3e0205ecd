"""The entries of each row that reach a logit, found from the peaks of a forward: exactly these, for any share of rows
that want some, any options and strides; rows that are left out are the same whatever the order of programs."""

import importlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_triton_forward import DEVICE, DTYPES, EXACT, OPTIONS, Calls, blocks, logits, whole_numbers
from torch import Tensor

from covgrpo_kernels.config import IGNORE_INDEX
from covgrpo_kernels.kernels import interface
from covgrpo_kernels.kernels.interface import Candidates
from covgrpo_kernels.testing import random_head

pytest.importorskip("triton")
forward = importlib.import_module("covgrpo_kernels.kernels.triton.forward")
collection = importlib.import_module("covgrpo_kernels.kernels.triton.collect")
configs = importlib.import_module("covgrpo_kernels.kernels.triton.configs")
# On a GPU `-m gpu` chooses all of these.
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


def use_small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Peaks of 32 entries, items of 8 listed rows; lists in several steps."""
    blocks(patch, (16, 32, 16))
    if DEVICE.type == "cpu":
        cut = configs._listed(8, 16, 1, 1, 2, True)
        patch.setitem(configs.COLLECT, "interpreter", {itemsize: cut for itemsize in (2, 4, 8)})
        small = dict(limits=dict(B_N=16, B_T=4), count=dict(B_R=16), ends=dict(B_T=4), list=dict(B_R=16))
        for name, cut in small.items():
            patch.setitem(configs.CONFIGS["interpreter"], name, cut | dict(num_warps=1))


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch)
        yield


def vocab_of(entries: int) -> int:
    """So many entries where a peak is of 32; as many tiles where it is of more."""
    return entries * interface.PEAK_WIDTH // 32


class Collected(NamedTuple):
    found: Tensor  # [N]
    floors: Tensor  # [N]
    vocab_ids: list[list[int]]  # of each row, in order; empty where there are more than the capacity
    logits: list[list[float]]


def collect(
    hidden, weight, targets, bias=None, temperature=None, logit_scale=1.0, softcap=None, *, min_logits, room=8,
    max_tiles=32,
) -> Collected:  # fmt: skip
    hidden, weight, targets, bias, temperature, min_logits = (
        None if x is None else x.to(DEVICE) for x in (hidden, weight, targets, bias, temperature, min_logits)
    )
    options = dict(scale=logit_scale, softcap=softcap)
    _, rows, place, count, peaks = forward.forward(
        hidden, weight, bias, targets, temperature, **options, entropy=False, peaks=True
    )
    # Rows whose log-sum is 1: the logit of the probability 1 / e is their maximum.
    wanted, zero = (min_logits != torch.inf).to(min_logits.dtype), torch.zeros_like(min_logits)
    stats = torch.stack([zero, zero, min_logits.where(wanted > 0, 0), zero + 1])
    found, ids, z, floors = collection.collect(
        hidden, weight, bias, temperature, rows, place, count, peaks, stats, zero, wanted, room,
        min_prob=math.exp(-1), **options, max_tiles=max_tiles,
    )  # fmt: skip
    assert found.dtype == ids.dtype == torch.int32
    assert z.dtype == floors.dtype == min_logits.dtype
    assert not (floors < min_logits).any()
    in_order: list[list[tuple[int, float]]] = []
    for n, i, x, least in zip(found.tolist(), ids.tolist(), z.tolist(), floors.tolist(), strict=True):
        in_order.append(sorted(zip(i[:n], x[:n], strict=True)) if n <= room else [])
        assert all(value >= least for _, value in in_order[-1])
    return Collected(
        found.cpu(), floors.cpu(), [[i for i, _ in r] for r in in_order], [[x for _, x in r] for r in in_order]
    )


def between(z: Tensor, wanted: Tensor) -> Tensor:
    """Minimal logits that so many entries of each row reach, as far from any entry as can be; rows in which no gap
    near that number is wide enough for what rounding does get another number."""
    z = torch.nn.functional.pad(z, (1, 0), value=z.max().item() + 2).sort(1, descending=True).values
    gaps = z[:, :-1] - z[:, 1:]
    penalty = (torch.arange(gaps.shape[1]) - wanted.unsqueeze(1)).abs() + 1e9 * (gaps < 1e-3)
    k = penalty.argmin(1, keepdim=True)
    return ((z.gather(1, k) + z.gather(1, k + 1)) / 2).squeeze(1)


def expected(z: Tensor, min_logits: Tensor, targets: Tensor) -> list[list[int]]:
    hits = (z >= min_logits.unsqueeze(1)) & (min_logits < torch.inf).unsqueeze(1)
    hits &= (targets != IGNORE_INDEX).unsqueeze(1)
    return [row.nonzero().squeeze(1).tolist() for row in hits]


def pairs(z: Tensor, min_logits: Tensor, targets: Tensor) -> Tensor:  # [N, T]
    """Which (row, tile) pairs have a peak, rounded up, that reaches the row's minimum; from exact logits."""
    width = interface.PEAK_WIDTH
    z = torch.nn.functional.pad(z, (0, -z.shape[1] % width), value=-torch.inf)
    peak = z.view(len(z), -1, width).amax(2)
    up = peak.to(torch.bfloat16)
    up = torch.where(up.double() < peak, torch.nextafter(up, torch.full_like(up, torch.inf)), up).double()
    wanted = (targets != IGNORE_INDEX) & (min_logits < torch.inf)
    return (up >= min_logits.unsqueeze(1)) & wanted.unsqueeze(1)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [*((torch.float32, name) for name in OPTIONS), *((dtype, "all") for dtype in [*DTYPES[1:], *EXACT[1:]])],
    ids=str,
)
def test_exactly_the_entries_that_reach_the_minimum(dtype, options):
    """No entry too few or too many, and its logit within the stated bound; rows that are not scored have none."""
    options = OPTIONS[options]
    head = random_head(0, 45, 24, 150, std=3.0, bias=True)
    hidden, weight, bias = (head[n].to(dtype) for n in ("hidden", "weight", "bias"))
    if "temperature" in options:
        options = options | dict(temperature=torch.linspace(0.5, 2.0, 45))
    z = logits(hidden, weight, bias, **options)
    least = between(z, torch.arange(45) % 12)
    got = collect(hidden, weight, head["targets"], bias, min_logits=least.to(torch.promote_types(dtype, torch.float32)),
                  room=11, **options)  # fmt: skip
    ids = expected(z, least, head["targets"])
    assert max(map(len, ids)) == 11, "some row is full"
    assert got.vocab_ids == ids
    assert got.found.tolist() == list(map(len, ids))
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    slope = options.get("logit_scale", 1.0) / options.get("temperature", torch.ones(45)).double()
    size = hidden.double().abs() @ weight.double().abs().T + bias.double().abs()
    for r, (where, value) in enumerate(zip(ids, got.logits, strict=True)):
        error = (torch.tensor(value, dtype=torch.float64) - z[r, where]).abs()
        assert (error <= (24 * size[r, where] * slope[r] + 8 * z[r, where].abs()) * eps).all()


def test_rows_that_want_nothing():
    """+inf and NaN; also where a logit is infinite."""
    head = whole_numbers(1, 20, 24, 100)
    head["targets"] = head["targets"].clamp(min=0)
    least = torch.full((20,), torch.inf)
    least[3], least[4] = torch.nan, 1e4
    head["bias"][7] = torch.inf
    assert collect(**head, min_logits=least).vocab_ids == [*[[]] * 4, [7], *[[]] * 15]
    assert collect(**head, min_logits=least).found.tolist() == [*[0] * 4, 1, *[0] * 15]


@pytest.mark.parametrize("count", [2, 8])
def test_the_largest_entries(count):
    """Those of the specification and its floor, whatever their order; rows that lost some have none."""
    g = torch.Generator().manual_seed(0)
    found = torch.tensor([0, 1, count, count + 1, 2 * count, 2 * count + 1, *[2 * count] * 34], dtype=torch.int32)
    ids = torch.randint(0, 1 << 30, (40, 2 * count), generator=g).int()
    z = torch.randint(-9, 9, (40, 2 * count), generator=g).float()
    z[20:] += torch.rand(20, 2 * count, generator=g)
    z[6] = -0.5
    z[7, 1:] = torch.tensor(1.0).nextafter(torch.tensor(0.0))
    z[7, 0] = 1.0
    least = torch.full((40,), -9.0)
    exact = Candidates(found, ids, z, torch.full((40,), -torch.inf)).most_probable(least)
    for _ in range(2):
        order = (
            torch.rand(40, 2 * count, generator=g).where(torch.arange(2 * count) < found.unsqueeze(1), 2.0).argsort(1)
        )
        given = (x.clone().to(DEVICE) for x in (found, ids.gather(1, order), z.gather(1, order), least))
        n, largest_ids, largest_z, floors = (x.cpu() for x in collection.largest(*given, count))
        assert torch.equal(n, exact.found)
        complete = found <= 2 * count
        assert torch.equal(floors[complete], exact.min_logits[complete])
        for r in complete.nonzero().squeeze(1).tolist():
            entries = zip(largest_ids[r, : n[r]].tolist(), largest_z[r, : n[r]].tolist(), strict=True)
            expected_ids, expected_z = exact.vocab_ids[r, : n[r]].tolist(), exact.logits[r, : n[r]].tolist()
            assert sorted(entries) == list(zip(expected_ids, expected_z, strict=True)), r
    assert {0, 1, count, count + 1} <= set(exact.found.tolist())


def test_more_entries_than_room():
    """Are counted: all of a row in a few tiles. An entry that is equal to the minimum reaches it."""
    head = whole_numbers(2, 20, 24, 100)
    z = logits(head["hidden"], head["weight"], head["bias"])
    least = z.sort(1, descending=True).values[torch.arange(20), torch.arange(20) * 4]
    ids = expected(z, least, head["targets"])
    got = collect(**head, min_logits=least.float(), room=8)
    assert got.found.tolist() == list(map(len, ids))
    assert got.vocab_ids == [row if len(row) <= 8 else [] for row in ids]
    assert (got.found > 8).any()


def test_rows_with_too_many_tiles_have_a_higher_floor():
    """So high that their peaks reach it in no more tiles than that, and no higher than that takes; exactly the entries
    that reach it are collected. All other rows keep their minimum."""
    head = whole_numbers(3, 30, 24, vocab_of(200))
    z = logits(head["hidden"], head["weight"], head["bias"])
    least = between(z, torch.arange(30) // 3)
    of_row = pairs(z, least, head["targets"]).sum(1)
    got = collect(**head, min_logits=least.float(), room=16, max_tiles=3)
    is_flat = of_row > 3
    assert 5 < is_flat.sum() < 25
    assert got.floors[~is_flat].equal(least.float()[~is_flat])
    assert (got.floors[is_flat] > least[is_flat]).all()
    floors = got.floors.double()
    complete = got.found <= 16
    assert (pairs(z, floors, head["targets"]).sum(1)[complete] <= 3).all()
    assert (pairs(z, floors - 0.01, head["targets"]).sum(1) > 3)[is_flat & complete].all()
    ids = expected(z, floors, head["targets"])
    assert (complete & is_flat).sum() > 5
    for r in complete.nonzero().squeeze(1).tolist():
        assert got.found[r] == len(ids[r]), r
        assert got.vocab_ids[r] == ids[r], r


def test_rows_whose_peaks_are_all_equal_are_left_out():
    """No floor has fewer of them; none of their products is made. As many tiles as are allowed are collected from."""
    vocab = vocab_of(200)
    head = whole_numbers(3, 30, 24, vocab) | dict(bias=None)
    head["hidden"][:10] = 0
    valid = head["targets"] != IGNORE_INDEX
    everything = torch.full((30,), -torch.inf)
    got = collect(**head, min_logits=everything, room=8, max_tiles=3)
    assert (got.found[:10][valid[:10]] == 9).all()
    assert not got.found[~valid].any()
    all_of_it = collect(**head, min_logits=everything, room=8, max_tiles=7)
    assert all_of_it.found.tolist() == [vocab if is_valid else 0 for is_valid in valid.tolist()]


def test_the_order_of_programs_changes_nothing(monkeypatch):
    """But the order of a row's entries."""
    head = whole_numbers(5, 40, 24, vocab_of(200))
    z = logits(head["hidden"], head["weight"], head["bias"])
    least = between(z, torch.arange(40) % 12).float()
    first = collect(**head, min_logits=least, room=5, max_tiles=3)
    assert (first.found > 5).any()
    assert (first.floors > least).any()
    interpreter = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter, "range", lambda *a: reversed(range(*a)), raising=False)
    for programs in (1, 3):
        monkeypatch.setattr(collection, "multiprocessors", lambda _, n=programs: n)
        again = collect(**head, min_logits=least, room=5, max_tiles=3)
        assert again.found.equal(first.found)
        assert again.floors.equal(first.floors)
        assert again[2:] == first[2:]


def test_hidden_states_and_weights_of_any_layout():
    head = whole_numbers(6, 37, 21, 90, torch.bfloat16)
    z = logits(head["hidden"], head["weight"], head["bias"])
    least = between(z, torch.arange(37) % 9)
    usual = collect(**head, min_logits=least.float(), room=16)
    assert usual.vocab_ids == expected(z, least, head["targets"])
    columns = head["hidden"].T.contiguous().T
    odd = torch.nn.functional.pad(head["weight"].to(DEVICE), (1, 0))[:, 1:]
    assert not forward.describable(odd)
    for layout in (dict(hidden=columns), dict(weight=odd)):
        assert collect(**head | layout, min_logits=least.float(), room=16)[2:] == usual[2:]


@pytest.mark.parametrize("column", [0, 1], ids=["descriptors", "pointers"])
def test_offsets_beyond_32_bits(column):
    depth, stride, vocab = 8, 1 << 24, 140
    shape = (vocab, stride)
    storage = torch.zeros(shape, device=DEVICE) if DEVICE.type == "cuda" else torch.from_numpy(np.zeros(shape, "f4"))
    weight = storage[:, column : column + depth]
    assert forward.describable(weight) == (column == 0)
    weight[vocab - 2] = 1.0
    got = collect(torch.ones(1, depth), weight, torch.tensor([0]), min_logits=torch.tensor([7.0]))
    assert got.vocab_ids == [[vocab - 2]]
    assert got.logits == [[8.0]]


@pytest.mark.parametrize(("rows", "depth", "vocab"), [(0, 4, 5), (3, 4, 0), (0, 4, 0), (3, 0, 5)])
def test_nothing_to_collect(rows, depth, vocab):
    head = (torch.randn(rows, depth), torch.randn(vocab, depth), torch.zeros(rows, dtype=torch.int64))
    got = collect(*head, min_logits=torch.full((rows,), -1.0))
    assert got.found.tolist() == [0 if depth else vocab] * rows


def test_what_it_refuses():
    head = {n: x.to(DEVICE) for n, x in whole_numbers(7, 5, 8, 90).items()}
    arguments = (head["hidden"], head["weight"], head["bias"], head["targets"], None)
    _, *selected, peaks = forward.forward(*arguments, scale=1.0, softcap=None, entropy=False, peaks=True)
    least = torch.zeros(5, device=DEVICE)

    def run(weight=head["weight"], peaks=peaks):
        collection.collect(
            head["hidden"], weight, head["bias"], None, *selected, peaks, torch.zeros(4, 5, device=DEVICE), least,
            None, 8, min_prob=1.0, scale=1.0, softcap=None,
        )  # fmt: skip

    run()
    with pytest.raises(ValueError, match=r"peaks must be of shape"):
        run(peaks=peaks[:, :4])
    with pytest.raises(TypeError, match=r"float32.*bfloat16"):
        run(weight=head["weight"].bfloat16())
    with pytest.raises(ValueError, match="rows of weight must be contiguous"):
        run(weight=torch.randn(8, 90, device=DEVICE).T)


def test_memory_of_candidates():
    """With the peaks of a vocabulary of 151,936 and 64 entries a row, 1.5 KiB a token and 32 MiB stay; while they are
    collected there are 256 MiB more."""
    for tokens in (100, 8192, 131072):
        stay = (2 * math.ceil(151936 / 256) + 8 * 64) * tokens
        while_collecting = (8 * 128 + 4 * collection.MAX_TILES) * tokens
        assert stay <= 1536 * tokens + (32 << 20)
        assert stay + while_collecting <= 1536 * tokens + (32 << 20) + (256 << 20)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what the interpreter runs")
def test_launches():
    head = whole_numbers(8, 20, 24, 90)
    arguments = (head["hidden"], head["weight"], head["bias"], head["targets"], None)
    _, *selected, peaks = forward.forward(*arguments, scale=1.0, softcap=None, entropy=False, peaks=True)
    stats, coefficient = torch.zeros(4, 20), torch.ones(20)
    with Calls() as calls:
        collection.collect(
            head["hidden"], head["weight"], head["bias"], None, *selected, peaks, stats, coefficient, None,
            8, min_prob=0.5, scale=1.0, softcap=None,
        )  # fmt: skip
    assert len(calls.kernels) == collection.LAUNCHES == 5
    assert calls.operations == []
