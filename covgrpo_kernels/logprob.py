"""`linear_logprob`: log-probs and entropies from hidden states and the head, without the logits.

Four layers: the public function, the operators (fake, autograd), the chunk loop, the tile operations (`tiles/`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tiles
from .backward_plan import plan_backward, resolve_grad_tol
from .config import IGNORE_INDEX, check_flag
from .layout import check_floating, check_integer, check_tensor
from .tiles.interface import BLOCK, Coefficients, Head, Results, State


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
    hidden: Tensor, rows: int, weight: Tensor, needs: tuple[bool, bool, bool] | None
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
            return ops.grad_products_bytes(r, c, depth, dtype, needs) + gathered * r + rounded * c * depth

    r, c = _fitting((max(min(r, rows), 1), c), need, WORKSPACE_BYTES["cpu"], vocab, smallest=(64, 256))
    if needs is None:
        return r, max(vocab, 1), ops.fold_products_bytes(r, vocab, depth, dtype)
    return r, c, ops.grad_products_bytes(r, c, depth, dtype, needs)


def _vocabulary_slices(vocab: int, width: int, unit: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Slices of ``width``; the last ones are a multiple of ``unit`` and the rest, so that every tile is blocks."""
    whole = vocab - vocab % unit
    edges = [*range(0, whole, width), whole, vocab]
    return ((a, b) for a, b in itertools.pairwise(edges) if a < b)


