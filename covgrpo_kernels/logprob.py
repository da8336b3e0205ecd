"""`linear_logprob`: log-probs and entropies from hidden states and the head, without the logits.

Four layers: the public function, the operators (fake, autograd), the chunk loop, the tile operations (`tiles/`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import tiles
from .backward_plan import BackwardPlan, Kept, plan_backward, probability_floor, resolve_grad_tol
from .collectives import all_sum, check_process_group
from .config import IGNORE_INDEX, check_flag
from .distributed import VocabularySlice, merge_results
from .layout import check_floating, check_integer, check_tensor
from .sparse_part import SparsePart
from .tiles.eager import logits_, tail_probabilities
from .tiles.interface import BLOCK, CAPACITY, Candidates, Coefficients, Head, Results, State


class LinearLogprob(NamedTuple):
    logprob: Tensor  # [...] float32 (float64 for float64 inputs)
    entropy: Tensor | None  # [...], likewise; None unless asked for


# ------------------------------------------------------------------------------------------- the chunk loop

# Bytes of all temporaries of a pass together.
WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}


def largest_tile(depth: int, device: torch.device) -> tuple[int, int]:
    """The largest (rows, vocabulary entries) of a tile worth having: beyond it the matrix product gains nothing."""
    if device.type != "cuda":
        return 1024, 2 * BLOCK
    return gpu_tile(depth, torch.cuda.get_device_properties(device).multi_processor_count)


def gpu_tile(depth: int, multiprocessors: int) -> tuple[int, int]:
    """Rows by which products with BLOCK entries, in pieces of 128 x 256, occupy every multiprocessor once, and as
    many entries as make a product last longer than its launch and that of what follows: 5e10 operations or more."""
    rows, columns = max(128, 32 * multiprocessors // 128 * 128), 4 * BLOCK
    while 2 * rows * columns * depth < 5e10 and columns < 16 * BLOCK:
        columns *= 2
    return rows, columns


def _accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gemm_dtype(x: Tensor) -> torch.dtype:
    """What operands of a product with float32 output may be. On a CPU only float32 ones have it in torch; the
    cast of a slice is exact."""
    return x.dtype if x.device.type == "cuda" else _accumulator_dtype(x.dtype)


def _mm(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out (+)= a @ b in the accumulator's dtype."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def tile_shape(
    largest: tuple[int, int], rows: int, depth: int, vocab: int, kind: str, dtype: torch.dtype, temporaries: int
) -> tuple[int, int]:
    """(rows, vocabulary entries) of a tile: the largest of which all that belongs to it fits the workspace of that
    kind of device; at the least 256 rows of one BLOCK. The entries are a multiple of BLOCK, or all.

    ``temporaries``: tiles that the tile operations allocate.
    """
    r, c = largest
    r = max(min(r, rows), 1)
    accumulator, given = _accumulator_dtype(dtype).itemsize, dtype.itemsize
    operand = given if kind == "cuda" else accumulator

    def need(r: int, c: int) -> int:
        tiles = accumulator * (1 + temporaries) + (operand if operand != accumulator else 0)  # the last one is dZ
        rows = operand + given  # as they are loaded, and their gradient
        slices = (accumulator if given != accumulator else 0) + (operand if operand != given else 0)  # dW, W
        return tiles * r * c + rows * r * depth + slices * c * depth

    return _fitting((r, c), need, WORKSPACE_BYTES[kind], vocab)


def _fitting(
    tile: tuple[int, int],
    need: Callable[[int, int], int],
    limit: int,
    vocab: int,
    smallest: tuple[int, int] = (256, BLOCK),
) -> tuple[int, int]:
    """The tile made smaller until what it needs is within the limit, or it is the smallest."""
    r, c = tile
    while need(r, c) > limit and (r > smallest[0] or c > smallest[1]):
        if r > smallest[0] and (r > c or c <= smallest[1]):
            r = max(smallest[0], r // 2 // 128 * 128)
        else:
            c //= 2
    return r, c if vocab > c else max(vocab, 1)


def _tile(hidden: Tensor, rows: int, weight: Tensor, temporaries: int) -> tuple[int, int]:
    kind = "cuda" if hidden.device.type == "cuda" else "cpu"
    vocab, depth = weight.shape
    return tile_shape(largest_tile(depth, hidden.device), rows, depth, vocab, kind, hidden.dtype, temporaries)


def _own_products_tile(
    hidden: Tensor, rows: int, weight: Tensor, needs: tuple[bool, bool, bool] | None, sparse: bool = False
) -> tuple[int, int, int]:
    """(rows, vocabulary entries, bytes of the workspace) for a backend that multiplies itself: of the backward that
    ``needs`` gradients of hidden, weight and bias, or of the forward, for which the head is one slice, since it keeps
    no more than a few numbers of a row and a BLOCK."""
    ops, dtype, (vocab, depth) = tiles.select(hidden.device), hidden.dtype, weight.shape
    r, c = largest_tile(depth, hidden.device)
    gathered = dtype.itemsize * depth
    if needs is None:
        r = min(4 * r, rows)

        def need(r: int, c: int) -> int:
            return ops.fold_products_bytes(r, vocab, depth, dtype) + gathered * r

    else:
        rounded = 0 if dtype == _accumulator_dtype(dtype) else _accumulator_dtype(dtype).itemsize  # dW

        def need(r: int, c: int) -> int:
            sums = rounded * c * depth + (4 * c * depth if sparse else 0)  # dW of dense rows, of sparse ones
            return ops.grad_products_bytes(r, c, depth, dtype, needs) + gathered * r + sums

    r, c = _fitting((max(min(r, rows), 1), c), need, WORKSPACE_BYTES["cpu"], vocab, smallest=(64, 256))
    if needs is None:
        return r, max(vocab, 1), ops.fold_products_bytes(r, vocab, depth, dtype)
    return r, c, ops.grad_products_bytes(r, c, depth, dtype, needs)


def _vocabulary_slices(
    vocab: int, width: int, unit: int = BLOCK, more: tuple[int, ...] = ()
) -> Iterator[tuple[int, int]]:
    """Slices of ``width``, cut at ``more`` places; the last ones are a multiple of ``unit`` and the rest, so that every
    tile is blocks."""
    whole = vocab - vocab % unit
    edges = sorted({*range(0, whole, width), *(cut for cut in more if cut < whole), whole, vocab})
    return ((a, b) for a, b in itertools.pairwise(edges) if a < b)


class _Rows:
    """Chosen rows of the [N, ...] inputs, loaded a block at a time; all rows without a copy. The state ``first`` takes
    the place of the first chosen one."""

    def __init__(
        self, hidden: Tensor, chosen: Tensor | None, block: int, dtype: torch.dtype, first: Tensor | None = None
    ) -> None:
        self.hidden, self.chosen, self.dtype, self.first = hidden, chosen, dtype, first
        self.count = len(hidden) if chosen is None else len(chosen)
        self.blocks = [slice(i, min(i + block, self.count)) for i in range(0, self.count, block)]
        self._only = self._load(self.blocks[0]) if len(self.blocks) == 1 else None

    def take(self, value: Tensor, first: float) -> Tensor:
        """Of [N] values; ``first`` is that of the row that is none of them, where there is one."""
        if self.chosen is None:
            return value.contiguous()
        taken = value[self.chosen]
        if self.first is not None:
            taken[0] = first
        return taken

    def take_optional(self, value: Tensor | None, first: float) -> Tensor | None:
        return None if value is None else self.take(value, first)

    def _load(self, block: slice) -> Tensor:
        if self.chosen is None:
            return self.hidden[block].to(self.dtype)
        rows = self.hidden[self.chosen[block]].to(self.dtype)
        if self.first is not None and block.start == 0:
            rows[0] = self.first
        return rows

    def load(self, block: slice) -> Tensor:
        return self._load(block) if self._only is None else self._only


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream_forward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    temperature: Tensor | None,  # [N]
    head: Head,
    entropy: bool,
    ignore_index: int,
    floor: float,
) -> tuple[Results, Kept]:  # of N rows, zeros where ignored
    ops = tiles.select(hidden.device)
    valid = targets != ignore_index
    if hidden.device.type == "cpu":
        _check_targets(targets, valid, len(weight), ignore_index)
        if temperature is not None:
            bad = valid & ~((temperature > 0) & temperature.isfinite())
            if bad.any():
                raise ValueError(f"temperature must be positive and finite, got {temperature[bad][0].item()}")
    # Ignored rows are not computed; reading back how many there are is not possible while a graph is captured.
    chosen = None if _capturing(hidden.device) else valid.nonzero().squeeze(1)
    if chosen is not None and len(chosen) == len(hidden):
        chosen = None

    dtype, own = _accumulator_dtype(hidden.dtype), ops.multiplies(hidden.dtype)
    given = hidden.dtype if own else _gemm_dtype(hidden)
    count = len(hidden) if chosen is None else len(chosen)
    if own:
        height, width, size = _own_products_tile(hidden, count, weight, None)
        workspace = hidden.new_empty(size, dtype=torch.uint8)
    else:
        height, width = _tile(hidden, len(hidden), weight, ops.TEMPORARIES)
        workspace = hidden.new_empty(min(height, max(count, 1)) * width, dtype=dtype)
    rows = _Rows(hidden, chosen, height, given)
    targets, temperature = rows.take(targets, 0), rows.take_optional(temperature, 0)
    state = State.empty(count, dtype, hidden.device)
    candidates = Candidates.empty(count, CAPACITY if floor else 0, dtype, hidden.device)
    if count:
        if floor:
            # The normaliser is at least the target's share. Its product may be rounded otherwise in the pass.
            z = _target_logits(rows, weight, targets, head, bias, temperature)
            at_least = z - (0.1 + 1e-4 * z.abs())
        for a, b in _vocabulary_slices(len(weight), width, 1 if own else BLOCK, _FIRST_LOOKS if own and floor else ()):
            if floor:
                so_far = state.maximum + state.total.log1p()
                torch.add(torch.maximum(at_least, so_far), math.log(floor), out=candidates.threshold)
            w = weight[a:b].to(given)
            bias_slice = None if bias is None else bias[a:b].to(dtype).contiguous()
            for block in rows.blocks:
                h = rows.load(block)
                t = None if temperature is None else temperature[block]
                arguments = (state.rows(block), targets[block], a, head, bias_slice, t, entropy)
                noted = candidates.rows(block) if floor else None
                if own:
                    ops.fold_products(h, w, *arguments, workspace, a > 0 and len(rows.blocks) == 1, noted)
                else:
                    tile = workspace[: len(h) * (b - a)].view(len(h), b - a)
                    _mm(h, w.t(), tile)
                    ops.fold(tile, *arguments, noted)
    results, kept = state.results(), Kept.of(candidates)
    if chosen is None:
        return Results(*(r.where(valid, 0) for r in results)), kept

    def spread(value: Tensor) -> Tensor:
        return value.new_zeros(len(hidden), *value.shape[1:]).index_copy_(0, chosen, value)

    return Results(*map(spread, results)), Kept(*map(spread, kept))


def _check_targets(targets: Tensor, valid: Tensor, vocab: int, ignore_index: int) -> None:
    bad = valid & ((targets < 0) | (targets >= vocab))
    if bad.any():
        raise ValueError(f"targets must be in [0, {vocab}) or {ignore_index}, got {targets[bad][0].item()}")


# Entries after which thresholds of candidates are raised, by a backend that takes the head as one slice: the frequent
# ones, which stand first in a byte-pair vocabulary, make most of the normaliser.
_FIRST_LOOKS = (4 * BLOCK, 32 * BLOCK)


def _target_logits(
    rows: _Rows,
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [R], as are the next two
    head: Head,
    bias: Tensor | None,  # [V]
    temperature: Tensor | None,
) -> Tensor:  # [R]
    dtype = _accumulator_dtype(weight.dtype)
    products = torch.empty(rows.count, dtype=dtype, device=weight.device)
    step = max(1, (1 << 20) // max(weight.shape[1], 1))
    y = targets.clamp(0, max(len(weight) - 1, 0))
    for block in rows.blocks:
        h = rows.load(block)
        for i in range(0, len(h), step):
            part = slice(block.start + i, min(block.start + i + step, block.stop))
            products[part] = (h[i : i + step].to(dtype) * weight[y[part]].to(dtype)).sum(1)
    of_targets = None if bias is None else bias[y].to(dtype).unsqueeze(1)
    return logits_(products.unsqueeze(1), head, of_targets, temperature).squeeze(1)


def _spread_rows_(gradient: Tensor, chosen: Tensor, block: int) -> None:
    """Moves row i of the first len(chosen) rows to row chosen[i] >= i, in place, zeros elsewhere: from the last
    block to the first nothing is overwritten that has yet to move."""
    gradient[len(chosen) :] = 0
    for i in reversed(range(0, len(chosen), block)):
        rows = gradient[i : i + block][: len(chosen) - i].clone()
        gradient[i : i + len(rows)] = 0
        gradient[chosen[i : i + len(rows)]] = rows


def _stream_backward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    temperature: Tensor | None,  # [N]
    head: Head,
    results: Results,  # of the forward, N rows
    kept: Kept,  # likewise
    logprob_grad: Tensor,  # [N]
    entropy_grad: Tensor | None,  # [N]
    plan: BackwardPlan,
    floor: float,
    needs: list[bool],  # hidden, weight, bias
    partial: bool = False,  # the gradient of hidden is a part of a sum, not yet rounded to its dtype
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], [V, D], [V]; empty where not needed
    ops = tiles.select(hidden.device)
    need_hidden, need_weight, need_bias = needs[0], needs[1], needs[2] and bias is not None
    dtype = _accumulator_dtype(hidden.dtype)

    def output(value: Tensor | None, needed: bool, dtype: torch.dtype = hidden.dtype) -> Tensor:
        if value is None or not needed:
            return hidden.new_empty(0, dtype=dtype)
        return torch.empty_like(value, dtype=dtype, memory_format=torch.contiguous_format)

    grad_hidden = output(hidden, need_hidden, dtype if partial else hidden.dtype)
    grad_weight = output(weight, need_weight)
    grad_bias = output(bias, need_bias)

    # The largest coefficient to between 1/2 and 1, by an exact power of two (that float32 holds): a loss averaged
    # over many tokens would have entries below what float16 can hold.
    largest = logprob_grad.abs().amax() if len(hidden) else torch.zeros(())
    if entropy_grad is not None and len(hidden):
        largest = torch.maximum(largest, entropy_grad.abs().amax())
    exponent = torch.frexp(largest).exponent.where(largest.isfinite(), 0).clamp(-100, 100)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    g = torch.ldexp(logprob_grad, -exponent)
    e = None if entropy_grad is None else torch.ldexp(entropy_grad, -exponent)

    sparse, sparse_chosen = None, plan.sparse.nonzero().squeeze(1)
    if len(sparse_chosen) and len(weight):
        sparse = SparsePart(plan, sparse_chosen, hidden, weight, targets, temperature, results, g, e, head, kept, floor)
        others = plan.dense.index_fill(0, plan.tail_rows, False).nonzero().squeeze(1)
        chosen = torch.cat([plan.tail_rows[:1], plan.tail_rows, others])  # the first is the tail's
    else:
        chosen = plan.dense.nonzero().squeeze(1)
    if not len(chosen) or not len(weight):
        return grad_hidden.zero_(), grad_weight.zero_(), grad_bias.zero_()
    own = ops.multiplies(hidden.dtype)
    given = hidden.dtype if own else _gemm_dtype(hidden)
    if own:
        needed = (need_hidden, need_weight, need_bias)
        height, width, size = _own_products_tile(hidden, len(chosen), weight, needed, sparse is not None)
        workspace = rounded = hidden.new_empty(size, dtype=torch.uint8)
    else:
        height, width = _tile(hidden, len(chosen), weight, ops.TEMPORARIES)
        workspace = hidden.new_empty(min(height, len(chosen)) * width, dtype=dtype)
        rounded = workspace if given == dtype else hidden.new_empty(len(workspace))
    tile = dz = workspace  # views of it, where PyTorch multiplies
    everything = sparse is None and len(chosen) == len(hidden)
    rows = _Rows(hidden, None if everything else chosen, height, given, None if sparse is None else sparse.state)

    # The tail's row has no gradient of its own: no target, and a probability of zero whatever its logits.
    of_rows = Results(*(rows.take(r, math.inf if name == "maximum" else 0) for name, r in results._asdict().items()))
    coefficients = Coefficients.of(of_rows, rows.take(g, 0), rows.take_optional(e, 0))
    targets, temperature = rows.take(targets, -1), rows.take_optional(temperature, 1)
    w_scale = scale.item() if own else 1.0
    # The sum of dH is made where it stays, if it can be: in the first rows.
    in_place = grad_hidden.dtype == dtype and sparse is None
    h_sum = (
        grad_hidden if in_place else hidden.new_empty(rows.count if need_hidden else 0, hidden.shape[1], dtype=dtype)
    )
    w_sum = None
    if need_weight and weight.dtype != dtype and not (own and len(rows.blocks) == 1):
        w_sum = weight.new_empty(min(width, len(weight)), weight.shape[1], dtype=dtype)

    slices = list(_vocabulary_slices(len(weight), width, 1 if own else BLOCK))
    of_slices = [(slice(0, 0), slice(0, 0))] * len(slices)
    if sparse is not None:
        of_slices = sparse.of_slices([*(a for a, _ in slices), len(weight)])
    for (a, b), (touched, values) in zip(slices, of_slices, strict=True):
        w = weight[a:b].to(given)
        bias_slice = None if bias is None else bias[a:b].to(dtype).contiguous()
        w_slice = grad_weight[a:b] if w_sum is None else w_sum[: b - a]
        bias_sum = torch.zeros(b - a, dtype=dtype, device=hidden.device) if need_bias else None
        entries, addend = None, None
        if sparse is not None and touched.stop > touched.start:
            entries = sparse.touched[touched] - a
            addend = sparse.weight_rows(touched, values) if need_weight else None
        for block in rows.blocks:
            h = rows.load(block)
            t = None if temperature is None else temperature[block]
            arguments = (targets[block], a, head, bias_slice, t, coefficients.rows(block))
            first, last = block.start == 0, block.stop == rows.count
            with_tail = sparse if first else None
            tail = None if with_tail is None else with_tail.tail
            if own:
                addend_rows = None
                if entries is not None and addend is not None and last:
                    addend_rows = torch.full((b - a,), -1, dtype=torch.int32)
                    addend_rows[entries] = torch.arange(len(entries), dtype=torch.int32)
                ops.grad_products(
                    h, w, *arguments, h_sum[block] if need_hidden else None,
                    w_slice if need_weight and not (first and last) else None, need_weight and not first,
                    grad_weight[a:b] if need_weight and last else None, w_scale,
                    bias_sum, workspace, a > 0 and len(rows.blocks) == 1,
                    tail, 0.0 if with_tail is None else float(with_tail.bias), addend, addend_rows,
                )  # fmt: skip
                continue
            tile, dz = (x[: len(h) * (b - a)].view(len(h), b - a) for x in (workspace, rounded))
            _mm(h, w.t(), tile)
            if tail is not None:
                mixed = slice(0, len(tail[0]))
                t = None if t is None else t[mixed]
                of_tail = tail_probabilities(
                    tile[mixed], targets[mixed], a, head, bias_slice, t, coefficients.rows(mixed), *tail
                )
            ops.grad(tile, dz, *arguments)
            if tail is not None:
                dz[0] = of_tail
            if bias_sum is not None and with_tail is not None:
                bias_sum += dz[1:].sum(0, dtype=dtype) + of_tail * with_tail.bias
            elif bias_sum is not None:
                bias_sum += dz.sum(0, dtype=dtype)
            if need_hidden:
                _mm(dz, w, h_sum[block], add=a > 0)
            if need_weight:
                _mm(dz.t(), h, w_slice, add=block.start > 0)
        if need_weight and not own:
            if entries is not None and addend is not None:
                w_slice[entries] += addend
            torch.mul(w_slice, scale, out=grad_weight[a:b])
        if bias_sum is not None:
            if sparse is not None and entries is not None:
                bias_sum[entries] += sparse.bias_rows[touched]
            torch.mul(bias_sum, scale, out=grad_bias[a:b])
    if not need_hidden:
        return grad_hidden, grad_weight, grad_bias
    del workspace, rounded, w_sum, tile, dz
    if everything:
        torch.mul(h_sum, scale, out=grad_hidden)
    elif in_place:
        h_sum[: rows.count].mul_(scale)
        _spread_rows_(grad_hidden, chosen, height)
    else:
        grad_hidden.zero_()
        if sparse is not None:
            for places, sums in sparse.hidden_rows(h_sum[0]):
                grad_hidden[places] = sums.mul_(scale).to(grad_hidden.dtype)
        for block in rows.blocks:
            places, sums = chosen[block], h_sum[block].mul_(scale)
            if sparse is not None and block.start == 0:
                places, sums = places[1:], sums[1:]
            grad_hidden[places] = sums.to(grad_hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


# -------------------------------------------------------------------------------------------- the operators


@torch.library.custom_op("covgrpo::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    entropy: bool,
    ignore_index: int,
    grad_tol: float,
    keep: bool,
    chance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(log-prob, entropy, maximum, log of the normaliser over the maximum), 4 x [N], and for a backward with that
    tolerance what is kept of the rows: found [N] int32, entries [N, K] int32, logits [N, K]; no entries without
    ``keep`` or where the tolerance leaves no tail. ``chance`` is for the backward: `plan_backward`."""
    with tiles.on_device(hidden.device):
        floor = probability_floor(grad_tol) if keep else 0.0
        results, kept = _stream_forward(
            hidden, weight, bias, targets, temperature, Head(logit_scale, softcap), entropy, ignore_index, floor
        )
        return *results, *kept


