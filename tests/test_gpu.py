"""On a GPU: the numbers, bits that repeat, bounded memory, and targets that cannot be checked without a sync."""

import pytest
import torch

from covgrpo_kernels import covgrpo_loss, doctor, linear_logprob
from covgrpo_kernels.testing import policy_head, random_batch

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def on_gpu(values):
    return {n: v.to(CUDA) if torch.is_tensor(v) else v for n, v in values.items()}


@pytest.mark.parametrize("check", doctor.CHECKS.values(), ids=doctor.CHECKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers(check, dtype):
    """The rule of the precision contract, eager PyTorch on the same device being the measure."""
    check(CUDA, dtype)


def test_same_bits_every_run():
    batch = on_gpu(random_batch(0, groups=8, group_size=8, length=64, depth=64, vocab=5000, shuffled=True))
    batch |= {n: batch[n].to(torch.bfloat16).requires_grad_() for n in ("hidden", "weight")}
    runs = []
    for _ in range(20):
        out = covgrpo_loss(**batch)
        runs.append([out.loss, out.weights, *torch.autograd.grad(out.loss, [batch["hidden"], batch["weight"]])])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_peak_memory():
    """Qwen2.5-0.5B's head: inputs, gradients, the float32 sum of dhidden, and at most 256 MiB."""
    head = on_gpu(policy_head(0, 8192, 896, 151936))
    hidden, weight = (head[n].to(torch.bfloat16).requires_grad_() for n in ("hidden", "weight"))
    targets, coefficients = head["targets"], head["logprob_grad"]
    del head
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob(hidden, weight, targets).logprob.backward(coefficients)
    extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes - 4 * hidden.numel()
    assert extra < (256 + 8) << 20


def test_targets_out_of_range_are_nan_and_counted():
    batch = on_gpu(random_batch(1, dtype=torch.float32))
    batch["mask"][0, 0] = True
    batch["targets"][0, 0] = len(batch["weight"])
    out = covgrpo_loss(**batch)
    assert out.metrics["rows/invalid_targets"] == 1
    assert out.logprobs[0, 0].isnan()
    assert out.loss.isnan()


def test_scoring_in_a_captured_graph():
    head = on_gpu(policy_head(2, 256, 64, 3000))
    with torch.no_grad():
        inputs = head["hidden"], head["weight"], head["targets"]
        expected = linear_logprob(*inputs).logprob  # also warms up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = linear_logprob(*inputs).logprob
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, expected)
