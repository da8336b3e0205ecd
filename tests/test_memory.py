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


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        (512, "float32"),
        pytest.param(4096, "float32", marks=pytest.mark.deep),
        pytest.param(4096, "bfloat16", marks=pytest.mark.deep),
    ],
)
def test_peak_at_full_size(tokens, dtype):
    """Every row live: a micro-batch and a batch at Qwen2.5-0.5B's head, whose logits alone would be 0.3 and 2.4 GiB.
    The workspace, and where the gradient of the hidden states is rounded, its sum."""
    size = dict(tokens=tokens, depth=896, vocab=151936)
    rounded = 4 * size["tokens"] * size["depth"] / 2**20 if dtype == "bfloat16" else 0
    assert peak_mib(Ours(), problem(dtype, **size)) < 64 + rounded


def test_vocabulary_does_not_matter():
    """Workspace, not logits: six times the vocabulary costs no more than noise. Eager's peak does grow."""
    problems = [problem("float32", tokens=512, depth=16, vocab=v) for v in (20_000, 120_000)]
    small, large = (peak_mib(Ours(), p) for p in problems)
    assert large - small < 16
    eager = [peak_mib(EAGER, p) for p in problems]
    assert eager[1] - eager[0] > 512 * 100_000 * 4 / 2**20
