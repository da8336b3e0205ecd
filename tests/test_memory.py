"""Memory that does not grow with the vocabulary: on a CPU measured in a fresh process at a real head's size, of the GPU
engine counted allocation by allocation with every launch replaced by nothing."""

import importlib
import os
from typing import NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.contenders import EAGER
from covgrpo_kernels import covgrpo_loss, linear_logprob
from covgrpo_kernels.benchmark import Ours, Problem, peak_mib
from covgrpo_kernels.engines import fused_gpu
from covgrpo_kernels.engines.interface import HeadGrads
from covgrpo_kernels.segments import Segments
from covgrpo_kernels.testing import policy_head

MIB = 2**20

needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc"
)


def problem(dtype, **size):
    return Problem.of(policy_head(0, **size), getattr(torch, dtype), torch.device("cpu"))


@needs_proc
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


@needs_proc
def test_vocabulary_does_not_matter():
    """Workspace, not logits: six times the vocabulary costs no more than noise. Eager's peak does grow."""
    problems = [problem("float32", tokens=512, depth=16, vocab=v) for v in (20_000, 120_000)]
    small, large = (peak_mib(Ours(), p) for p in problems)
    assert large - small < 16
    eager = [peak_mib(EAGER, p) for p in problems]
    assert eager[1] - eager[0] > 512 * 100_000 * 4 / 2**20


# ------------------------------------------------------------------------------------------- of the engine for GPUs

DEPTH, VOCAB = 1536, 151936
LIVE = 0.61  # share of the tokens of `rl_head` that have a coefficient


class Bytes(NamedTuple):
    """Beyond inputs and gradients."""

    peak: int
    kept: int  # from the forward to the backward


def count_bytes(monkeypatch, tokens, *, loss, **options):
    """Of a step in bfloat16, with as many dense rows and entries of sparse rows as a policy's batch has on a GPU. What
    is written to no tensor needs no memory either, so that any size can be counted."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    forward = importlib.import_module("covgrpo_kernels.kernels.triton.forward")
    exact = options.get("grad_tol") == 0.0
    live = int(LIVE * tokens)
    dense, sparse = (live, 0) if exact else (32 + tokens // 64, live - tokens // 64)
    i = torch.arange(tokens)
    leaves = [torch.empty(n, DEPTH, dtype=torch.bfloat16, requires_grad=True) for n in (tokens, VOCAB)]
    grads = HeadGrads(*(torch.empty_like(x) for x in leaves), torch.empty(0))
    batch = dict(
        advantages=torch.ones(tokens), group_ids=i // 4096, sequence_ids=i // 512, old_logprobs=torch.zeros(tokens)
    )
    for module, name, value in (
        (interpreter.InterpretedFunction, "__getitem__", lambda kernel, grid: lambda *a, **k: None),
        (fused_gpu, "multiply_", lambda *a, **k: None),
        (torch, "mm", lambda *a, **k: None),
        (torch.Tensor, "tolist", lambda counts: [dense, sparse, 9 * sparse]),
        (fused_gpu, "empty_grads", lambda *a: grads),
        (forward, "multiprocessors", lambda device: 132),
        # Indices that nothing has written.
        (Segments, "gather", lambda segments, value: value.new_empty(len(segments.segment))),
    ):
        monkeypatch.setattr(module, name, value)

    def allocated(run):
        """Bytes after each allocation and each release."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            result = run()
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = torch.tensor([0, *(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))])
        return result, sizes.cumsum(0)

    if loss:
        out, forward_bytes = allocated(lambda: covgrpo_loss(*leaves, i % VOCAB, **batch, **options).loss)
    else:
        out, forward_bytes = allocated(lambda: linear_logprob(*leaves, i % VOCAB, **options).logprob)
    g = torch.ones_like(out)
    _, backward_bytes = allocated(lambda: torch.autograd.grad(out, leaves, g))
    kept = int(forward_bytes[-1])
    return Bytes(max(int(forward_bytes.max()), kept + int(backward_bytes.max())), kept)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("tokens", [8192, 16384, 131072])
@pytest.mark.parametrize("loss", [False, True], ids=["linear_logprob", "covgrpo_loss"])
def test_peak_of_the_gpu_engine(backend, tokens, loss, monkeypatch):
    """The workspace and 1.5 KiB a token, 1.16 of it the largest logits, which the loss does not keep for its
    backward."""
    found = count_bytes(monkeypatch, tokens, loss=loss)
    assert found.peak <= 256 * MIB + 1536 * tokens
    assert found.kept <= (8 * fused_gpu._CAPACITY + 192 if loss else 1280) * tokens


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("tokens", [8192, 131072])
def test_peak_of_an_exact_step_on_a_gpu(backend, tokens, monkeypatch):
    """The workspace, and the float32 sum of the gradients of the hidden states."""
    found = count_bytes(monkeypatch, tokens, loss=True, grad_tol=0.0, metrics=False)
    assert found.peak <= 256 * MIB + 4 * int(LIVE * tokens) * DEPTH + 128 * tokens
    assert found.kept <= 128 * tokens
