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
from covgrpo_kernels.testing import random_head

pytest.importorskip("triton")
forward = importlib.import_module("covgrpo_kernels.kernels.triton.forward")
collection = importlib.import_module("covgrpo_kernels.kernels.triton.collect")
configs = importlib.import_module("covgrpo_kernels.kernels.triton.configs")


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
    return entries * configs.PEAK_WIDTH // 32


class Collected(NamedTuple):
    found: Tensor  # [N]
    vocab_ids: list[list[int]]  # of each row, in order; empty where there are more than the capacity
    logits: list[list[float]]


def collect(
    hidden, weight, targets, bias=None, temperature=None, logit_scale=1.0, softcap=None, *, min_logits, capacity=8,
    room=None,
) -> Collected:  # fmt: skip
    hidden, weight, targets, bias, temperature, min_logits = (
        None if x is None else x.to(DEVICE) for x in (hidden, weight, targets, bias, temperature, min_logits)
    )
    options = dict(scale=logit_scale, softcap=softcap)
    _, rows, place, count, peaks = forward.forward(
        hidden, weight, bias, targets, temperature, **options, entropy=False, peaks=True
    )
    found, ids, z = collection.collect(
        hidden, weight, bias, temperature, rows, place, count, peaks, min_logits, capacity, **options, room=room
    )
    assert found.dtype == ids.dtype == torch.int32
    assert z.dtype == min_logits.dtype
    in_order: list[list[tuple[int, float]]] = []
    for n, i, x, least in zip(found.tolist(), ids.tolist(), z.tolist(), min_logits.tolist(), strict=True):
        in_order.append(sorted(zip(i[:n], x[:n], strict=True)) if n <= capacity else [])
        assert all(value >= least for _, value in in_order[-1])
    return Collected(found.cpu(), [[i for i, _ in r] for r in in_order], [[x for _, x in r] for r in in_order])


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
    width = configs.PEAK_WIDTH
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
                  capacity=11, **options)  # fmt: skip
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


def test_more_entries_than_room():
    """Are counted: all of a row in a few tiles. An entry that is equal to the minimum reaches it."""
    head = whole_numbers(2, 20, 24, 100)
    z = logits(head["hidden"], head["weight"], head["bias"])
    least = z.sort(1, descending=True).values[torch.arange(20), torch.arange(20) * 4]
    ids = expected(z, least, head["targets"])
    got = collect(**head, min_logits=least.float(), capacity=8)
    assert got.found.tolist() == list(map(len, ids))
    assert got.vocab_ids == [row if len(row) <= 8 else [] for row in ids]
    assert (got.found > 8).any()


