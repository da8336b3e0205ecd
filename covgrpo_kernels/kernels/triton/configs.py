"""How each kernel is cut into programs on each architecture. Fixed, so that a result does not depend on a search;
COVGRPO_AUTOTUNE=1 searches among `SEARCH` instead, once a process for every kind of input."""

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


# Of a program: rows and columns of the tile; for fold the columns are the block, which is fixed; tokens of a scope at
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


# By architecture and bytes of an input's element. SLICES: pieces of a tile that are folded one after the other, for
# fewer registers at a time. DESCRIPTORS: whether a unit of the hardware copies the blocks (TMA). Products of float32
# are exact, and so without tensor cores on NVIDIA's: descriptors gain nothing there and cost the operands registers.
FORWARD: dict[str, dict[int, dict[str, int]]] = {
    "sm_80": {2: _blocks(128, 128, 64, 8, 4), 4: _blocks(128, 64, 32, 8, 3)},
    "sm_90": {2: _blocks(128, 256, 64, 8, 4, 4, True), 4: _blocks(128, 64, 32, 8, 3)},
    "sm_100": {2: _blocks(128, 256, 64, 8, 4, 4, True), 4: _blocks(128, 64, 32, 8, 3)},
    "gfx942": {2: _blocks(128, 128, 64, 8, 2), 4: _blocks(128, 64, 32, 8, 2)},
    "interpreter": dict.fromkeys((2, 4, 8), _blocks(32, 256, 64, 1, 1, 2, True)),
}
# Of a program of the merge.
MERGE = dict(B_R=8, num_warps=4)
AUTOTUNE = os.environ.get("COVGRPO_AUTOTUNE", "0") == "1"


@cache
def architecture(device: torch.device) -> str:
    """The key of `CONFIGS`: the nearest one that is not newer, for a device that has none of its own."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_properties(device).major
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def tuned(name: str, key: list[str], restored: list[str]) -> Callable[[Any], Any]:
    """Decorates a kernel with Triton's search, where it was asked for. ``restored``: arguments a run changes."""

    def decorate(kernel: Any) -> Any:
        if not AUTOTUNE:
            return kernel
        choices = [triton.Config(dict(B_R=c["B_R"], B_C=c["B_C"]), num_warps=c["num_warps"]) for c in SEARCH[name]]
        return triton.autotune(choices, key=key, restore_value=restored, cache_results=True)(kernel)

    return decorate


def options(name: str, device: torch.device) -> dict[str, int]:
    """The compile-time arguments of a kernel that depend on the device; none where a search sets them."""
    return {} if AUTOTUNE and name in SEARCH else CONFIGS[architecture(device)][name]