class _Rows:
    """Chosen rows of the [N, ...] inputs, loaded a block at a time; all rows without a copy."""

    def __init__(self, hidden: Tensor, chosen: Tensor | None, block: int, dtype: torch.dtype) -> None:
        self.hidden, self.chosen, self.dtype = hidden, chosen, dtype
        self.count = len(hidden) if chosen is None else len(chosen)
        self.blocks = [slice(i, min(i + block, self.count)) for i in range(0, self.count, block)]
        self._only = self._load(self.blocks[0]) if len(self.blocks) == 1 else None

    def take(self, value: Tensor) -> Tensor:
        return value.contiguous() if self.chosen is None else value[self.chosen]

    def take_optional(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else self.take(value)

    def _load(self, block: slice) -> Tensor:
        rows = self.hidden[block] if self.chosen is None else self.hidden[self.chosen[block]]
        return rows.to(self.dtype)

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
) -> Results:  # of N rows, zeros where ignored
    ops = tiles.select(hidden.device)
    valid = targets != ignore_index
    if hidden.device.type == "cpu":
        bad = valid & ((targets < 0) | (targets >= len(weight)))
        if bad.any():
            raise ValueError(f"targets must be in [0, {len(weight)}) or {ignore_index}, got {targets[bad][0].item()}")
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
    targets, temperature = rows.take(targets), rows.take_optional(temperature)
    state = State.empty(count, dtype, hidden.device)
    if count:
        for a, b in _vocabulary_slices(len(weight), width, 1 if own else BLOCK):
            w = weight[a:b].to(given)
            bias_slice = None if bias is None else bias[a:b].to(dtype).contiguous()
            for block in rows.blocks:
                h = rows.load(block)
                t = None if temperature is None else temperature[block]
                arguments = (state.rows(block), targets[block], a, head, bias_slice, t, entropy)
                if own:
                    ops.fold_products(h, w, *arguments, workspace)
                else:
                    tile = workspace[: len(h) * (b - a)].view(len(h), b - a)
                    _mm(h, w.t(), tile)
                    ops.fold(tile, *arguments)
    results = state.results()
    if chosen is None:
        return Results(*(r.where(valid, 0) for r in results))
    return Results(*(r.new_zeros(len(hidden)).index_copy_(0, chosen, r) for r in results))


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
    logprob_grad: Tensor,  # [N]
    entropy_grad: Tensor | None,  # [N]
    live: Tensor,  # [N] bool, of the plan
    needs: list[bool],  # hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], [V, D], [V]; empty where not needed
    ops = tiles.select(hidden.device)
    need_hidden, need_weight, need_bias = needs[0], needs[1], needs[2] and bias is not None
    dtype = _accumulator_dtype(hidden.dtype)

    def output(value: Tensor | None, needed: bool) -> Tensor:
        if value is None or not needed:
            return hidden.new_empty(0)
        return torch.empty_like(value, memory_format=torch.contiguous_format)

    grad_hidden, grad_weight = output(hidden, need_hidden), output(weight, need_weight)
    grad_bias = output(bias, need_bias)

    chosen = live.nonzero().squeeze(1)
    if not len(chosen) or not len(weight):
        return grad_hidden.zero_(), grad_weight.zero_(), grad_bias.zero_()
    own = ops.multiplies(hidden.dtype)
    given = hidden.dtype if own else _gemm_dtype(hidden)
    if own:
        height, width, size = _own_products_tile(hidden, len(chosen), weight, (need_hidden, need_weight, need_bias))
        workspace = rounded = hidden.new_empty(size, dtype=torch.uint8)
    else:
        height, width = _tile(hidden, len(chosen), weight, ops.TEMPORARIES)
        workspace = hidden.new_empty(min(height, len(chosen)) * width, dtype=dtype)
        rounded = workspace if given == dtype else hidden.new_empty(len(workspace))
    tile = dz = workspace  # views of it, where PyTorch multiplies
    rows = _Rows(hidden, None if len(chosen) == len(hidden) else chosen, height, given)

    # The largest coefficient to between 1/2 and 1, by an exact power of two (that float32 holds): a loss averaged
    # over many tokens would have entries below what float16 can hold.
    largest = logprob_grad.abs().amax()
    if entropy_grad is not None:
        largest = torch.maximum(largest, entropy_grad.abs().amax())
    exponent = torch.frexp(largest).exponent.where(largest.isfinite(), 0).clamp(-100, 100)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    g = rows.take(torch.ldexp(logprob_grad, -exponent))
    e = None if entropy_grad is None else rows.take(torch.ldexp(entropy_grad, -exponent))
    coefficients = Coefficients.of(Results(*(rows.take(r) for r in results)), g, e)

    w_scale = scale.item() if own else 1.0
    targets, temperature = rows.take(targets), rows.take_optional(temperature)
    # The sum of dH is made where it stays, if it can be: in the first rows.
    h_sum = grad_hidden if hidden.dtype == dtype else hidden.new_empty(rows.count, hidden.shape[1], dtype=dtype)
    w_sum = None
    if need_weight and weight.dtype != dtype and not (own and len(rows.blocks) == 1):
        w_sum = weight.new_empty(min(width, len(weight)), weight.shape[1], dtype=dtype)

    for a, b in _vocabulary_slices(len(weight), width, 1 if own else BLOCK):
        w = weight[a:b].to(given)
        bias_slice = None if bias is None else bias[a:b].to(dtype).contiguous()
        w_slice = grad_weight[a:b] if w_sum is None else w_sum[: b - a]
        bias_sum = torch.zeros(b - a, dtype=dtype, device=hidden.device) if need_bias else None
        for block in rows.blocks:
            h = rows.load(block)
            t = None if temperature is None else temperature[block]
            arguments = (targets[block], a, head, bias_slice, t, coefficients.rows(block))
            if own:
                first, last = block.start == 0, block.stop == rows.count
                ops.grad_products(
                    h, w, *arguments, h_sum[block] if need_hidden else None,
                    w_slice if need_weight and not (first and last) else None, need_weight and not first,
                    grad_weight[a:b] if need_weight and last else None, w_scale,
                    bias_sum, workspace, a > 0 and len(rows.blocks) == 1,
                )  # fmt: skip
                continue
            tile, dz = (x[: len(h) * (b - a)].view(len(h), b - a) for x in (workspace, rounded))
            _mm(h, w.t(), tile)
            ops.grad(tile, dz, *arguments)
            if bias_sum is not None:
                bias_sum += dz.sum(0, dtype=dtype)
            if need_hidden:
                _mm(dz, w, h_sum[block], add=a > 0)
            if need_weight:
                _mm(dz.t(), h, w_slice, add=block.start > 0)
        if need_weight and not own:
            torch.mul(w_slice, scale, out=grad_weight[a:b])
        if bias_sum is not None:
            torch.mul(bias_sum, scale, out=grad_bias[a:b])
    if not need_hidden:
        return grad_hidden, grad_weight, grad_bias
    del workspace, rounded, w_sum, tile, dz
    if rows.chosen is None:
        torch.mul(h_sum, scale, out=grad_hidden)
    elif h_sum is grad_hidden:
        h_sum[: rows.count].mul_(scale)
        _spread_rows_(grad_hidden, chosen, height)
    else:
        grad_hidden.zero_()
        for block in rows.blocks:
            grad_hidden[chosen[block]] = h_sum[block].mul_(scale).to(hidden.dtype)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-prob, entropy, maximum, log of the normaliser over the maximum), 4 x [N]."""
    with tiles.on_device(hidden.device):
        return _stream_forward(
            hidden, weight, bias, targets, temperature, Head(logit_scale, softcap), entropy, ignore_index
        )


@linear_logprob_op.register_fake
def _(hidden, weight, bias, targets, temperature, *settings):  # type: ignore[no-untyped-def]
    dtype = _accumulator_dtype(hidden.dtype)
    return tuple(torch.empty(targets.shape, dtype=dtype, device=hidden.device) for _ in range(4))


@torch.library.custom_op("covgrpo::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    logprob: Tensor,
    entropy: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    live: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden [N, D], dweight [V, D], dbias [V]), each rounded once to its input's dtype."""
    with tiles.on_device(hidden.device):
        return _stream_backward(
            hidden, weight, bias, targets, temperature, Head(logit_scale, softcap),
            Results(logprob, entropy, maximum, log_total), logprob_grad, entropy_grad, live, needs,
        )  # fmt: skip


