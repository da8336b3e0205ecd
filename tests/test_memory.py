"""Memory that does not grow with the vocabulary, measured in a fresh process at a real head's size."""

import os

import pytest

from bench.live_rows import peak_mib

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc"
)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.deep)])
def test_peak_at_full_size(dtype):
    """Every row live: 4096 tokens of Qwen2.5-0.5B's head, whose logits alone would be 2.4 GiB. The workspace, and where
    the gradient of the hidden states is rounded, its sum."""
    size = dict(tokens=4096, depth=896, vocab=151936)
    rounded = 4 * size["tokens"] * size["depth"] / 2**20 if dtype == "bfloat16" else 0
    assert peak_mib("ours", dtype, size) < 64 + rounded


def test_vocabulary_does_not_matter():
    """Workspace, not logits: six times the vocabulary costs no more than noise. Eager's peak does grow."""
    small, large = (peak_mib("ours", "float32", dict(tokens=512, depth=64, vocab=v)) for v in (20_000, 120_000))
    assert large - small < 16
    eager = [peak_mib("eager", "float32", dict(tokens=512, depth=64, vocab=v)) for v in (20_000, 120_000)]
    assert eager[1] - eager[0] > 512 * 100_000 * 4 / 2**20
