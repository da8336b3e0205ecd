"""A policy that computes what its rows have in common once: the instructions of all prompts, a prompt for its whole
group, responses as far as they are alike.

The rows of a batch make a tree of their prefixes. Its nodes are the model's one sequence, in which a token sees those
of its own branch alone, at their distance from the root. The states are those of the padded rows, but for rounding, and
so are their gradients, which autograd adds up where rows share a node. On groups of short responses the model then sees
a tenth of the tokens or less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from covgrpo_kernels.grpo.policy import Policy


class PrefixTree(NamedTuple):
    """Of B rows of length L, with M different prefixes."""

    tokens: Tensor  # [1, M] the last token of each prefix; a prefix stands behind those that it begins with
    positions: Tensor  # [1, M] their lengths, less one
    visible: Tensor  # [1, 1, M, M] bool: what a token attends to
    places: Tensor  # [B, L] the node of a row's token; an arbitrary one for padding

    @classmethod
    def of(cls, tokens: Tensor, attention: Tensor) -> PrefixTree:  # [B, L], of both
        """Raises ValueError for a batch without tokens."""
        if not attention.any():
            raise ValueError("attention must have a token, got none")
        valid = attention.bool()
        depth = (attention.cumsum(1) - 1).clamp(min=0)  # [B, L] of a token in its row
        at = torch.full_like(tokens[:, 0], -1)  # [B] the node that a row is at, -1: before its first
        places = torch.zeros_like(tokens)
        found: list[int] = []
        parents: list[int] = []
        for length in range(int(depth.max()) + 1):
            here = valid & (depth == length)  # one token of a row at most
            going_on = here.any(1)
            new, which = torch.stack([at[going_on], tokens[here]], 1).unique(dim=0, return_inverse=True)
            at[going_on] = which + len(parents)
            places[here] = at[going_on]
            found += new[:, 1].tolist()
            parents += new[:, 0].tolist()
        visible = torch.eye(len(parents), dtype=torch.bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                visible[node] |= visible[parent]
        device = tokens.device
        return cls(
            torch.tensor([found], device=device),
            (visible.sum(1) - 1).unsqueeze(0).to(device),
            visible.view(1, 1, *visible.shape).to(device),
            places,
        )


@dataclass
class PrefixTreePolicy(Policy):
    """For models whose layers all attend to everything before a token: no windows, no states."""

    def forward(self, tokens: Tensor, attention: Tensor, **options: Any) -> Any:  # [B, L], [B, >= L]
        if options.get("past_key_values") is not None:  # of tokens that sampling goes on from, each row its own
            return super().forward(tokens, attention, **options)
        tree = PrefixTree.of(tokens, attention)
        if head := options.pop("head", None):
            options["head"] = lambda hidden, weight, **how: head(hidden[0][tree.places], weight, **how)
        elif options.pop("logits_to_keep", None) == 1:
            options["logits_to_keep"] = tree.places[:, -1]
        else:
            raise ValueError("forward must be called with head, or with logits_to_keep=1")
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.model(tree.tokens, attention_mask=tree.visible, position_ids=tree.positions, **options)
        if head is None:
            out.logits = out.logits.transpose(0, 1)  # [B, 1, V]
            if options.get("use_cache"):
                out.past_key_values = _rows_of(out.past_key_values, tree.places)
        return out


def _rows_of(cache: Any, places: Tensor) -> DynamicCache:  # of one sequence, [B, L]; of B sequences
    """Keys and values [1, heads, M, d] of the nodes as those of the rows [B, heads, L, d]."""
    rows = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (each[0][:, places].transpose(0, 1) for each in (layer.keys, layer.values))
        rows.update(keys, values, index)
    return rows
