"""Memory that does not grow with the vocabulary, measured in a fresh process at a real head's size."""

import os

import pytest
import torch

from bench.contenders import EAGER, Ours
from bench.measure import Problem, peak_mib
from covgrpo_kernels.testing import policy_head

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc"
)


def problem(dtype, **size):
    return Problem.of(policy_head(0, **size), getattr(torch, dtype), torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.deep)])
def test_peak_at_full_size(dtype):
    """Every row live: 4096 tokens of Qwen2.5-0.5B's head, whose logits alone would be 2.4 GiB. The workspace, and where
    the gradient of the hidden states is rounded, its sum."""
    size = dict(tokens=4096, depth=896, vocab=151936)
    rounded = 4 * size["tokens"] * size["depth"] / 2**20 if dtype == "bfloat16" else 0
    assert peak_mib(Ours(), problem(dtype, **size)) < 64 + rounded


def test_vocabulary_does_not_matter():
    """Workspace, not logits: six times the vocabulary costs no more than noise. Eager's peak does grow."""
    problems = [problem("float32", tokens=512, depth=64, vocab=v) for v in (20_000, 120_000)]
    small, large = (peak_mib(Ours(), p) for p in problems)
    assert large - small < 16
    eager = [peak_mib(EAGER, p) for p in problems]
    assert eager[1] - eager[0] > 512 * 100_000 * 4 / 2**20
