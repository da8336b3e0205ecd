"""The Triton kernels of the backward, each against the PyTorch code that specifies it, evaluated in float64, and all of
them in their order against the dense gradient."""

import importlib
import math

import numpy as np
import pytest
import torch

from covgrpo_kernels.inputs import HeadInputs
from covgrpo_kernels.kernels import eager
from covgrpo_kernels.kernels.interface import Candidates, Coefficients, LogitTransform, RowStats, Tile
from covgrpo_kernels.sparse import sparse_entries
from covgrpo_kernels.testing import rms

pytest.importorskip("triton")
FOLDER = "covgrpo_kernels.kernels.triton"
plan_rows = importlib.import_module(f"{FOLDER}.plan_rows")
row_classes = importlib.import_module(f"{FOLDER}.row_classes")
tails = importlib.import_module(f"{FOLDER}.tails")
tail_weights = importlib.import_module(f"{FOLDER}.tail_weights")
pairs = importlib.import_module(f"{FOLDER}.pairs")
dlogits = importlib.import_module(f"{FOLDER}.dlogits")
head_grad = importlib.import_module(f"{FOLDER}.head_grad")
hidden_grad = importlib.import_module(f"{FOLDER}.hidden_grad")
configs = importlib.import_module(f"{FOLDER}.configs")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On a GPU `-m gpu` chooses all of these.
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
F64, INF, NAN = torch.float64, math.inf, math.nan
EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MIN_PROB, K, T = 1e-4, 64, 16
SETTINGS = {
    "plain": dict(),
    "entropy": dict(entropy=True),
    "all": dict(entropy=True, temperature=True, head=LogitTransform(-1.5, 20.0)),
}


def on_device(value):
    """Tensors, also those within tuples and lists, on the device that is tested."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, (tuple, list)):
        moved = [on_device(v) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


class Batch:
    """Rows of a policy over some vocabulary: most are sure and the rest forks; with more candidates than there is room
    for (every 20th), and without a gradient (a fifth). Everything but the oracle's logits is float32, on the device."""

    def __init__(self, seed, n, vocab, *, entropy=False, temperature=False, head=LogitTransform(), noise=3.0):  # noqa: B008
        g = self.generator = torch.Generator().manual_seed(seed)
        self.head = head
        products = torch.randn(n, vocab, generator=g, dtype=F64) * noise
        targets = torch.randint(0, vocab, (n,), generator=g)
        rows = torch.arange(n)
        sure = torch.rand(n, generator=g) < 0.8
        products[rows, targets] += torch.where(sure, 8 + 12 * torch.rand(n, generator=g, dtype=F64), 2.0)
        products[rows % 20 == 0] /= 10
        products *= 1 if head.scale > 0 else -1
        self.temperature = torch.rand(n, generator=g) + 0.5 if temperature else None
        self.products, self.targets = products.float(), targets
        self.g = torch.randn(n, generator=g) * 10 ** torch.randn(n, generator=g)
        self.e = torch.randn(n, generator=g) if entropy else None
        dead = torch.rand(n, generator=g) < 0.2
        for x in (self.g, self.e):
            if x is not None:
                x[dead] = 0
        self.update()

    def update(self):
        """Logits and statistics of the products."""
        t = None if self.temperature is None else self.temperature.double()
        n = len(self.products)
        z = self.logits = self.head.apply_(self.products.double(), None, t)
        log_p = z.log_softmax(1)
        maximum = z.amax(1)
        at_maximum = z == maximum.unsqueeze(1)
        others = (z - maximum.unsqueeze(1)).exp().masked_fill(at_maximum, 0).sum(1) + at_maximum.sum(1) - 1
        log_sum = others.log1p()
        logprob = (z[torch.arange(n), self.targets] - maximum) - log_sum
        self.stats = torch.stack([logprob, -(log_p.exp() * log_p).sum(1), maximum, log_sum]).float()

    def candidates(self, capacity=K, seed=0):
        """Entries from the floor on, in an order that depends on the seed."""
        n, g = len(self.logits), torch.Generator().manual_seed(seed)
        floor = self.floors()
        z = self.logits.float()
        found = torch.zeros(n, dtype=torch.int32)
        ids = torch.full((n, capacity), -7, dtype=torch.int32)  # stands for memory that nobody has written
        logits = torch.full((n, capacity), NAN)
        for r in range(n):
            here = (z[r] >= floor[r]).nonzero().squeeze(1)
            here = here[torch.randperm(len(here), generator=g)]
            found[r] = len(here)
            here = here[:capacity]
            ids[r, : len(here)], logits[r, : len(here)] = here.int(), z[r, here]
        return Candidates(found, ids, logits, floor)

    def plan(self, candidates):
        inputs = on_device((candidates, self.stats, self.targets, self.g, self.e, self.temperature))
        return plan_rows.plan_rows(*inputs, scale=self.head.scale, softcap=self.head.softcap)

    def specified(self, candidates, dtype):
        """`sparse_entries`, of the same numbers in ``dtype``."""
        e, t = (None if x is None else x.to(dtype) for x in (self.e, self.temperature))
        stats, g = RowStats(self.stats.to(dtype)), self.g.to(dtype)
        given = Candidates(
            candidates.found, candidates.vocab_ids, candidates.logits.to(dtype), candidates.min_logits.to(dtype)
        )
        ascending, order = given.vocab_ids.where(given.present(), 1 << 30).sort(1)
        there = given.present()
        in_order = given._replace(
            vocab_ids=ascending.where(there, 0), logits=given.logits.gather(1, order).where(there, 0)
        )
        inputs = HeadInputs(self.products, self.products, None, self.targets, t, self.head)
        return sparse_entries(inputs, stats, in_order, g, e)

    def dlogits(self, dtype=F64):
        """dL/dproducts [N, V], dense, of the same statistics."""
        e, t = (None if x is None else x.to(dtype) for x in (self.e, self.temperature))
        coefficients = Coefficients.of(RowStats(self.stats.to(dtype)), self.g.to(dtype), e)
        out = self.products.to(dtype, copy=True)
        eager.dlogits(out, Tile(self.targets, 0, self.head, None, t), coefficients, out)
        return out

    def log_floors(self):
        """Every third row has a higher one of its own."""
        return math.log(MIN_PROB) + 1.5 * (torch.arange(len(self.logits)) % 3 == 0)

    def floors(self):
        maximum, log_sum = self.stats[2:]
        return maximum + (log_sum + self.log_floors())

    def in_tail(self):
        """[N, V] bool: below the floor, and not the target."""
        below = self.logits.float() < self.floors().unsqueeze(1)
        return below.scatter(1, self.targets.unsqueeze(1), False)

    def slope(self):
        return torch.full_like(self.g, self.head.scale).double() / (
            1.0 if self.temperature is None else self.temperature.double()
        )


