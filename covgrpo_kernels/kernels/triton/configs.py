"""How each kernel is cut into programs on each architecture. Fixed, so that a result does not depend on a search;
COVGRPO_AUTOTUNE=1 searches among `SEARCH` instead, once for every kind of input; Triton keeps what it found on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton

from ..interface import VOCAB_BLOCK


def _tile(rows: int, columns: int, warps: int) -> dict[str, int]:
    return dict(B_R=rows, B_C=columns, num_warps=warps)


# Kernels around the product of the forward, whose cuts are the same on all architectures. Of a program: tokens of the
# merge; tokens of the selection, and how many it counts at a time; rows and columns of the gathering; and of the
# collection's lists tokens and tiles of the vocabulary at a time.
_EVERYWHERE: dict[str, dict[str, int]] = {
    "merge": dict(B_R=8, num_warps=4),
    "select": dict(B_N=1024, B_C=4096, num_warps=8),
    "gather": dict(B_R=8, B_D=1024, num_warps=8),
    "limits": dict(B_N=32, B_T=64, num_warps=4),
    "count": dict(B_R=2048, num_warps=8),
    "ends": dict(B_T=1024, num_warps=4),
    "list": dict(B_R=2048, num_warps=8),
    "largest": dict(B_R=4, num_warps=4),
}
# Of the backward's kernels on [N] vectors, candidates and hidden states: the same on every architecture.
_BACKWARD: dict[str, dict[str, int]] = {
    "plan_rows": dict(B_R=4, num_warps=4),
    "assign_tails": dict(B_R=64, B_D=64, num_warps=4, num_stages=3),
    "classify_rows": dict(B_R=2048, num_warps=8),
    "list_pairs": dict(B_R=8, num_warps=4),
    "place_pairs": dict(B_P=256, num_warps=4),
    "tail_states": dict(B_K=32, B_D=128, num_warps=4, num_stages=2),
    "gather_states": dict(B_R=1, B_D=1024, num_warps=4),
    "hidden_grad": dict(B_R=1, B_D=1024, num_warps=4),
}

# Of a program: rows and columns of the tile; for online_softmax the columns are VOCAB_BLOCK; tokens of a scope at
# a time; columns of a sparse product. Registers, spills and shared memory of each are gated by tests/test_compiled.py.
CONFIGS: dict[str, dict[str, dict[str, int]]] = {
    "sm_80": {
        "online_softmax": _tile(1, VOCAB_BLOCK, 4),
        "dlogits": _tile(1, 1024, 4),
        "weights": dict(B_T=1024, num_warps=8),
        "segments": dict(B_T=256, num_warps=4),
        "sums": dict(B_T=1024, num_warps=4),
        "terms": dict(B_T=256, num_warps=4),
        "totals": dict(B_B=1024, num_warps=4),
        "sparse": dict(B_D=512, num_warps=4),
        **_EVERYWHERE,
        **_BACKWARD,
    },
    "sm_90": {
        "online_softmax": _tile(1, VOCAB_BLOCK, 4),
        "dlogits": _tile(1, 2048, 4),
        "weights": dict(B_T=1024, num_warps=8),
        "segments": dict(B_T=256, num_warps=4),
        "sums": dict(B_T=1024, num_warps=4),
        "terms": dict(B_T=256, num_warps=4),
        "totals": dict(B_B=1024, num_warps=4),
        "sparse": dict(B_D=512, num_warps=4),
        **_EVERYWHERE,
        **_BACKWARD,
    },
    "sm_100": {
        "online_softmax": _tile(1, VOCAB_BLOCK, 4),
        "dlogits": _tile(1, 2048, 4),
        "weights": dict(B_T=1024, num_warps=8),
        "segments": dict(B_T=256, num_warps=4),
        "sums": dict(B_T=1024, num_warps=4),
        "terms": dict(B_T=256, num_warps=4),
        "totals": dict(B_B=1024, num_warps=4),
        "sparse": dict(B_D=512, num_warps=4),
        **_EVERYWHERE,
        **_BACKWARD,
    },
    "gfx942": {
        "online_softmax": _tile(1, VOCAB_BLOCK, 4),
        "dlogits": _tile(1, 1024, 4),
        "weights": dict(B_T=1024, num_warps=8),
        "segments": dict(B_T=256, num_warps=4),
        "sums": dict(B_T=1024, num_warps=4),
        "terms": dict(B_T=256, num_warps=4),
        "totals": dict(B_B=1024, num_warps=4),
        "sparse": dict(B_D=512, num_warps=4),
        **_EVERYWHERE,
        **_BACKWARD,
    },
    # An operation costs the interpreter the same, whatever its size.
    "interpreter": {
        "online_softmax": _tile(32, VOCAB_BLOCK, 1),
        "dlogits": _tile(32, 1024, 1),
        "weights": dict(B_T=1024, num_warps=1),
        "segments": dict(B_T=1024, num_warps=1),
        "sums": dict(B_T=1024, num_warps=1),
        "terms": dict(B_T=1024, num_warps=1),
        "totals": dict(B_B=1024, num_warps=1),
        "sparse": dict(B_D=1024, num_warps=1),
        **_EVERYWHERE,
        "merge": dict(B_R=256, num_warps=1),
        "gather": dict(B_R=256, B_D=1024, num_warps=1),
        "limits": dict(B_N=256, B_T=64, num_warps=1),
        "largest": dict(B_R=128, num_warps=1),
        "plan_rows": dict(B_R=128, num_warps=1),
        "assign_tails": dict(B_R=128, B_D=256, num_warps=1),
        "classify_rows": dict(B_R=64, num_warps=1),
        "list_pairs": dict(B_R=128, num_warps=1),
        "place_pairs": dict(B_P=1024, num_warps=1),
        "tail_states": dict(B_K=64, B_D=256, num_warps=1),
        "gather_states": dict(B_R=32, B_D=256, num_warps=1),
        "hidden_grad": dict(B_R=256, B_D=256, num_warps=1),
    },
}
SEARCH = {
    "online_softmax": [
        _tile(rows, VOCAB_BLOCK, warps) for rows in (1, 2, 4) for warps in (1, 2, 4, 8) if rows <= 2 * warps
    ],
    "dlogits": [
        _tile(rows, columns, warps) for rows in (1, 2) for columns in (1024, 2048, 4096) for warps in (2, 4, 8)
    ],
}


def _blocks(
    rows: int, vocab: int, depth: int, warps: int, stages: int, slices: int = 1, descriptors: bool = False
) -> dict[str, int]:
    return dict(
        B_R=rows, B_V=vocab, B_D=depth, SLICES=slices, DESCRIPTORS=descriptors, num_warps=warps, num_stages=stages
    )


# The forward's cuts by architecture and bytes of an input's element, each from a depth on. SLICES: pieces of a tile
# that are folded one after the other, for fewer registers at a time. DESCRIPTORS: whether a unit of the hardware copies
# the blocks (TMA).
#
# sm_90 was measured on an H200, in multiples of the bare product's time at a depth of 4096 and of 896: 128 x 256 in 4
# stages 1.02-1.09 and 1.43-1.59, in 3 stages 1.03-1.09 and 1.36-1.42; 128 x 128 with two programs a multiprocessor
# 1.15-1.23 and 1.33-1.46; 256 x 128 1.14-1.16 and 1.36-1.52. The others are its nearest that fit into registers and
# shared memory. Products of float32 are exact, and so without tensor cores on NVIDIA's: descriptors gain nothing there
# and cost the operands registers.
_DEEP = 3072
_HOPPER = {
    2: {0: _blocks(128, 256, 64, 8, 3, 4, True), _DEEP: _blocks(128, 256, 64, 8, 4, 4, True)},
    4: {0: _blocks(128, 64, 32, 8, 3)},
}
FORWARD: dict[str, dict[int, dict[int, dict[str, int]]]] = {
    "sm_80": {2: {0: _blocks(128, 128, 64, 8, 4)}, 4: {0: _blocks(128, 64, 32, 8, 3)}},
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "gfx942": {2: {0: _blocks(128, 128, 64, 8, 2)}, 4: {0: _blocks(128, 64, 32, 8, 2)}},
    "interpreter": {itemsize: {0: _blocks(32, 256, 64, 1, 1, 2, True)} for itemsize in (2, 4, 8)},
}


def forward_blocks(name: str, itemsize: int, depth: int) -> dict[str, int]:
    """The cut of the forward for an architecture, the bytes of an element and a depth."""
    cuts = FORWARD[name][itemsize]
    return cuts[max(least for least in cuts if least <= depth)]


def _listed(
    rows: int, depth: int, warps: int, stages: int, slices: int = 8, descriptors: bool = False
) -> dict[str, int]:
    return dict(B_R=rows, B_D=depth, SLICES=slices, DESCRIPTORS=descriptors, num_warps=warps, num_stages=stages)


# The cuts of the products that `collect` makes again, by architecture and bytes of an element: listed rows by
# PEAK_WIDTH entries. A tile of the vocabulary has some twenty listed rows in a batch of eight thousand. 64 rows were
# measured on an H200, where all products took 0.13 to 0.31 ms. SLICES: for fewer registers, as above.
COLLECT: dict[str, dict[int, dict[str, int]]] = {
    "sm_80": {2: _listed(64, 64, 8, 3), 4: _listed(32, 32, 8, 3)},
    "sm_90": {2: _listed(64, 64, 8, 3, 8, True), 4: _listed(32, 32, 8, 3)},
    "sm_100": {2: _listed(64, 64, 8, 3, 8, True), 4: _listed(32, 32, 8, 3)},
    "gfx942": {2: _listed(64, 64, 8, 2), 4: _listed(32, 32, 8, 2)},
    "interpreter": {itemsize: _listed(64, 64, 1, 1, 2, True) for itemsize in (2, 4, 8)},
}


def _head_grad(vocab: int, depth: int, rows: int, warps: int, stages: int, descriptors: bool = False) -> dict[str, int]:
    return dict(B_V=vocab, B_D=depth, B_K=rows, DESCRIPTORS=descriptors, num_warps=warps, num_stages=stages)


# Rows of dZ from which on dW is bound by the product, and not by its one write.
MANY_ROWS = 512
# By architecture, bytes of an input's element, and whether dZ has many rows. B_V is a multiple of PAIR_BLOCK. Few rows:
# blocks of 64 x 128 wrote 1 GiB of dW in 0.69 ms on an H200. They take 32 rows or pairs at a time, since most blocks
# have some tens of pairs and more would be padding (not timed). Many rows: the cut of the forward, except on sm_100,
# whose tensor memory has no room for three products of 128 x 256.
_FLOAT32 = dict.fromkeys(("few", "many"), _head_grad(64, 64, 32, 4, 3))
HEAD_GRAD: dict[str, dict[int, dict[str, dict[str, int]]]] = {
    "sm_80": {2: dict(few=_head_grad(64, 128, 32, 4, 3), many=_head_grad(128, 128, 64, 8, 3)), 4: _FLOAT32},
    "sm_90": {
        2: dict(few=_head_grad(64, 128, 32, 4, 3, True), many=_head_grad(128, 256, 64, 8, 3, True)),
        4: _FLOAT32,
    },
    "sm_100": {
        2: dict(few=_head_grad(64, 128, 32, 4, 3, True), many=_head_grad(128, 128, 64, 8, 3, True)),
        4: _FLOAT32,
    },
    "gfx942": {2: dict(few=_head_grad(64, 128, 32, 4, 2), many=_head_grad(128, 128, 64, 8, 2)), 4: _FLOAT32},
    "interpreter": dict.fromkeys((2, 4), dict.fromkeys(("few", "many"), _head_grad(64, 256, 128, 1, 1, True))),
}
AUTOTUNE = os.environ.get("COVGRPO_AUTOTUNE", "0") == "1"


@cache
def architecture(device: torch.device) -> str:
    """The key of `CONFIGS`: the nearest one that is not newer and needs no more shared memory, for a device that has
    none of its own. GPUs of 12.x have 99 KiB a block, as 8.6 and 8.9. Any AMD GPU counts as gfx942."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_properties(device).major
    return "sm_100" if major in (10, 11) else "sm_90" if major == 9 else "sm_80"


