"""Sequences packed in a line, as models take them, to what `covgrpo_loss` and `linear_logprob` take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_integer
from .config import IGNORE_INDEX


class PackedSequences(NamedTuple):
    """What `packed_sequences` returns.

    Attributes:
        targets: [N] or [1, N] as ``input_ids``, int64: the token after each; -100 at the last one of a sequence.
        sequence_ids: likewise, from 0 on.
        position_ids: likewise, for the model: with them and no attention mask, sequences do not see each other.
    """

    targets: Tensor  # [N] or [1, N] int64, the token after each; -100 at the last one of a sequence
    sequence_ids: Tensor  # likewise, from 0 on
    position_ids: Tensor  # likewise, for the model: with them and no attention mask, sequences don't see each other


def packed_sequences(
    input_ids: Tensor, *, position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> PackedSequences:
    """Targets and sequence ids of packed sequences.

    The state at a token predicts the token after it, so whatever else belongs to tokens (a mask, advantages, old
    log-probs) goes to the loss as ``value.roll(-1, -1)``; what that brings to a last token is masked by its target.

    Args:
        input_ids: [N] or [1, N] integers; or labels, where those that are -100 are no targets.
        position_ids: of the shape of ``input_ids``; a sequence ends where the next position is not one more.
        cu_seqlens: [S + 1] instead, the places where sequences begin, and N: 0, ..., N.

    Raises:
        TypeError, ValueError: a wrong argument, by name; on a CPU also places in ``cu_seqlens`` that are not ascending
            from 0 to N.
    """
    check_integer("input_ids", input_ids)
    if input_ids.ndim not in (1, 2) or (input_ids.ndim == 2 and len(input_ids) != 1):
        raise ValueError(f"input_ids must have shape [N] or [1, N], got {list(input_ids.shape)}")
    if (position_ids is None) == (cu_seqlens is None):
        raise ValueError("position_ids or cu_seqlens must be given, and not both")
    tokens = input_ids.reshape(-1).long()
    place = torch.arange(len(tokens), device=tokens.device)
    if position_ids is not None:
        check_integer("position_ids", position_ids, input_ids)
        if position_ids.shape != input_ids.shape:
            raise ValueError(f"position_ids must have shape {list(input_ids.shape)}, got {list(position_ids.shape)}")
        positions = position_ids.reshape(-1).long()
        begins = positions != positions.roll(1) + 1
        begins[:1] = False
        sequences = begins.cumsum(0)
    else:
        assert cu_seqlens is not None
        check_integer("cu_seqlens", cu_seqlens, input_ids)
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens must have shape [S + 1], got {list(cu_seqlens.shape)}")
        ends = cu_seqlens.long()
        if ends.device.type == "cpu" and (ends[0] != 0 or ends[-1] != len(tokens) or (ends.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must ascend from 0 to the {len(tokens)} tokens, got {ends.tolist()}")
        sequences = torch.searchsorted(ends[1:], place, right=True)
        positions = place - ends[sequences]
    is_last = sequences != sequences.roll(-1)
    is_last[-1:] = True
    targets = tokens.roll(-1).where(~is_last, IGNORE_INDEX)
    return PackedSequences(*(value.reshape(input_ids.shape) for value in (targets, sequences, positions)))