def dense_values(rows, targets, vocab):
    """[N, V] float64 of what the row plan keeps: the candidates' values and the target's."""
    n, capacity = rows.vocab_ids.shape
    there = torch.arange(capacity) < rows.kept.cpu().unsqueeze(1)
    out = torch.zeros(n, vocab, dtype=F64)
    r, k = there.nonzero(as_tuple=True)
    out[r, rows.vocab_ids.cpu()[r, k].long()] = rows.values.cpu()[r, k].double()
    out[torch.arange(n), targets] += rows.target_value.cpu().double()
    return out


def as_good_as(ours, eager_, exact, size, factor=3.0):
    """The rule for numbers, pooled over the rows: RMS errors at most ``factor`` times eager's; where eager is next to
    exact, some roundings of the ``size`` of what was added up."""
    limit = max(factor * rms(eager_.cpu().double() - exact), 2 * EPS * rms(size))
    assert rms(ours.cpu().double() - exact) <= limit


# ----------------------------------------------------------------------------------------------- plan_rows


@pytest.mark.parametrize("settings", SETTINGS)
def test_row_plan_equals_the_specification(settings):
    batch = Batch(1, 150, 200, **SETTINGS[settings])
    candidates = batch.candidates()
    exact, single = (batch.specified(candidates, dtype) for dtype in (F64, torch.float32))
    rows = batch.plan(candidates._replace(vocab_ids=candidates.vocab_ids.clone(), logits=candidates.logits.clone()))
    fits = candidates.found <= K
    assert 5 < (~fits).sum() < 100
    assert torch.equal(rows.kept.cpu(), (exact.used.sum(1) - 1).int())

    def spread(spec):
        out = torch.zeros(150, 200, dtype=F64)
        return out.scatter_add_(1, spec.vocab_ids.where(spec.used, 0), spec.values.double())

    kept, tail = spread(exact), exact.tail.where(fits, 0)
    ours = dense_values(rows, batch.targets, 200)
    assert torch.equal(ours != 0, kept != 0)
    as_good_as(ours, spread(single), kept, kept)
    size = (exact.values.abs().sum(1) + tail.abs()).where(fits, 0)
    as_good_as(rows.tail.cpu().where(fits, 0), single.tail.where(fits, 0), tail, size)
    e = None if batch.e is None else batch.e.double()
    at_target = Coefficients.of(RowStats(batch.stats.double()), batch.g.double(), e).at_target
    in_single = Coefficients.of(RowStats(batch.stats), batch.g, batch.e).at_target
    as_good_as(rows.at_target, in_single, at_target, at_target)

    # The mass is rounded up, by no more than it may be off.
    possible = rows.kind.cpu() == plan_rows.SPARSE_POSSIBLE
    not_p = -torch.expm1(batch.stats[0].double())
    mass, off = rows.mass.cpu().double(), 16 * EPS * not_p
    assert (mass >= exact.mass)[possible].all()
    assert (mass <= exact.mass + 2 * off)[possible].all()
    sizes = batch.g.abs() if batch.e is None else batch.g.abs() + batch.e.abs()
    weights = sizes.double() * mass * batch.slope().abs()
    weights = weights.where(possible, -1)
    assert ((rows.tail_weight.cpu() - weights).abs() <= 8 * EPS * weights.abs()).all()
    live = (batch.g != 0) | (False if batch.e is None else batch.e != 0)
    assert torch.equal(possible, live & fits)
    assert torch.equal(rows.kind.cpu() == plan_rows.NO_GRADIENT, ~live)


@pytest.mark.parametrize("settings", SETTINGS)
def test_bounds_are_bounds_and_close(settings):
    """On the gradient of each row and of its tail, against the dense gradient."""
    batch = Batch(2, 150, 200, **SETTINGS[settings])
    rows = batch.plan(batch.candidates())
    possible, live = rows.kind.cpu() == plan_rows.SPARSE_POSSIBLE, rows.kind.cpu() != plan_rows.NO_GRADIENT
    dz = batch.dlogits()
    squares = dz.square().sum(1)
    of_tail = (dz.square() * batch.in_tail()).sum(1)
    few = 1 + 64 * EPS
    assert (squares[live] <= rows.bound.cpu()[live] * few).all()
    assert (rows.norm.cpu() <= squares * few)[live].all()
    assert (of_tail[possible] <= rows.tail_bound.cpu()[possible] * few).all()
    assert not rows.bound.cpu()[~live].any()
    assert not rows.norm.cpu()[~live].any()
    # Not loose: the norm lacks the tail alone; the bounds are within their factors where there is no softcap, which
    # they do not know, and no entropy coefficient, in which terms may cancel.
    torch.testing.assert_close(rows.norm.cpu()[possible], (squares - of_tail)[possible], rtol=1e-5, atol=0.0)
    if settings == "plain":
        assert (rows.bound.cpu() <= 2.01 * squares)[live].sum() > 100
        ratio = (of_tail / rows.tail_bound.cpu())[possible]
        assert ratio.median() > 0.05