@linear_logprob_backward_op.register_fake
def _(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    needs = rest[-1]
    inputs = (hidden, weight, hidden if bias is None else bias)
    wanted = (needs[0], needs[1], needs[2] and bias is not None)
    return tuple(
        torch.empty(x.shape if want else (0,), dtype=x.dtype if want else hidden.dtype, device=x.device)
        for x, want in zip(inputs, wanted, strict=True)
    )


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, scale, softcap, ctx.entropy, ctx.ignored, ctx.grad_tol = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.head = Head(scale, softcap)
    ctx.set_materialize_grads(False)


def _backward(ctx, logprob_grad, entropy_grad, _maximum_grad, _log_total_grad):  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, temperature, logprob, entropy, maximum, log_total = ctx.saved_tensors
    head = ctx.head
    valid = targets != ctx.ignored
    g = torch.zeros_like(logprob) if logprob_grad is None else logprob_grad.where(valid, 0)
    e = entropy_grad.where(valid, 0) if ctx.entropy and entropy_grad is not None else None
    plan = plan_backward(logprob, entropy, maximum + log_total, g, e, head, temperature, ctx.grad_tol)
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    grads = linear_logprob_backward_op(
        hidden, weight, bias, targets, temperature, head.scale, head.softcap,
        logprob, entropy, maximum, log_total, g, e, plan.live, needs,
    )  # fmt: skip
    return *(x if need else None for x, need in zip(grads, needs, strict=True)), *[None] * 7


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "covgrpo_kernels computes first derivatives only: its backward can't be differentiated again "
        "(create_graph=True); covgrpo_kernels.reference can"
    )


linear_logprob_op.register_autograd(_backward, setup_context=_save_for_backward)
linear_logprob_backward_op.register_autograd(_refuse_double_backward)


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
) -> HeadInputs:
    """Checks what `linear_logprob` and `covgrpo_loss` share, applies autocast, flattens. Raises ValueError or
    TypeError naming the argument."""
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
    return HeadInputs(
        hidden.reshape(-1, hidden.shape[-1]) if hidden.shape[-1] else hidden.reshape(targets.numel(), 0),
        weight,
        bias,
        targets.reshape(-1).long(),
        row_temperature,
        head,
        resolve_grad_tol(grad_tol, hidden.dtype),
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
        grad_tol: rows of small gradient are left out of the backward so long as the sum of what is left out is
            certified to be at most this fraction of |dL/dlogits|_1. 0.0 is exact; ``"auto"`` is a quarter of
            the dtype's machine epsilon.

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
    x = prepare_head(hidden, weight, targets, bias, temperature, logit_scale, softcap, grad_tol)
    logprob, h, _, _ = linear_logprob_op(
        x.hidden, x.weight, x.bias, x.targets, x.temperature,
        x.head.scale, x.head.softcap, entropy, ignore_index, x.grad_tol,
    )  # fmt: skip
    return LinearLogprob(logprob.reshape(targets.shape), h.reshape(targets.shape) if entropy else None)