@linear_logprob_op.register_fake
def _(hidden, weight, bias, targets, temperature, *settings):  # type: ignore[no-untyped-def]
    *_, grad_tol, keep, _chance = settings
    dtype, (rows,) = _accumulator_dtype(hidden.dtype), targets.shape
    capacity = CAPACITY if keep and probability_floor(grad_tol) else 0
    found, entries = (hidden.new_empty(shape, dtype=torch.int32) for shape in ((rows,), (rows, capacity)))
    return *(hidden.new_empty(rows, dtype=dtype) for _ in range(4)), found, entries, entries.to(dtype)


@torch.library.custom_op("covgrpo::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    results: list[Tensor],
    kept: list[Tensor],
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    plan: list[Tensor],
    grad_tol: float,
    needs: list[bool],
    partial: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden [N, D], dweight [V, D], dbias [V]), each rounded once to its input's dtype; dhidden, where ``partial``,
    not at all."""
    with tiles.on_device(hidden.device):
        return _stream_backward(
            hidden, weight, bias, targets, temperature, Head(logit_scale, softcap), Results(*results), Kept(*kept),
            logprob_grad, entropy_grad, BackwardPlan(*plan), probability_floor(grad_tol), needs, partial,
        )  # fmt: skip


@linear_logprob_backward_op.register_fake
def _(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    needs, partial = rest[10], rest[11] if len(rest) > 11 else False
    inputs = (hidden, weight, hidden if bias is None else bias)
    wanted = (needs[0], needs[1], needs[2] and bias is not None)
    dtypes = (_accumulator_dtype(hidden.dtype) if partial else hidden.dtype, hidden.dtype, hidden.dtype)
    return tuple(
        torch.empty(x.shape if want else (0,), dtype=dtype, device=x.device)
        for x, want, dtype in zip(inputs, wanted, dtypes, strict=True)
    )


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, scale, softcap, ctx.entropy, ctx.ignored, ctx.grad_tol, _, chance = inputs
    ctx.save_for_backward(*tensors, chance, *output)
    ctx.head = Head(scale, softcap)
    ctx.set_materialize_grads(False)


def _backward(ctx, logprob_grad, entropy_grad, *_):  # type: ignore[no-untyped-def]
    *inputs, chance = ctx.saved_tensors[:6]
    valid = inputs[3] != ctx.ignored
    grads = _gradients(ctx, inputs, chance, valid, ctx.saved_tensors[6:], logprob_grad, entropy_grad, None)
    return *grads, *[None] * 9


def _gradients(
    ctx: Any,
    inputs: Sequence[Any],  # the first five of `run_backward`
    chance: Tensor | None,  # [N]
    valid: Tensor,  # [N] bool
    output: Sequence[Tensor],  # of the forward
    logprob_grad: Tensor | None,  # [N]
    entropy_grad: Tensor | None,  # [N]
    vocabulary: VocabularySlice | None,
) -> tuple[Tensor | None, ...]:  # [N, D], [V, D], [V]
    hidden, weight, bias, targets, temperature = inputs
    results, kept = Results(*output[:4]), Kept(*output[4:])
    g = torch.zeros_like(results.logprob) if logprob_grad is None else logprob_grad.where(valid, 0)
    e = entropy_grad.where(valid, 0) if ctx.entropy and entropy_grad is not None else None
    plan = plan_backward(results, kept, targets, g, e, ctx.head, temperature, ctx.grad_tol, chance)
    g, e = plan.boosted(g), None if e is None else plan.boosted(e)
    return run_backward(
        hidden, weight, bias, targets, temperature, ctx.head, results, kept, g, e, plan, ctx.grad_tol,
        list(ctx.needs_input_grad[:3]), vocabulary,
    )  # fmt: skip


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "covgrpo_kernels computes first derivatives only: its backward can't be differentiated again "
        "(create_graph=True); covgrpo_kernels.reference can"
    )


linear_logprob_op.register_autograd(_backward, setup_context=_save_for_backward)
linear_logprob_backward_op.register_autograd(_refuse_double_backward)


# --------------------------------------------------------------------------------- a head spread over ranks


def run_forward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D], V of this rank
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    temperature: Tensor | None,  # [N]
    head: Head,
    entropy: bool,
    ignore_index: int,
    grad_tol: float,
    keep: bool,
    chance: Tensor | None,  # [N]
    vocabulary: VocabularySlice | None,
) -> tuple[Results, Kept, Tensor]:
    """Of the whole vocabulary, and the targets as `run_backward` takes them."""
    if vocabulary is None:
        output = linear_logprob_op(
            hidden, weight, bias, targets, temperature, *head, entropy, ignore_index, grad_tol, keep, chance
        )
        return Results(*output[:4]), Kept(*output[4:]), targets
    valid = targets != ignore_index
    if hidden.device.type == "cpu":
        _check_targets(targets, valid, vocabulary.total, ignore_index)
    local = targets - vocabulary.first
    here = valid & (local >= 0) & (local < len(weight))
    # A row whose target is elsewhere gets some target: its statistics do not depend on it. Without ``keep``: what a row
    # of the whole vocabulary leaves out sums to zero, what a slice of it leaves out does not.
    some = local.where(here, 0).where(valid, ignore_index) if len(weight) else torch.full_like(targets, ignore_index)
    output = linear_logprob_op(
        hidden, weight, bias, some, temperature, *head, entropy, ignore_index, grad_tol, False, chance
    )
    results, kept = Results(*output[:4]), Kept(*output[4:])
    if not len(weight):
        results = results._replace(maximum=torch.full_like(results.maximum, torch.nan))
    merged = merge_results(results, here, vocabulary.group)
    return Results(*(r.where(valid, 0) for r in merged)), kept, local.where(here, -1)


def run_backward(
    hidden: Tensor,  # [N, D], as the next seven of `run_forward`
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    head: Head,
    results: Results,
    kept: Kept,
    logprob_grad: Tensor,  # [N]
    entropy_grad: Tensor | None,  # [N]
    plan: BackwardPlan,
    grad_tol: float,
    needs: list[bool],  # hidden, weight, bias
    vocabulary: VocabularySlice | None,
) -> tuple[Tensor | None, ...]:  # [N, D], [V, D], [V]; None where not needed
    """Gradients of this rank's slice of the head, and the whole gradient of the hidden states, which all ranks have."""
    hidden_grad, *head_grads = linear_logprob_backward_op(
        hidden, weight, bias, targets, temperature, *head, list(results), list(kept), logprob_grad, entropy_grad,
        plan.tensors(), grad_tol, needs, vocabulary is not None,
    )  # fmt: skip
    if vocabulary is not None and needs[0]:
        hidden_grad = all_sum(hidden_grad, vocabulary.group).to(hidden.dtype)
    return tuple(x if need else None for x, need in zip((hidden_grad, *head_grads), needs, strict=True))


