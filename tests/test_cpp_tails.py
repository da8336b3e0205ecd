"""The tails that `fused_backward` has in place of its first sixteen rows' gradients, against PyTorch in float64."""

import os
from itertools import pairwise

import pytest
import torch

from covgrpo_kernels.kernels import eager
from covgrpo_kernels.kernels.interface import Coefficients, LogitTransform, Tile

if os.environ.get("COVGRPO_BUILD_CPP") == "1":
    from covgrpo_kernels.kernels import cpp
else:
    cpp = pytest.importorskip("covgrpo_kernels.kernels.cpp", reason="the C++ extension was not built")

F64 = torch.float64
LANES = 16
TAIL_SCALE = 0.75
DEPTH = 24

OPTIONS = {
    "plain": dict(),
    "bias": dict(bias=True),
    "scale": dict(scale=1.5),
    "softcap": dict(softcap=6.0),
    "softcap and scale": dict(softcap=6.0, scale=1.5),
    "temperature": dict(temperature=True),
    "all": dict(bias=True, softcap=6.0, scale=1.5, temperature=True),
}


@pytest.fixture(autouse=True)
def _needs_its_own_products() -> None:
    if not cpp.can_multiply(torch.float32):
        pytest.skip("needs AVX512-BF16")


class Case:
    """Rows and a head, where dL/dweight shows dL/dproducts.

    The first R columns of hidden are the identity and those of weight are zero. So these columns of dL/dweight are the
    transpose of dL/dproducts, and the logits come from the other columns. What the first sixteen rows have besides
    their hidden states is NaN, since none of it may be used.
    """

    def __init__(self, dtype, rows, vocab, bias=False, scale=1.0, softcap=None, temperature=False, entropy=False):
        g = torch.Generator().manual_seed(rows + vocab)
        self.rows, self.vocab = rows, vocab
        self.hidden = torch.cat([torch.eye(rows), torch.randn(rows, DEPTH, generator=g)], 1).to(dtype)
        w = torch.randn(vocab, DEPTH, generator=g) * (3 / DEPTH**0.5)
        self.weight = torch.cat([torch.zeros(vocab, rows), w], 1).to(dtype)
        self.transform = LogitTransform(scale, softcap)
        self.bias = torch.randn(vocab, generator=g) if bias else None
        self.temperature = torch.rand(rows, generator=g) + 0.5 if temperature else None

        self.targets = torch.zeros(rows, dtype=torch.int64)
        _, _, transform, *per_logit = self.tile(F64)
        z = transform.apply_(self.products(), *per_logit)
        # Targets in the tail, and targets that are not: half of the rows each.
        self.targets = z.argmin(1).where(torch.arange(rows) % 2 == 0, z.argmax(1))
        # Half-way across the widest gap between two logits in the middle of a row, so that rounding moves none across.
        ascending = z[LANES : 2 * LANES].sort(1).values[:, vocab // 4 : 3 * vocab // 4]
        widest = ascending.diff().argmax(1, keepdim=True)
        self.min_logits = (ascending.gather(1, widest) + ascending.gather(1, widest + 1)).squeeze(1).div(2).float()
        self.bias_counts = torch.randn(LANES, generator=g)

        maximum = z.amax(1)
        log_sum = (z - maximum.unsqueeze(1)).logsumexp(1)
        log_p = z - (maximum + log_sum).unsqueeze(1)
        of_entropy = [-(log_p.exp() * log_p).sum(1), torch.randn(rows, generator=g)] if entropy else []
        random = torch.randn(2, rows, generator=g)
        packed = torch.stack([maximum.float(), log_sum.float(), *random, *(x.float() for x in of_entropy)])
        packed[:, :LANES] = torch.nan
        self.coefficients = Coefficients(packed)
        if self.temperature is not None:
            self.temperature[:LANES] = torch.nan
        self.targets[:LANES] = 1 << 40

    def products(self) -> torch.Tensor:
        return self.hidden.double() @ self.weight.double().T

    def tile(self, dtype=torch.float32, part=slice(None)) -> Tile:
        bias, temperature = (None if x is None else x.to(dtype) for x in (self.bias, self.temperature))
        return Tile(self.targets, part.start or 0, self.transform, None if bias is None else bias[part], temperature)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """dL/dproducts [R, V] in float64, and what float32 arithmetic may be off by in each element."""
        tile, products = self.tile(F64), self.products()
        coefficients = Coefficients(self.coefficients.packed.double())
        dz = products.clone()
        eager.dlogits(dz, tile, coefficients, dz)

        z = self.transform.apply_(products.clone(), tile.bias, tile.temperature)
        log_p = z - (coefficients.maximum + coefficients.log_sum).unsqueeze(1)
        is_target = torch.arange(self.vocab) == tile.targets.unsqueeze(1)
        softcap_slope = None if self.transform.softcap is None else self.transform.softcap_slope(z, tile.temperature)
        heavy = slice(LANES, 2 * LANES)
        in_tail = ~is_target[heavy] & (z[heavy] < self.min_logits.double().unsqueeze(1))
        tails = TAIL_SCALE * log_p[heavy].exp() * in_tail
        dz[:LANES] = tails if softcap_slope is None else tails * softcap_slope[heavy]

        # Relative to the gradient without the slope of the softcap, a difference: the error of log p, in which
        # products, maximum and log_sum cancel, and those of the exponential and the slope, at most 4 eps each.
        _, _, at_target, g, *of_entropy = coefficients.packed.abs().unsqueeze(2)
        size = log_p.exp() * g
        if of_entropy:
            size += log_p.exp() * of_entropy[1] * (log_p.abs() + of_entropy[0] + 1)
        size = at_target.where(is_target, size) * self.transform.linear_slope(None)
        terms = self.hidden.double().abs() @ self.weight.double().abs().T
        terms = (terms if tile.bias is None else terms + tile.bias.abs()) * self.transform.scale
        if tile.temperature is not None:
            size, terms = (x / tile.temperature.unsqueeze(1) for x in (size, terms))
        unit = terms + coefficients.maximum.abs().unsqueeze(1) + log_p.abs() + 8
        error = torch.cat([tails * unit[heavy], (size * unit)[LANES:]])
        return dz, error * torch.finfo(torch.float32).eps

    def run(self, edges: tuple[int, ...], with_tails: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dL/dhidden, dL/dweight and dL/dbias of a head that is cut at the edges."""
        dtype, depth = self.hidden.dtype, self.hidden.shape[1]
        hidden_sum = torch.full((self.rows, depth), torch.nan)
        weight_grad = torch.full((self.vocab, depth), torch.nan, dtype=dtype)
        bias_sum = torch.zeros(self.vocab)
        widest = max(b - a for a, b in pairwise(edges))
        size = cpp.fused_backward_bytes(self.rows, widest, depth, dtype, (True, True, True))
        workspace = torch.empty(size, dtype=torch.uint8)
        for a, b in pairwise(edges):
            cpp.fused_backward(
                self.hidden, self.weight[a:b], self.tile(part=slice(a, b)), self.coefficients, hidden_sum=hidden_sum,
                weight_sum=None, add_to_weight=False, weight_grad=weight_grad[a:b], weight_scale=1.0,
                bias_sum=bias_sum[a:b], workspace=workspace, keep_packed=a > 0,
                tails=(self.min_logits, self.bias_counts) if with_tails else None, tail_scale=TAIL_SCALE,
            )  # fmt: skip
        return hidden_sum, weight_grad, bias_sum


@pytest.mark.parametrize("rows", [32, 150])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tails(dtype, options, rows):
    """Each of the first sixteen rows has the tail of the row sixteen after it, and that of no other."""
    case = Case(dtype, rows, 1500, entropy=rows > 32, **options)
    exact, error = case.exact()
    for edges in ((0, 1500), (0, 1024, 1500)):
        hidden_sum, weight_grad, bias_sum = case.run(edges)
        dz = weight_grad[:, :rows].T.double()
        # The processor makes denormals zero.
        rounding = torch.finfo(dtype).eps * exact.abs() + torch.finfo(torch.float32).smallest_normal
        assert ((dz - exact).abs() <= error + rounding).all()

        # The products with it, whose sums are in float32.
        eps = torch.finfo(torch.float32).eps
        for ours, a, b in ((hidden_sum, dz, case.weight.double()), (weight_grad, dz.T, case.hidden.double())):
            bound = a.shape[1] ** 0.5 * 4 * eps * (a.abs() @ b.abs()) + torch.finfo(ours.dtype).eps * (a @ b).abs()
            assert ((ours.double() - a @ b).abs() <= bound + torch.finfo(torch.float32).smallest_normal).all()
        counts = torch.cat([case.bias_counts.double(), torch.ones(rows - LANES, dtype=F64)])
        bound = counts.abs() @ (error + rows * eps * exact.abs())
        assert ((bias_sum.double() - counts @ exact).abs() <= bound).all()

    # Targets below the floor are left out, and are not few.
    targets = case.targets[LANES : 2 * LANES]
    assert not exact[:LANES].gather(1, targets.unsqueeze(1)).any()
    assert (exact[:LANES] > 0).sum(1).min() > 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_rows_do_not_see_the_tails(dtype):
    case = Case(dtype, 70, 1100, **OPTIONS["all"])
    with_tails, without = (case.run((0, 1100), with_tails)[0] for with_tails in (True, False))
    assert torch.equal(with_tails[LANES:], without[LANES:])
    assert without[:LANES].isnan().all()


def test_tails_without_their_rows_are_refused():
    case = Case(torch.float32, 40, 60)
    case.rows, case.hidden, case.targets = 31, case.hidden[:31], case.targets[:31]
    case.coefficients = case.coefficients.take(slice(0, 31))
    with pytest.raises(RuntimeError, match="sixteen tails need sixteen rows"):
        case.run((0, 60))