def test_candidates_come_in_any_order():
    """To the bit the same plan."""
    batch = Batch(3, 60, 200, **SETTINGS["all"])
    first, second = (batch.plan(batch.candidates(seed=seed)) for seed in (1, 2))
    there = torch.arange(K, device=DEVICE) < first.kept.unsqueeze(1)
    for name, a, b in zip(first._fields, first, second, strict=True):
        a, b = (x.where(there, 0) for x in (a, b)) if name == "vocab_ids" else (a, b)
        assert torch.equal(a, b), name


@pytest.mark.parametrize("capacity", [1, 16, 256])
def test_any_capacity(capacity):
    batch = Batch(4, 40, 200)
    candidates = batch.candidates(capacity)
    exact = batch.specified(candidates, F64)
    rows = batch.plan(candidates)
    assert torch.equal(rows.kept.cpu(), (exact.used.sum(1) - 1).int())
    kept = torch.zeros(40, 200, dtype=F64)
    kept.scatter_add_(1, exact.vocab_ids.where(exact.used, 0), exact.values)
    torch.testing.assert_close(dense_values(rows, batch.targets, 200), kept, rtol=1e-5, atol=1e-12)


def test_without_candidates():
    """No row can be sparse, and all else is the same."""
    batch = Batch(5, 40, 100, **SETTINGS["all"])
    none, some = batch.plan(None), batch.plan(batch.candidates(256))
    assert none.vocab_ids is None
    assert none.values is None
    assert not none.kept.any()
    assert torch.equal(none.kind, some.kind.clamp(max=plan_rows.LIVE))
    for name in ("target_value", "at_target", "bound"):
        assert torch.equal(getattr(none, name), getattr(some, name)), name
    assert (none.norm <= some.norm).all()
    assert torch.equal(none.norm, none.target_value.double().square().where(none.kind > 0, 0))


def test_rows_without_a_gradient_may_hold_anything():
    batch = Batch(6, 8, 100)
    batch.g = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, NAN, INF, 1.0])
    batch.stats[:, 1] = NAN
    batch.stats[:, 2] = INF
    batch.stats[:, 7] = NAN
    candidates = batch.candidates(128)
    candidates.found[3] = 129
    rows = batch.plan(candidates)
    assert rows.kind.tolist() == [0, 0, 0, 0, 2, 1, 1, 1]
    assert rows.bound[:4].tolist() == [0.0] * 4
    assert rows.norm[:4].tolist() == [0.0] * 4
    # What is not finite cannot be sparse, and shows in the norm.
    assert not rows.norm[5:].isfinite().any()
    assert rows.tail_weight.cpu()[[0, 1, 2, 3, 5, 6, 7]].tolist() == [-1.0] * 7


def test_a_bound_that_overflows_shows_in_the_norm():
    """The target's entry alone would be finite."""
    batch = Batch(6, 4, 100, entropy=True)
    batch.g, batch.e = torch.zeros(4), torch.tensor([3e38, 1.0, 0.0, 0.0])
    batch.stats[0, 0] = -200.0
    batch.stats[1] = 5.0
    rows = batch.plan(None)
    assert rows.at_target[0] == 0
    assert rows.norm.isfinite().tolist() == [False, True, True, True]