class _SlicedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | None,
        chance: Tensor | None,
        head: Head,
        entropy: bool,
        ignore_index: int,
        grad_tol: float,
        vocabulary: VocabularySlice,
    ) -> tuple[Tensor, Tensor]:
        results, kept, local = run_forward(
            hidden, weight, bias, targets, temperature, head, entropy, ignore_index, grad_tol, False, chance, vocabulary
        )
        valid = targets != ignore_index
        ctx.save_for_backward(hidden, weight, bias, local, temperature, chance, valid, *results, *kept)
        ctx.head, ctx.entropy, ctx.grad_tol, ctx.vocabulary = head, entropy, grad_tol, vocabulary
        ctx.set_materialize_grads(False)
        return results.logprob, results.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, logprob_grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, chance, valid = ctx.saved_tensors[:7]
        output = ctx.saved_tensors[7:]
        grads = _gradients(ctx, inputs, chance, valid, output, logprob_grad, entropy_grad, ctx.vocabulary)
        return *grads, *[None] * 8


# --------------------------------------------------------------------------------------- the public function


def _autocast(value: Any, dtype: torch.dtype) -> Any:
    """Autocast leaves float64 alone."""
    return value if value is None or value.dtype == torch.float64 else value.to(dtype)


class HeadInputs(NamedTuple):
    """Checked and flat inputs of the operators."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N] int64
    temperature: Tensor | None  # [N] float32 or float64; None: 1
    head: Head
    grad_tol: float
    vocabulary: VocabularySlice | None


def check_generator(generator: object, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on {device}, got {generator.device}")


def draw_chance(
    grad_mode: str, generator: torch.Generator | None, like: Tensor, vocabulary: VocabularySlice | None = None
) -> Tensor | None:
    """[N] of the unbiased mode, the same on all ranks of a head, and None of the other. Raises ValueError or TypeError,
    naming the argument."""
    if grad_mode not in ("bounded", "unbiased"):
        raise ValueError(f"grad_mode must be 'bounded' or 'unbiased', got {grad_mode!r}")
    check_generator(generator, like.device)
    if grad_mode == "bounded":
        return None
    chance = torch.rand(like.numel(), generator=generator, dtype=torch.float64, device=like.device)
    if vocabulary is not None:
        dist.broadcast(chance, group=vocabulary.group, group_src=0)
    return chance


def positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return float(value)


def prepare_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    grad_tol: float | str,
    vocab_group: dist.ProcessGroup | None,
) -> HeadInputs:
    """Checks what `linear_logprob` and `covgrpo_loss` share, applies autocast, flattens. Raises ValueError or
    TypeError naming the argument."""
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if hasattr(value, "full_tensor"):  # without the import, which takes half a second
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor: run the loss within the forward of the wrapped model "
                "(covgrpo_kernels.integrations.transformers.patch_model), or give value.to_local() of a head that is "
                "sharded over its entries, and its mesh's group as vocab_group"
            )
    check_floating("hidden", check_tensor("hidden", hidden))
    check_floating("weight", check_tensor("weight", weight, hidden))
    check_integer("targets", check_tensor("targets", targets, hidden))
    if weight.ndim != 2 or hidden.ndim < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [V, D] with D of hidden {list(hidden.shape)}, got {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have shape {list(hidden.shape[:-1])}, got {list(targets.shape)}")
    if bias is not None:
        check_floating("bias", check_tensor("bias", bias, hidden))
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape {list(weight.shape[:1])}, got {list(bias.shape)}")
    if isinstance(logit_scale, bool) or not isinstance(logit_scale, (int, float)):
        raise TypeError(f"logit_scale must be a number, got {type(logit_scale).__name__}")
    if not abs(logit_scale) < float("inf") or logit_scale == 0:
        raise ValueError(f"logit_scale must be finite and not zero, got {logit_scale!r}")
    cap = None if softcap is None else positive("softcap", softcap)
    row_temperature = None
    if isinstance(temperature, Tensor):
        check_floating("temperature", check_tensor("temperature", temperature, hidden))
        if temperature.ndim and temperature.shape != targets.shape:
            raise ValueError(
                f"temperature must be a number or have shape {list(targets.shape)}, got {list(temperature.shape)}"
            )
        if temperature.requires_grad:
            raise ValueError("temperature must not require a gradient, got one that does: none is computed for it")
        row_temperature = temperature.expand(targets.shape).reshape(-1).to(_accumulator_dtype(hidden.dtype))
    elif positive("temperature", temperature) != 1.0:
        dtype = _accumulator_dtype(hidden.dtype)
        row_temperature = torch.full((targets.numel(),), temperature, dtype=dtype, device=hidden.device)
    head = Head(float(logit_scale), cap)

    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = (_autocast(value, dtype) for value in (hidden, weight, bias))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {value.dtype}")
    tolerance, group = resolve_grad_tol(grad_tol, hidden.dtype), check_process_group("vocab_group", vocab_group)
    return HeadInputs(
        hidden.reshape(-1, hidden.shape[-1]) if hidden.shape[-1] else hidden.reshape(targets.numel(), 0),
        weight,
        bias,
        targets.reshape(-1).long(),
        row_temperature,
        head,
        tolerance,
        None if group is None else VocabularySlice.of(weight, group),
    )


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    grad_tol: float | str = "auto",
    grad_mode: str = "bounded",
    generator: torch.Generator | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> LinearLogprob:
    """Log-probs of the targets, and on request entropies, of softmax(softcap(scale * (h W^T + b)) / T), in nats.

    The logits never exist: a pass over the vocabulary in slices forward, another one backward. Differentiable
    once in hidden, weight and bias; each gradient is computed only if it is required.

    Args:
        hidden: [..., D] last hidden states; float32, bfloat16, float16 or float64.
        weight: [V, D] head, same dtype (under autocast both are cast, as `F.linear` does).
        targets: [...] integer token ids in [0, V), or ``ignore_index``.
        bias: [V], same dtype.
        temperature: a positive number, or a floating tensor [...] with one for each token.
        logit_scale: multiplies products and bias (Cohere, Granite).
        softcap: s of s * tanh(z / s), before the temperature (Gemma-2).
        entropy: compute entropies too; they are differentiable.
        ignore_index: rows with this target are not computed: zeros out, no gradient, whatever they hold.
        grad_tol: bound on the relative error of dL/dlogits in the Frobenius norm, which the backward may use to do with
            a row's probable entries and a common tail, or without a row. 0.0 is exact; ``"auto"`` is an eighth of
            the dtype's machine epsilon.
        grad_mode: ``"unbiased"``: instead, rows of small gradient are left out at random and the others multiplied so
            that the expected gradient is exact; ``grad_tol`` bounds the root mean square of the error.
        generator: of that, on the device of ``hidden``; None: torch's.
        vocab_group: ranks that share the head (Megatron's tensor parallelism): each gives the same hidden states and
            targets, and its slice of weight and bias, consecutive ones of any sizes in the order of the ranks. Outputs
            and the gradient of the hidden states are the whole ones, those of weight and bias the slice's. All ranks
            run forward and backward. No rows are sparse then: sparse ones need whole rows.

    Returns:
        LinearLogprob(logprob, entropy), [...] in float32 (float64 for float64 inputs); entropy is None unless
        asked for. Logits and all sums are float32 at least, whatever the input dtype; on a GPU a target
        outside [0, V) gives NaN.

    Raises:
        TypeError, ValueError: a wrong argument, by name; on a CPU also a target outside [0, V).
    """
    check_flag("entropy", entropy)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    x = prepare_head(hidden, weight, targets, bias, temperature, logit_scale, softcap, grad_tol, vocab_group)
    chance = draw_chance(grad_mode, generator, x.targets, x.vocabulary)
    if x.vocabulary is not None:
        logprob, h = _SlicedLogprob.apply(*x[:5], chance, x.head, entropy, ignore_index, x.grad_tol, x.vocabulary)
        return LinearLogprob(logprob.reshape(targets.shape), h.reshape(targets.shape) if entropy else None)
    inputs = (x.hidden, x.weight, x.bias)
    keep = chance is None and torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    logprob, h, *_ = linear_logprob_op(
        x.hidden, x.weight, x.bias, x.targets, x.temperature,
        x.head.scale, x.head.softcap, entropy, ignore_index, x.grad_tol, keep, chance,
    )  # fmt: skip
    return LinearLogprob(logprob.reshape(targets.shape), h.reshape(targets.shape) if entropy else None)
