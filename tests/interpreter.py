"""Less work for Triton's interpreter, which takes a hundred times as long for the same arithmetic."""

import os

from covgrpo_kernels import kernels


def interpreted() -> bool:
    """Whether the kernels in use run under the interpreter; the GPU's tests name no backend."""
    return os.environ.get(kernels.VARIABLE) == "triton"


def fewer(count: int) -> int:
    """A tenth under the interpreter, of random draws or seeds."""
    return max(1, count // 10) if interpreted() else count