def test_sure_tokens_keep_their_digits():
    """1 - p without cancellation, and squares that float32 does not hold."""
    x = -(10.0 ** torch.linspace(-30, 2, 400))
    batch = Batch(7, 400, 8)
    batch.stats = torch.stack([x, torch.zeros(400), torch.zeros(400), torch.zeros(400)])
    batch.g = torch.full((400,), 1e-3)
    rows = batch.plan(None)
    exact = -torch.expm1(x.double()) * batch.g.double()
    assert ((rows.at_target.cpu() - exact).abs() <= 16 * EPS * exact).all()
    torch.testing.assert_close(rows.norm.cpu(), exact.square(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(rows.bound.cpu(), 2 * exact.square(), rtol=1e-6, atol=0.0)


# ------------------------------------------------------------------------------------------- classify_rows


def counted_total(norms, largest_share):
    """The largest T with T = sum of min(norm, largest_share * T / number of norms), by halves."""
    limit = largest_share / sum(x > 0 for x in norms)
    low, high = 0.0, sum(norms)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(min(x, limit * middle) for x in norms) >= middle:
            low = middle
        else:
            high = middle
    return low


def classified(bound, norm, kind, kept, tail_rows, grad_tol, largest_share):
    """`classify_rows`, row by row."""
    n = len(bound)
    finite = [r for r in range(n) if norm[r] < INF]
    total = sum(norm[r].item() for r in finite)
    counted = total if largest_share is None else counted_total([norm[r].item() for r in finite], largest_share)
    within, error = set(), 0.0
    for r in sorted((r for r in range(n) if not bound[r].isnan()), key=lambda r: (bound[r].item(), r)):
        if not error + bound[r].item() <= grad_tol**2 * counted:
            break
        error += bound[r].item()
        within.add(r)
    what, place, listed, n_pairs = [], [-1] * n, [], 0
    for r in range(n):
        if kind[r] == plan_rows.NO_GRADIENT or (r in within and kind[r] != plan_rows.SPARSE_POSSIBLE):
            what.append(row_classes.DROPPED)
        elif r in within:
            what.append(row_classes.SPARSE)
            place[r] = n_pairs
            n_pairs += int(kept[r]) + 1
        else:
            what.append(row_classes.DENSE)
            listed.append(r)
    n_sparse = what.count(row_classes.SPARSE)
    if n_sparse:
        heavy = tail_rows.tolist()
        listed = heavy + heavy + [r for r in listed if r not in heavy]
        places = {r: T + i for i, r in enumerate(heavy)}
        places |= {r: 2 * T + i for i, r in enumerate(listed[2 * T :])}
    else:
        places = {r: i for i, r in enumerate(listed)}
    for r, at in places.items():
        place[r] = at
    relative = INF if len(finite) < n else math.sqrt(error / total) if error else 0.0
    return what, place, listed, [len(listed), n_sparse, n_pairs], relative


@pytest.mark.parametrize("grad_tol", [0.0, 1e-3, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("case", ["finite", "ties", "not finite", "no tails", "one row for all", "some rows for all"])
def test_rows_are_classified_one_by_one(case, grad_tol):
    """In more than one block, with rows that start and end in the middle of them."""
    g = torch.Generator().manual_seed(int(grad_tol * 1000))
    n = 201
    norm = torch.rand(n, generator=g, dtype=F64) ** 4
    bound = norm * torch.rand(n, generator=g, dtype=F64) ** 8
    kind = torch.randint(0, 3, (n,), generator=g).to(torch.int8)
    if case == "ties":
        bound = (bound * 4).round() / 64
    kept = torch.randint(0, 9, (n,), generator=g).int()
    tail_rows = (kind == plan_rows.SPARSE_POSSIBLE).nonzero().squeeze(1)[torch.randperm(40, generator=g)[:T]]
    if case == "no tails":
        kind.clamp_(max=plan_rows.LIVE)
        tail_rows = None
    else:
        kind[tail_rows], bound[tail_rows] = plan_rows.TAIL_ROW, INF
    norm[kind == 0], bound[kind == 0] = 0, 0
    largest_share = None
    if "for all" in case:
        largest_share = 4.0
        norm[(kind == plan_rows.LIVE).nonzero()[: 1 if case == "one row for all" else 30]] *= 1e6
    if case == "not finite":
        bad = (kind == plan_rows.LIVE).nonzero().squeeze(1)[:4]
        bound[bad] = torch.tensor([NAN, INF, INF, NAN], dtype=F64)
        norm[bad] = torch.tensor([INF, NAN, INF, NAN], dtype=F64)
    what, place, listed, counts, relative = classified(bound, norm, kind, kept, tail_rows, grad_tol, largest_share)
    inputs = on_device((bound, norm, kind, kept, tail_rows))
    result = row_classes.classify_rows(*inputs, grad_tol, largest_share)
    assert result.row_class.tolist() == what
    assert result.place.tolist() == place
    assert result.counts.tolist() == counts
    assert result.rows[: counts[0]].tolist() == listed
    assert result.error_bound.item() == pytest.approx(relative, rel=1e-12)
    if case == "not finite":
        assert result.error_bound == INF
        assert result.row_class[bad.to(DEVICE)].tolist() == [row_classes.DENSE] * 4
    else:
        assert result.error_bound <= grad_tol * (1 + 1e-12)
    if case in ("finite", "ties", "not finite") and grad_tol == 0.3:
        assert counts[1] > 20
    if case == "one row for all" and grad_tol == 0.05:
        assert counts[0] > 2 * T + 5


def test_of_rows_with_equal_bounds_the_first_are_dropped():
    n = 150
    ones = torch.ones(n, dtype=F64)
    kind = torch.full((n,), plan_rows.LIVE, dtype=torch.int8)
    result = row_classes.classify_rows(*on_device((ones, ones, kind, torch.zeros(n).int())), None, 0.8)
    n_dropped = int(0.64 * n)
    assert result.row_class.tolist() == [row_classes.DROPPED] * n_dropped + [row_classes.DENSE] * (n - n_dropped)
    assert result.rows[: n - n_dropped].tolist() == list(range(n_dropped, n))
    assert result.error_bound.item() == pytest.approx(math.sqrt(n_dropped / n))


@pytest.mark.parametrize("largest_share", [2.0, 8.0, 32.0])
def test_no_row_makes_room_for_all_others(largest_share):
    """Norms over a dozen orders of magnitude; how many rows are dropped shows what they add up to."""
    n, n_dropped = 300, 150
    g = torch.Generator().manual_seed(0)
    norm = 10 ** (2 * torch.randn(n, generator=g, dtype=F64))
    counted = counted_total(norm.tolist(), largest_share)
    assert counted < 0.7 * norm.sum()
    bound = torch.full((n,), 0.25 * counted / (n_dropped + 0.5), dtype=F64)
    kind = torch.full((n,), plan_rows.LIVE, dtype=torch.int8)
    result = row_classes.classify_rows(*on_device((bound, norm, kind, torch.zeros(n).int())), None, 0.5, largest_share)
    assert result.counts[0] == n - n_dropped
    assert result.error_bound.item() == pytest.approx(math.sqrt(n_dropped * bound[0] / norm.sum()))


@pytest.mark.parametrize("n", [1, 64])
def test_nothing_to_classify(n):
    """Rows without any gradient."""
    zeros = torch.zeros(n, dtype=F64)
    inputs = on_device((zeros, zeros, zeros.to(torch.int8), zeros.int()))
    result = row_classes.classify_rows(*inputs, None, 1e-3)
    assert result.counts.tolist() == [0, 0, 0]
    assert result.error_bound == 0
    assert result.row_class.tolist() == [row_classes.DROPPED] * n
    assert result.place.tolist() == [-1] * n


# --------------------------------------------------------------------------------------------- list_pairs


def test_pairs_are_in_order():
    """By vocabulary id, and for each by row; blocks without a pair among them."""
    batch = Batch(8, 90, 1000, noise=4.0)
    batch.targets[:5] = torch.tensor([0, 63, 64, 999, 128])
    rows = batch.plan(batch.candidates())
    row_class = (rows.kind.cpu() == plan_rows.SPARSE_POSSIBLE).to(torch.int8) * row_classes.SPARSE
    sparse = row_class == row_classes.SPARSE
    per_row = (rows.kept.cpu() + 1).where(sparse, 0)
    place = (per_row.cumsum(0) - per_row).int().where(sparse, -1)
    classes = row_classes.RowClasses(*on_device((row_class, place)), None, None, None)
    expected = []
    for r in sparse.nonzero().squeeze(1).tolist():
        n = int(rows.kept[r])
        expected += [
            (i, r, x) for i, x in zip(rows.vocab_ids[r, :n].tolist(), rows.values[r, :n].tolist(), strict=True)
        ]
        expected.append((int(batch.targets[r]), r, float(rows.target_value[r])))
    expected.sort(key=lambda pair: pair[:2])
    assert len(expected) > 200
    result = pairs.list_pairs(rows, classes, on_device(batch.targets), len(expected), 1000)
    assert list(zip(result.vocab_ids.tolist(), result.rows.tolist(), result.values.tolist(), strict=True)) == expected
    edges = torch.arange(0, 1000 + pairs.PAIR_BLOCK, pairs.PAIR_BLOCK)
    ids = torch.tensor([pair[0] for pair in expected])
    assert result.offsets.tolist() == torch.searchsorted(ids, edges).tolist()
    assert result.offsets.cpu().diff().min() >= 0


# ------------------------------------------------------------------------------------------------- tails


def tail_batch(dtype, settings="plain", n=300, depth=72, vocab=150, seed=9):
    batch = Batch(seed, n, vocab, **SETTINGS[settings])
    batch.g /= 2 ** batch.g.abs().amax().log2().ceil()  # as for float16
    hidden = torch.randn(n, depth, generator=batch.generator).to(dtype)
    rows = batch.plan(batch.candidates())
    tail_rows = rows.tail_weight.topk(T).indices
    return batch, on_device(hidden), rows, tail_rows


def assigned(batch, hidden, rows, tail_rows, sharpness=10.0):
    return tails.assign_tails(rows, tail_rows, hidden, entropy=batch.e is not None, sharpness=sharpness)


@pytest.mark.parametrize("entropy", [False, True])
def test_weights_of_tails(entropy):
    """No coefficient counts for more than a multiple of the root mean square; some rows cannot be sparse."""
    g = torch.Generator().manual_seed(0)
    coefficient, size = 10 ** (2 * torch.randn(150, generator=g)), torch.rand(150, generator=g)
    weight = coefficient * size
    weight[::3] = -1.0
    squares = coefficient.double().square()[weight >= 0]
    most = counted_total(squares.tolist(), 2.0) * 2.0 / len(squares)
    assert (squares > most).sum() > 20
    expected = (coefficient.double().clamp(max=math.sqrt(most)) * size).where(weight >= 0, -1.0)
    part = torch.rand(150, generator=g) if entropy else torch.ones(150)
    of_entropy = coefficient * (1 - part) if entropy else None
    inputs = on_device((-coefficient * part, of_entropy, weight))
    torch.testing.assert_close(tail_weights.tail_weights(*inputs, 2.0).cpu().double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("sharpness", [None, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_uses_the_tails_most_like_its_own(dtype, sharpness, settings):
    batch, hidden, rows, tail_rows = tail_batch(dtype, settings)
    hidden += 3.0  # what all have in common
    result = assigned(batch, hidden, rows, tail_rows, sharpness)
    h, heavy = hidden.cpu().double(), tail_rows.cpu()
    h -= h[heavy].mean(0)
    cosine = torch.nn.functional.cosine_similarity(h.unsqueeze(1), h[heavy], dim=2)
    possible = rows.kind.cpu() == plan_rows.SPARSE_POSSIBLE
    tail, mass = rows.tail.cpu().double(), rows.mass.cpu().double()
    mix = result.shares.cpu() / tail.unsqueeze(1) * mass[heavy]
    if sharpness is None:
        best = mix.argmax(1)
        assert (cosine.gather(1, best.unsqueeze(1)).squeeze(1) >= cosine.amax(1) - 1e-4)[possible].all()
        assert ((mix - torch.nn.functional.one_hot(best, T)).abs() <= 8 * EPS)[possible].all()
        assert best[possible].unique().numel() > 8
        assert torch.equal(best[heavy], torch.arange(T))  # nothing is more like a row than itself
    else:
        off = (mix - (sharpness * cosine).softmax(1)).abs()
        assert off[possible].max() <= 1e-4
    bound = rows.tail_bound.cpu() + tail.square() * (
        mix @ (batch.log_floors().double().exp() / mass)[heavy].clamp(max=1)
    )
    bound = (bound if batch.e is None else 2 * bound).where(possible, rows.bound.cpu())
    bound[heavy] = INF
    torch.testing.assert_close(result.bound.cpu(), bound, rtol=1e-6, atol=0.0)
    kind = rows.kind.cpu().clone()
    kind[heavy] = plan_rows.TAIL_ROW
    assert torch.equal(result.kind.cpu(), kind)


def test_rows_that_cannot_be_sparse_are_no_tail_rows():
    """Where there are too few others, they come among the heavy rows: without a gradient, or not finite."""
    batch, hidden, rows, tail_rows = tail_batch(torch.float32, n=20)
    assert (rows.kind == plan_rows.SPARSE_POSSIBLE).sum() < T
    result = assigned(batch, hidden, rows, tail_rows)
    possible = rows.kind == plan_rows.SPARSE_POSSIBLE
    assert torch.equal(result.kind == plan_rows.TAIL_ROW, possible)
    assert torch.equal(result.bound[~possible], rows.bound[~possible])
    assert result.bound[possible].isinf().all()


def test_no_mass_in_a_tail():
    """A policy that is sure of everything: shares are numbers."""
    batch, hidden, rows, tail_rows = tail_batch(torch.float32)
    rows.mass.zero_()
    result = assigned(batch, hidden, rows, tail_rows)
    assert not result.shares.any()
    assert not result.bound.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_of_tails(dtype, monkeypatch):
    """S to the rounding of its dtype, over several parts; rows that are not sparse are not even read."""
    monkeypatch.setattr(tails, "_MAX_PARTS", 3)
    batch, hidden, rows, tail_rows = tail_batch(dtype, n=400)
    plan = assigned(batch, hidden, rows, tail_rows)
    row_class = torch.randint(0, 3, (400,), generator=batch.generator).to(torch.int8)
    row_class[rows.kind.cpu() != plan_rows.SPARSE_POSSIBLE] = row_classes.DENSE
    sparse = row_class == row_classes.SPARSE
    others = (row_class == row_classes.DENSE).nonzero().squeeze(1)
    h = hidden.cpu().double().where(sparse.unsqueeze(1), 0)
    hidden[(row_class == row_classes.DROPPED).to(DEVICE)] = NAN
    shares = plan.shares.cpu().double().where(sparse.unsqueeze(1), 0)
    exact = MIN_PROB * (shares.T @ h)

    listed = torch.cat([tail_rows.cpu(), others])
    parts = tails.sum_tail_states(hidden, plan.shares, on_device(row_class))
    assert len(parts[0]) == 3
    states, factors = tails.gather_states(hidden, on_device(listed), parts, min_prob=MIN_PROB)
    assert states.dtype == dtype
    eager_ = MIN_PROB * (shares.float().T @ h.float())
    size = MIN_PROB * (shares.abs().T @ h.abs())
    # Coefficients keep 16 bits, or 22 in float16.
    as_good_as(parts[0].sum(0) * MIN_PROB, eager_, exact, size * (1 if dtype == torch.float32 else 2**-16 / EPS))
    as_good_as(states[:T], eager_.to(dtype), exact, size, 1.1)
    torch.testing.assert_close(factors.cpu().double(), MIN_PROB * shares.sum(0), rtol=1e-5, atol=1e-7)
    assert torch.equal(states[T:].cpu(), hidden.cpu()[others])
    again = tails.gather_states(hidden, on_device(listed), parts, min_prob=MIN_PROB)[0]
    assert torch.equal(states[:T], again[:T])

    alone, factors = tails.gather_states(hidden, on_device(others), None, min_prob=MIN_PROB)
    assert torch.equal(alone.cpu(), hidden.cpu()[others])
    assert factors is None
    assert tails.gather_states(hidden, on_device(others[:0]), None, min_prob=MIN_PROB)[0].shape == (0, 72)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("in_place", [False, True])
def test_gradient_of_dense_rows_and_tails(settings, in_place):
    """The first T rows become the tails of the next T; what stood there has no influence. In two slices of the
    vocabulary, of rows that are taken from all."""
    batch = Batch(10, 80, 200, **SETTINGS[settings])
    listed = torch.cat([torch.arange(T), torch.randperm(80, generator=batch.generator)[: T + 7]])

    def specified(dtype):
        out = batch.dlogits(dtype)[listed]
        t = None if batch.temperature is None else batch.temperature.to(dtype)
        coefficients = Coefficients.of(RowStats(batch.stats.to(dtype)), batch.g.to(dtype), None)
        for i, r in enumerate(listed[T : 2 * T].tolist()):
            row = slice(r, r + 1)
            tile = Tile(batch.targets[row], 0, batch.head, None, None if t is None else t[row])
            floors = batch.floors()[row].to(dtype)
            tail = eager.tail_probabilities(
                batch.products[row].to(dtype), tile, coefficients.take(row), floors, 1 / MIN_PROB
            )
            out[i] = tail
        return out

    exact = specified(F64)
    single = Coefficients.of(RowStats(batch.stats), batch.g, batch.e)
    inputs = on_device((batch.targets, batch.temperature, listed))
    parts = []
    for first in (0, 128):
        tile = batch.products[listed, first : first + 128].clone()
        tile[:T] = NAN
        tile = on_device(tile)
        out = tile if in_place else torch.full_like(tile, NAN)
        dlogits.dlogits(
            tile, Tile(inputs[0], first, batch.head, None, inputs[1]), on_device(single), out,
            rows=inputs[2], tails=T, min_prob=MIN_PROB, log_floor=on_device(batch.log_floors()),
        )  # fmt: skip
        parts.append(out.cpu())
    ours = torch.cat(parts, 1).double()
    eager_ = specified(torch.float32).double()
    size = exact.abs().amax(1, keepdim=True).clamp(min=1e-30)  # every row counts as much as any other
    for part in (slice(0, T), slice(T, None)):
        as_good_as((ours / size)[part], (eager_ / size)[part], (exact / size)[part], torch.ones(1))
    assert torch.equal(ours[:T] != 0, exact[:T] != 0)
    assert (ours[:T] != 0).sum() > 200


# ------------------------------------------------------------------------------------------------ head_grad


def some_pairs(g, n_pairs, n, vocab):
    """Sorted pairs, half of them of few ids."""
    ids = torch.randint(0, vocab, (n_pairs,), generator=g)
    ids[::2] = ids[::2] % 3
    rows = torch.randint(0, n, (n_pairs,), generator=g)
    order = (ids * n + rows).argsort(stable=True)
    ids, rows = ids[order], rows[order]
    values = torch.randn(n_pairs, generator=g) * 10 ** -torch.rand(n_pairs, generator=g)
    edges = torch.arange(0, vocab + pairs.PAIR_BLOCK, pairs.PAIR_BLOCK)
    offsets = torch.searchsorted(ids, edges).int()
    return pairs.Pairs(ids.int(), rows.int(), values, offsets)


@pytest.mark.parametrize(("n_rows", "n_pairs"), [(0, 0), (0, 700), (1, 1), (150, 0), (150, 700)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_head(dtype, n_rows, n_pairs):
    """Scaled and rounded once, with tails in the bias, in two slices of the vocabulary whose last blocks overhang."""
    g = torch.Generator().manual_seed(n_rows + n_pairs)
    n, depth, vocab = 50, 72, 200
    hidden = torch.randn(n, depth, generator=g).to(dtype)
    dz, states = (torch.randn(n_rows, k, generator=g).to(dtype) for k in (vocab, depth))
    listed = some_pairs(g, n_pairs, n, vocab) if n_pairs else None
    factors = torch.rand(T, generator=g) if n_rows > T else None
    scale = torch.tensor(2.0**-3)
    counted = torch.ones(n_rows)
    if factors is not None:
        counted[:T] = factors

    def specified(precision):
        dweight, dbias = dz.to(precision).T @ states.to(precision), counted.to(precision) @ dz.to(precision)
        if listed is not None:
            values, ids = listed.values.to(precision), listed.vocab_ids.long()
            dweight.index_add_(0, ids, values.unsqueeze(1) * hidden.to(precision)[listed.rows.long()])
            dbias.index_add_(0, ids, values)
        return dweight * scale.to(precision), dbias * scale.to(precision)

    out, bias_out = torch.full((vocab, depth), NAN, dtype=dtype), torch.full((vocab,), NAN, dtype=dtype)
    out, bias_out = on_device((out, bias_out))
    inputs = on_device((hidden, listed, factors, scale))
    for a, b in ((0, 128), (128, vocab)):
        part = dz[:, a:b].contiguous()
        head_grad.head_grad(*on_device((part, states)), *inputs, out[a:b], bias_out[a:b], first=a)
    (exact, exact_bias), (single, single_bias) = specified(F64), specified(torch.float32)
    size = dz.double().abs().T @ states.double().abs()
    for ours, eager_, oracle in ((out, single, exact), (bias_out, single_bias, exact_bias)):
        as_good_as(ours, eager_.to(dtype), oracle, size.mean() * scale.double(), 1.1)
    if not n_rows and not n_pairs:
        assert not out.any()
        assert not bias_out.any()

    # The same alone.
    alone, bias_alone = torch.full_like(out, NAN), torch.full_like(bias_out, NAN)
    everything = (*on_device((dz, states)), *inputs)
    head_grad.head_grad(*everything, alone, None)
    head_grad.head_grad(*everything, None, bias_alone)
    assert torch.equal(alone, out)
    as_good_as(bias_alone, single_bias.to(dtype), exact_bias, size.mean() * scale.double(), 1.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointers_and_descriptors_give_the_same(dtype):
    """A vocabulary whose rows no descriptor can describe, and one that only has more of them."""
    g = torch.Generator().manual_seed(0)
    dz, states = torch.randn(40, 77, generator=g).to(dtype), torch.randn(40, 64, generator=g).to(dtype)
    hidden = torch.zeros(1, 64, dtype=dtype)
    results = []
    for width in (77, 80):
        padded = on_device(torch.nn.functional.pad(dz, (0, width - 77)))
        assert configs.describable(padded) == (width == 80)
        out = on_device(torch.empty(width, 64, dtype=dtype))
        head_grad.head_grad(padded, *on_device((states, hidden)), None, None, None, out, None)
        results.append(out[:77])
    assert torch.equal(*results)


# ---------------------------------------------------------------------------------------------- hidden_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_hidden_states(dtype):
    """Of sparse, dense and dropped rows, scaled and rounded once."""
    n = 150
    batch, hidden, rows, tail_rows = tail_batch(dtype, n=n)
    plan = assigned(batch, hidden, rows, tail_rows)
    classes = row_classes.classify_rows(plan.bound, rows.norm, plan.kind, rows.kept, tail_rows, 0.02)
    n_listed, n_sparse, _ = classes.counts.tolist()
    assert n_sparse > 20
    assert n_listed > 2 * T + 5
    weight = torch.randn(150, 72, generator=batch.generator).to(dtype)
    products = torch.randn(n_listed, 72, generator=batch.generator)
    products[:T] /= MIN_PROB
    scale = torch.tensor(2.0**-3)
    out = on_device(torch.full((n, 72), NAN, dtype=dtype))
    inputs = on_device((batch.targets, weight, products, scale))
    hidden_grad.hidden_grad(classes, (rows, plan.shares), *inputs, out, min_prob=MIN_PROB)

    row_class, place = classes.row_class.cpu(), classes.place.cpu().long()

    def specified(precision):
        of_kept = dense_values(rows, batch.targets, 150).to(precision) @ weight.to(precision)
        sparse = of_kept + (plan.shares.cpu().to(precision) * MIN_PROB) @ products[:T].to(precision)
        dense = products.to(precision)[place.clamp(min=0) % n_listed]
        what = row_class.unsqueeze(1)
        total = sparse.where(what == row_classes.SPARSE, 0) + dense.where(what == row_classes.DENSE, 0)
        return total * scale.to(precision)

    exact = specified(F64)
    as_good_as(out, specified(torch.float32).to(dtype), exact, exact, 1.1)
    dropped = row_class == row_classes.DROPPED
    assert dropped.sum() > 20
    assert not out.cpu()[dropped].any()
    # Alone the dense rows, and no scale.
    alone = torch.full_like(out, NAN)
    classes.row_class[classes.row_class == row_classes.SPARSE] = row_classes.DROPPED
    hidden_grad.hidden_grad(classes, None, *inputs[:3], None, alone, min_prob=MIN_PROB)
    dense = row_class == row_classes.DENSE
    assert torch.equal(alone.cpu()[dense], products[place[dense]].to(dtype))
    assert not alone.cpu()[~dense].any()


# ------------------------------------------------------------------------------------------ all in their order


def backward(batch, hidden, weight, candidates, grad_tol):
    """(dhidden, dweight, dbias, row classes) by the kernels, products by PyTorch."""
    dtype, head = hidden.dtype, batch.head
    stats, targets, g, e, t = on_device((batch.stats, batch.targets, batch.g, batch.e, batch.temperature))
    scale = None
    if dtype == torch.float16:
        scale = torch.ldexp(torch.ones((), device=DEVICE), torch.frexp(g.abs().amax()).exponent)
        g, e = g / scale, None if e is None else e / scale
    rows = plan_rows.plan_rows(on_device(candidates), stats, targets, g, e, t, scale=head.scale, softcap=head.softcap)
    tail_rows = rows.tail_weight.topk(T).indices
    plan = tails.assign_tails(rows, tail_rows, hidden, entropy=e is not None, sharpness=10.0)
    classes = row_classes.classify_rows(plan.bound, rows.norm, plan.kind, rows.kept, tail_rows, grad_tol)
    n_listed, n_sparse, n_pairs = classes.counts.tolist()
    listed, parts, some = classes.rows[:n_listed], None, None
    if n_sparse:
        some = pairs.list_pairs(rows, classes, targets, n_pairs, len(weight))
        parts = tails.sum_tail_states(hidden, plan.shares, classes.row_class)
    states, factors = tails.gather_states(hidden, listed, parts, min_prob=MIN_PROB)
    tile = states.float() @ weight.float().T
    dz = tile.to(dtype)
    per_row = [stats[2], stats[3], rows.at_target, g, *([] if e is None else [stats[1], e])]
    dlogits.dlogits(
        tile, Tile(targets, 0, head, None, t), Coefficients(torch.stack(per_row)), dz,
        rows=listed, tails=T if n_sparse else 0, min_prob=MIN_PROB, log_floor=rows.log_floor,
    )  # fmt: skip
    products = dz.float() @ weight.float()
    out = torch.empty_like(hidden), torch.empty_like(weight), torch.empty_like(weight[:, 0])
    head_grad.head_grad(dz, states, hidden, some, factors, scale, *out[1:])
    sparse = (rows, plan.shares) if n_sparse else None
    hidden_grad.hidden_grad(classes, sparse, targets, weight, products, scale, out[0], min_prob=MIN_PROB)
    return *(x.cpu().double() for x in out), classes


@pytest.mark.parametrize(
    ("grad_tol", "settings", "dtype"),
    [
        (0.02, "plain", torch.float32),
        (0.02, "entropy", torch.float16),
        (0.02, "all", torch.float32),
        (0.0, "all", torch.float16),
    ],
)
def test_all_gradients_are_of_one_dlogits(grad_tol, settings, dtype):
    """With an identity as head dhidden is dZ: its error is within the certificate, a row of it sums to zero, and
    dweight and dbias are what products with it give."""
    n = 160
    batch = Batch(11, n, n, **SETTINGS[settings])
    batch.products = batch.products.to(dtype).float()
    batch.update()
    hidden, weight = on_device((batch.products.to(dtype), torch.eye(n, dtype=dtype)))
    dz, dweight, dbias, classes = backward(batch, hidden, weight, batch.candidates(), grad_tol)
    exact, eps = batch.dlogits(), torch.finfo(dtype).eps
    n_sparse = classes.counts[1].item()
    assert (n_sparse > 25) == (grad_tol > 0)
    assert classes.error_bound <= grad_tol * (1 + 1e-6)
    noise = (4 if dtype == torch.float32 else 1) * eps * exact.norm()
    assert (dz - exact).norm() <= classes.error_bound.cpu() * exact.norm() + noise
    row_class = classes.row_class.cpu()
    if grad_tol:
        # The tail of a sparse row is there: without it, its sum would be off by the tail's.
        sparse = row_class == row_classes.SPARSE
        of_tail = (exact * batch.in_tail()).sum(1)[sparse].abs()
        off = dz.sum(1)[sparse].abs()
        if batch.head.softcap is None:
            assert off.norm() <= 0.05 * of_tail.norm()
        assert (dz - exact)[sparse].norm() >= 1e-3 * of_tail.norm()  # it is not the row's own tail
    states = hidden.cpu().double()
    for name, ours, left in (("dweight", dweight, states), ("dbias", dbias, torch.ones(n, 1, dtype=F64))):
        right = (dz.T @ left).view_as(ours)
        size = (dz.abs().T @ left.abs()).view_as(ours)
        assert (ours - right).norm() <= (16 if dtype == torch.float32 else 2) * eps * size.norm(), name
    again = backward(batch, hidden, weight, batch.candidates(seed=1), grad_tol)
    assert all(torch.equal(a, b) for a, b in zip((dz, dweight, dbias), again[:3], strict=True))


def test_offsets_beyond_32_bits():
    """Rows of hidden states and of the head that start more than 2^31 elements into their storage, most of which is
    never touched."""
    stride, n = 1 << 24, 140
    shape = (n, stride)
    storage = torch.zeros(shape, device=DEVICE) if DEVICE.type == "cuda" else torch.from_numpy(np.zeros(shape, "f4"))
    far = storage[:, :8]
    far[n - 1] = 2.0
    row_class = on_device(torch.full((n,), row_classes.SPARSE, dtype=torch.int8))
    zeros, ones = on_device((torch.zeros(n, dtype=torch.int32), torch.ones(n)))
    targets = on_device(torch.full((n,), n - 1))
    rows = plan_rows.RowPlan(None, zeros, zeros.unsqueeze(1), ones.unsqueeze(1), ones.expand(6, -1), None)
    shares = on_device(torch.nn.functional.pad(torch.ones(n, 1), (0, T - 1)))
    classes = row_classes.RowClasses(row_class, zeros, None, None, None)
    out = torch.empty(n, 8, device=DEVICE)
    products = torch.zeros(T, 8, device=DEVICE)
    hidden_grad.hidden_grad(classes, (rows, shares), targets, far, products, None, out, min_prob=MIN_PROB)
    assert (out == 2.0).all()

    sums = tails.sum_tail_states(far, shares, row_class)
    states, _ = tails.gather_states(far, targets[: T + 1], sums, min_prob=1.0)
    assert (states[0] == 2.0).all()
    assert (states[T] == 2.0).all()
    ids, last = on_device((torch.tensor([3], dtype=torch.int32), torch.tensor([n - 1], dtype=torch.int32)))
    listed = pairs.Pairs(ids, last, ones[:1], on_device(torch.tensor([0, 1], dtype=torch.int32)))
    dweight = torch.empty(4, 8, device=DEVICE)
    empty = torch.empty(0, 4, device=DEVICE), torch.empty(0, 8, device=DEVICE)
    head_grad.head_grad(*empty, far, listed, None, None, dweight, None)
    assert dweight.sum(1).tolist() == [0.0, 0.0, 0.0, 16.0]
    plan_of_all = batch_of_equals(n)
    similar = tails.assign_tails(
        plan_of_all, targets[:T] - torch.arange(T, device=DEVICE), far, entropy=False, sharpness=None
    )
    assert similar.shares[n - 1].argmax() == 0


def batch_of_equals(n):
    zeros, ones = torch.zeros(n), torch.ones(n)
    kind = torch.full((n,), plan_rows.SPARSE_POSSIBLE, dtype=torch.int8)
    per_row, bounds = torch.stack([zeros, zeros, ones, ones, ones, zeros]), ones.double().expand(3, -1).contiguous()
    values = (kind, zeros.int(), None, None, per_row, bounds)
    return plan_rows.RowPlan(*on_device(values))
