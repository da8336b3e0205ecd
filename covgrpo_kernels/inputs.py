"""From a caller's arguments to flat, checked inputs: the head's and the tokens'."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .checks import (
    check_floating,
    check_generator,
    check_int,
    check_integer,
    check_number,
    check_one_of,
    check_positive,
    check_process_group,
    check_shape,
    check_tensor,
)
from .collectives import all_counts, all_reduce_sum
from .config import CovarianceWeighting
from .kernels.interface import LogitTransform
from .segments import Segments
from .vocab_parallel import VocabSlice

# ------------------------------------------------------------------------------------------------------- the head


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and sums: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


class HeadInputs(NamedTuple):
    """Rows and the head that they go through, flat and checked. All but the matrices are contiguous."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N] int64
    temperature: Tensor | None  # [N] float32 or float64; None: 1
    transform: LogitTransform


class Precision(NamedTuple):
    """What the backward may leave out."""

    grad_tol: float
    uniform: Tensor | None  # [N] float64 in [0, 1), the random numbers of the unbiased mode; None: the bounded mode


class PreparedHead(NamedTuple):
    inputs: HeadInputs
    precision: Precision
    vocab_slice: VocabSlice | None
    needs_grad: bool  # whether there can be a backward


def resolve_grad_tol(grad_tol: float | str, dtype: torch.dtype) -> float:
    """``"auto"`` is an eighth of the dtype's machine epsilon: half of what rounding dL/dlogits to it costs. At twice
    that, in two of the seeds tried, the head of the minimal loop's policy moved further from an exact run than rounding
    moves it."""
    if grad_tol == "auto":
        return torch.finfo(dtype).eps / 8
    if isinstance(grad_tol, str):
        raise TypeError(f"grad_tol must be a number or 'auto', got {grad_tol!r}")
    value = check_number("grad_tol", grad_tol)
    if not 0 <= value < 1:
        raise ValueError(f"grad_tol must be at least 0 and less than 1, got {grad_tol!r}")
    return value


def prepare_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    grad_tol: float | str,
    grad_mode: str,
    generator: torch.Generator | None,
    vocab_group: dist.ProcessGroup | None,
) -> PreparedHead:
    """Checks the arguments that `linear_logprob` and `covgrpo_loss` share, applies autocast, flattens.

    Raises ValueError or TypeError naming the argument.
    """
    _check_plain(hidden=hidden, weight=weight, bias=bias)
    check_floating("hidden", hidden)
    if hidden.is_meta:
        raise ValueError("hidden must be on a device that holds values, got meta")
    check_floating("weight", weight, hidden)
    check_integer("targets", targets, hidden)
    if weight.ndim != 2 or hidden.ndim < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [V, D] with D of hidden {list(hidden.shape)}, got {list(weight.shape)}"
        )
    check_shape("targets", targets, hidden.shape[:-1])
    if bias is not None:
        check_shape("bias", check_floating("bias", bias, hidden), weight.shape[:1])
    if check_number("logit_scale", logit_scale) == 0:
        raise ValueError(f"logit_scale must not be zero, got {logit_scale!r}")
    transform = LogitTransform(float(logit_scale), None if softcap is None else check_positive("softcap", softcap))
    row_temperature = _row_temperature(temperature, hidden, targets)
    check_one_of("grad_mode", grad_mode, ("bounded", "unbiased"))
    check_generator("generator", generator, hidden.device)

    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = (_autocast(value, dtype) for value in (hidden, weight, bias))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}, got {value.dtype}: pass "
                f"{name}.to(hidden.dtype), whose gradient reaches {name} in its own dtype, or use torch.autocast"
            )
    tolerance, group = resolve_grad_tol(grad_tol, hidden.dtype), check_process_group("vocab_group", vocab_group)
    inputs = HeadInputs(
        hidden.reshape(targets.numel(), hidden.shape[-1]),
        weight,
        None if bias is None else bias.contiguous(),
        targets.reshape(-1).long().contiguous(),
        row_temperature,
        transform,
    )
    vocab_slice = None if group is None else VocabSlice.of(weight, group)
    uniform = None if grad_mode == "bounded" else _draw_uniform(generator, targets, vocab_slice)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    return PreparedHead(inputs, Precision(tolerance, uniform), vocab_slice, needs_grad)


def is_plain(value: object) -> bool:
    """Whether a tensor's values are the ones that products are made of. Those of a subclass need not be: a quantized
    weight may compute with others in an ``F.linear`` of its own, which nothing here calls. What compilers and
    collectives put in the place of a tensor is as good as it."""
    if type(value) in (Tensor, nn.Parameter) or isinstance(value, (FakeTensor, FunctionalTensor)):
        return True
    return isinstance(value, Tensor) and type(value).__name__ == "AsyncCollectiveTensor"