def describable(x: torch.Tensor) -> bool:  # [R, C]
    """Whether a descriptor (TMA) can describe the matrix."""
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.stride(1) == 1


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, contiguous and starting at a multiple of 16 bytes; a copy where it is not. For tensors that a kernel takes
    in a tuple, whose alignments Triton cannot be told to ignore: it would compile for every combination of them."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def tuned(name: str, key: list[str], restored: list[str]) -> Callable[[Any], Any]:
    """Decorates a kernel with Triton's search, where it was asked for. ``restored``: arguments a run changes, where
    they are not None, which Triton's own ``restore_value`` does not expect."""
    before: dict[str, torch.Tensor] = {}

    def save(arguments: dict[str, Any], reset_only: bool = False) -> None:
        if not reset_only:
            before.update({name: arguments[name].clone() for name in restored if arguments[name] is not None})

    def restore(arguments: dict[str, Any], exception: Exception | None) -> None:
        for name, value in before.items():
            arguments[name].copy_(value)
        before.clear()

    def decorate(kernel: Any) -> Any:
        if not AUTOTUNE:
            return kernel
        choices = [triton.Config(dict(B_R=c["B_R"], B_C=c["B_C"]), num_warps=c["num_warps"]) for c in SEARCH[name]]
        return triton.autotune(choices, key=key, pre_hook=save, post_hook=restore, cache_results=True)(kernel)

    return decorate


def options(name: str, device: torch.device) -> dict[str, int]:
    """The compile-time arguments of a kernel that depend on the device; none where a search sets them."""
    return {} if AUTOTUNE and name in SEARCH else CONFIGS[architecture(device)][name]