def test_more_tiles_than_room():
    """Rows that reach their minimum in more tiles than they have room for entries are left out: none of their products
    is made."""
    vocab = vocab_of(200)
    head = whole_numbers(3, 30, 24, vocab)
    z = logits(head["hidden"], head["weight"], head["bias"])
    least = between(z, torch.arange(30) // 3)
    of_row = pairs(z, least, head["targets"]).sum(1)
    ids = expected(z, least, head["targets"])
    got = collect(**head, min_logits=least.float(), capacity=3)
    assert ((of_row > 3) & (of_row < 7)).any()
    assert got.found.tolist() == [4 if n > 3 else len(row) for n, row in zip(of_row.tolist(), ids, strict=True)]
    everything = collect(**head, min_logits=torch.full((30,), -torch.inf), capacity=3)
    assert everything.found.tolist() == [0 if y == IGNORE_INDEX else 4 for y in head["targets"].tolist()]
    # As many tiles as there is room for entries: these are counted.
    all_of_it = collect(**head, min_logits=torch.full((30,), -torch.inf), capacity=7)
    assert all_of_it.found.tolist() == [0 if y == IGNORE_INDEX else vocab for y in head["targets"].tolist()]


@pytest.mark.parametrize("room", [0, 1, 24, "all but one"])
def test_a_list_that_is_full(room):
    """Exactly the rows with a pair behind its end are left out: tiles from left to right, the rows of each in order."""
    head = whole_numbers(4, 40, 24, vocab_of(150))
    head["targets"][5] = IGNORE_INDEX
    z = logits(head["hidden"], head["weight"], head["bias"])
    least = between(z, torch.arange(40) % 7)
    reach = pairs(z, least, head["targets"])
    assert 24 < reach.sum() < 200
    room = int(reach.sum()) - 1 if room == "all but one" else room
    lost = (reach.T.flatten().cumsum(0) > room).view(reach.T.shape).T & reach
    ids = expected(z, least, head["targets"])
    got = collect(**head, min_logits=least.float(), room=room)
    for r, row in enumerate(ids):
        if lost[r].any():
            assert got.found[r] > 8, r
        else:
            assert got.found[r] == len(row), r
            assert got.vocab_ids[r] == row, r


def test_the_order_of_programs_changes_nothing(monkeypatch):
    """But the order of a row's entries."""
    head = whole_numbers(5, 40, 24, vocab_of(200))
    z = logits(head["hidden"], head["weight"], head["bias"])
    least = between(z, torch.arange(40) % 12).float()
    first = collect(**head, min_logits=least, room=40)
    assert (first.found > 8).any()
    interpreter = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter, "range", lambda *a: reversed(range(*a)), raising=False)
    for programs in (1, 3):
        monkeypatch.setattr(collection, "multiprocessors", lambda _, n=programs: n)
        again = collect(**head, min_logits=least, room=40)
        assert again.found.equal(first.found)
        assert again[1:] == first[1:]


def test_hidden_states_and_weights_of_any_layout():
    head = whole_numbers(6, 37, 21, 90, torch.bfloat16)
    z = logits(head["hidden"], head["weight"], head["bias"])
    least = between(z, torch.arange(37) % 9)
    usual = collect(**head, min_logits=least.float(), capacity=16)
    assert usual.vocab_ids == expected(z, least, head["targets"])
    columns = head["hidden"].T.contiguous().T
    odd = torch.nn.functional.pad(head["weight"].to(DEVICE), (1, 0))[:, 1:]
    assert not forward.describable(odd)
    for layout in (dict(hidden=columns), dict(weight=odd)):
        assert collect(**head | layout, min_logits=least.float(), capacity=16)[1:] == usual[1:]


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
            head["hidden"], weight, head["bias"], None, *selected, peaks, least, 8, scale=1.0, softcap=None
        )

    run()
    with pytest.raises(ValueError, match=r"peaks must be of shape"):
        run(peaks=peaks[:, :4])
    with pytest.raises(TypeError, match=r"float32.*bfloat16"):
        run(weight=head["weight"].bfloat16())
    with pytest.raises(ValueError, match="rows of weight must be contiguous"):
        run(weight=torch.randn(8, 90, device=DEVICE).T)


def test_room_of_the_list():
    """With the peaks of a vocabulary of 151,936 and 64 entries a row, 1.5 KiB a token and 40 MiB at the most."""
    for tokens in (100, 8192, 131072):
        peaks, entries = 2 * math.ceil(151936 / 256) * tokens, 8 * 64 * tokens
        assert peaks + entries + 4 * collection.pairs_room(tokens) <= 1536 * tokens + (40 << 20)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what the interpreter runs")
def test_launches():
    head = whole_numbers(8, 20, 24, 90)
    arguments = (head["hidden"], head["weight"], head["bias"], head["targets"], None)
    _, *selected, peaks = forward.forward(*arguments, scale=1.0, softcap=None, entropy=False, peaks=True)
    least = torch.zeros(20)
    with Calls() as calls:
        collection.collect(
            head["hidden"], head["weight"], head["bias"], None, *selected, peaks, least, 8, scale=1.0, softcap=None
        )
    assert len(calls.kernels) == collection.LAUNCHES == 5
    assert calls.operations == []