def _check_plain(**values: object) -> None:
    for name, value in values.items():
        if hasattr(value, "full_tensor"):  # a DTensor; importing the class takes half a second
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor: run the loss within the forward of the wrapped model "
                "(covgrpo_kernels.integrations.transformers.patch_model), or pass value.to_local() of a head that is "
                "sharded over its vocabulary, and the group of its mesh as vocab_group"
            )
        if isinstance(value, Tensor) and not is_plain(value):
            raise TypeError(
                f"{name} must be a plain tensor, got a {type(value).__name__}: pass the values that it stands for, "
                "of a quantized weight the dequantized ones"
            )


def check_values(targets: Tensor, temperature: Tensor | None, vocab: int, ignore_index: int) -> None:
    """Raises ValueError for what is wrong in a row that is not ignored."""
    valid = targets != ignore_index
    bad = valid & ((targets < 0) | (targets >= vocab))
    if bad.any():
        raise ValueError(f"targets must be in [0, {vocab}) or {ignore_index}, got {targets[bad][0].item()}")
    if temperature is not None:
        bad = valid & ~((temperature > 0) & temperature.isfinite())
        if bad.any():
            raise ValueError(f"temperature must be positive and finite, got {temperature[bad][0].item()}")


def _autocast(value: Any, dtype: torch.dtype) -> Any:
    """Autocast leaves float64 alone."""
    return value if value is None or value.dtype == torch.float64 else value.to(dtype)


def _row_temperature(temperature: float | Tensor, hidden: Tensor, targets: Tensor) -> Tensor | None:
    """[N], or None for 1."""
    dtype = accumulator_dtype(hidden.dtype)
    if not isinstance(temperature, Tensor):
        if check_positive("temperature", temperature) == 1.0:
            return None
        return torch.full((targets.numel(),), temperature, dtype=dtype, device=hidden.device)
    check_floating("temperature", temperature, hidden)
    if temperature.ndim:
        check_shape("temperature", temperature, targets.shape)
    if temperature.requires_grad:
        raise ValueError("temperature must not require a gradient, got one that does: none is computed for it")
    return temperature.expand(targets.shape).reshape(-1).to(dtype).contiguous()


def _draw_uniform(generator: torch.Generator | None, like: Tensor, vocab_slice: VocabSlice | None) -> Tensor:
    """[N], the same on all ranks of a head."""
    uniform = torch.rand(like.numel(), generator=generator, dtype=torch.float64, device=like.device)
    if vocab_slice is not None:
        dist.broadcast(uniform, group=vocab_slice.group, group_src=0)
    return uniform


# ----------------------------------------------------------------------------------------------------- the tokens


class Tokens(NamedTuple):
    """The tokens of one batch, flat."""

    advantages: Tensor  # [N] float32 or float64, zero where masked
    valid: Tensor  # [N] bool
    groups: Segments | None
    sequences: Segments | None
    process_group: dist.ProcessGroup | None = None  # ranks whose tokens make up the batch

    def count_valid(self) -> Tensor:  # [] int64
        """Valid tokens of the batch."""
        return all_reduce_sum(self.valid.sum(), self.process_group)

    def count_sequences(self, lengths: Tensor) -> Tensor:  # [S] -> [] int64
        """Sequences of the batch that have a valid token; ``lengths`` are their valid tokens."""
        assert self.sequences is not None
        there = (lengths > 0).sum()
        there = all_reduce_sum(there, self.process_group)
        if self.sequences.process_group is None:
            return there
        ranks = self.sequences.process_group.size()
        return there // ranks  # each rank that shares a sequence has counted it


def check_sequence_ids(tokens: Tokens, weighting: CovarianceWeighting) -> None:
    """Raises ValueError where the weighting needs to know responses, and does not."""
    by_response = weighting.centering == "sequence" or weighting.advantage_centering == "response"
    if by_response and tokens.sequences is None:
        raise ValueError("sequence_ids must be given for packed tokens with this weighting, got None")


def flatten(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """[B] or [B, T] for shape [B, T], [N] for shape [N], to [N]."""
    check_shape(name, value, shape, *([shape[:1]] if len(shape) == 2 else []))
    return (value if value.shape == shape else value.unsqueeze(1).expand(shape)).reshape(-1)


def flatten_floats(
    name: str, value: Tensor | None, like: Tensor, valid: Tensor, dtype: torch.dtype, *, per_token: bool = False
) -> Tensor | None:
    """An optional input to [N], zero where masked whatever stood there. ``per_token``: [B] is no shape for it."""
    if value is None:
        return None
    check_floating(name, value, like)
    if per_token:
        check_shape(name, value, like.shape)
    return flatten(name, value.detach(), like.shape).to(dtype).where(valid, 0)


def check_layout(name: str, like: Tensor) -> None:
    if like.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape [B, T] or [N], got {list(like.shape)}")


def valid_tokens(name: str, like: Tensor, mask: Tensor | None) -> Tensor:
    """[N] bool: where the mask is not zero, or everywhere. The mask is checked against ``like``, the argument
    ``name``."""
    check_layout(name, like)
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool).reshape(-1)
    check_shape("mask", check_tensor("mask", mask, like), like.shape)
    return mask.reshape(-1) != 0


def flatten_tokens(
    like: Tensor,  # [B, T] or [N]: targets or log-probs
    advantages: Tensor,  # [B], [B, T] or [N]
    valid: Tensor,  # [N]
    *,
    dtype: torch.dtype,
    group_ids: Tensor | None,
    group_size: int | None,
    sequence_ids: Tensor | None,
    process_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
) -> Tokens:
    """Checks the layout and flattens it.

    Raises ValueError or TypeError, naming the argument, for advantages, ids or sizes that fit no layout.
    """
    flat_advantages = flatten_floats("advantages", check_tensor("advantages", advantages), like, valid, dtype)
    assert flat_advantages is not None
    process_group = check_process_group("process_group", process_group)
    sequence_group = check_process_group("sequence_group", sequence_group)
    process_group = sequence_group if process_group is None else process_group
    _check_group_size(group_size, like.shape, group_ids, sequence_ids, process_group, sequence_group)
    if group_ids is not None:
        group_ids = flatten("group_ids", check_integer("group_ids", group_ids, like), like.shape)
    if sequence_ids is not None:
        check_shape("sequence_ids", check_integer("sequence_ids", sequence_ids, like), like.shape)

    sequences = None
    if sequence_ids is not None:
        sequences = Segments.of_ids(sequence_ids.reshape(-1), sequence_group)
    elif like.ndim == 2:
        sequences = _rows_as_sequences(like, sequence_group)
    groups = None
    if group_ids is not None:
        groups = Segments.of_ids(group_ids, process_group)
    elif group_size is not None:
        groups = _consecutive_groups(like, group_size, process_group)
    return Tokens(flat_advantages, valid, groups, sequences, process_group)


def _check_group_size(
    group_size: int | None,
    shape: torch.Size,
    group_ids: Tensor | None,
    sequence_ids: Tensor | None,
    process_group: dist.ProcessGroup | None,
    sequence_group: dist.ProcessGroup | None,
) -> None:
    if group_size is None:
        return
    if group_ids is not None:
        raise ValueError("group_size must be None where group_ids is given, got both")
    check_int("group_size", group_size)
    if len(shape) != 2 or sequence_ids is not None or sequence_group is not None:
        raise ValueError(
            f"group_size needs [B, T] rows of one response each, got {list(shape)}; "
            "packed tokens and parts of sequences take group_ids"
        )
    if group_size < 1 or (process_group is None and shape[0] % group_size):
        raise ValueError(f"group_size must divide the {shape[0]} rows, got {group_size}")


def _rows_as_sequences(like: Tensor, sequence_group: dist.ProcessGroup | None) -> Segments:  # [B, T]
    rows, length = like.shape
    if sequence_group is not None and len(set(all_counts(rows, like.device, sequence_group))) > 1:
        raise ValueError(f"sequence_group must share its rows, or get sequence_ids: here are {rows} rows")
    index = torch.arange(like.numel(), device=like.device) // max(length, 1)
    return Segments.of(index, rows, sequence_group, is_sorted=True)


def _consecutive_groups(like: Tensor, group_size: int, process_group: dist.ProcessGroup | None) -> Segments:  # [B, T]
    here, length = like.shape
    counts = [here] if process_group is None else all_counts(here, like.device, process_group)
    rows, before = sum(counts), 0 if process_group is None else sum(counts[: process_group.rank()])
    if rows % group_size:
        raise ValueError(f"group_size must divide the {rows} rows of all ranks, got {group_size}")
    index = (before + torch.arange(like.numel(), device=like.device) // max(length, 1)) // group_size
    return Segments.of(index, rows // group_size, process_group, is_sorted=True)
