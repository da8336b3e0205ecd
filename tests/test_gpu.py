"""On a GPU: the numbers, bits that repeat, bounded memory, sizes beyond 32 bits, graphs, streams, compilers, and
targets that cannot be checked without a sync. (The modules with the fixture `backend` run there as well.)

Where there is none, what needs none runs on the CPU with the same kernels under Triton's interpreter, and with the same
engine: `FusedGpu` for 16-bit hidden states."""

import pytest
import torch

from covgrpo_kernels import (
    CovarianceWeighting,
    CovGRPOConfig,
    covgrpo_loss,
    doctor,
    engines,
    kernels,
    linear_logprob,
    reference,
)
from covgrpo_kernels.testing import policy_head, random_batch, random_head, rms, run_logprob

pytest.importorskip("triton")
gpu = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()
pytestmark = [gpu] if ON_GPU else []  # there `-m gpu` chooses them all
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SIZES = dict(groups=8, group_size=8, length=64, depth=64, vocab=5000)
if not ON_GPU:  # several programs of each kernel all the same
    SIZES = dict(groups=2, group_size=4, length=9, depth=24, vocab=600)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if not ON_GPU:
        monkeypatch.setenv(kernels.VARIABLE, "triton")


def on_device(values, device=DEVICE):
    return {n: v.to(device) if torch.is_tensor(v) else v for n, v in values.items()}


def loss_bits(batch, **options):
    """Loss, weights and gradients."""
    out = covgrpo_loss(**batch, **options)
    return [out.loss, out.weights, *torch.autograd.grad(out.loss, [batch["hidden"], batch["weight"]])]


def bf16_batch(seed=0, device=DEVICE, **sizes):
    batch = on_device(random_batch(seed, shuffled=True, **SIZES | sizes), device)
    return batch | {n: batch[n].to(torch.bfloat16).requires_grad_() for n in ("hidden", "weight")}


def test_kernels_are_used():
    assert kernels.select(DEVICE).__name__ == "covgrpo_kernels.kernels.triton"
    for dtype in (torch.bfloat16, torch.float16):
        assert isinstance(engines.select(DEVICE, dtype), engines.FusedGpu)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_logprobs(dtype):
    """The rule of the precision contract, eager PyTorch on the same device being the measure. (For the interpreter, to
    which 1,200 tokens are many, `test_pooled_errors` in test_logprob.py is the same.)"""
    doctor.check_logprob(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_the_loss(dtype):
    doctor.check_loss(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_case_of_each_kernel(dtype):
    """With everything on, sizes that divide nothing; what the checkers of memory and races run."""
    from covgrpo_kernels.kernels.triton.forward import forward

    head = on_device(random_head(0, 37, 40, 2100 if ON_GPU else 600, bias=True))
    options = dict(softcap=20.0, logit_scale=1.5, temperature=torch.linspace(0.5, 2, 37, device=DEVICE))
    run_logprob(lambda *a, **k: linear_logprob(*a, entropy=True, **k), **head, dtype=dtype, **options)
    author = CovarianceWeighting(centering="sequence", advantage_centering="response")
    for weighting in ("covariance", author):
        loss_bits(bf16_batch(groups=2, length=9, vocab=300), config=CovGRPOConfig(weighting=weighting))
    hidden, weight, bias = (head[n].to(dtype) for n in ("hidden", "weight", "bias"))
    settings = dict(scale=1.5, softcap=20.0, entropy=True)
    x = forward(hidden, weight, bias, head["targets"], options["temperature"].float(), **settings)[0][0]
    exact, _ = reference.linear_logprob(
        hidden.double(), weight.double(), head["targets"], bias=bias.double(), **options
    )
    valid = head["targets"] >= 0
    assert rms((x - exact)[valid]) <= 64 * torch.finfo(torch.float32).eps * rms(exact)


def test_same_bits_every_run():
    batch = bf16_batch()
    first = loss_bits(batch)
    for _ in range(49 if ON_GPU else 1):
        assert all(torch.equal(a, b) for a, b in zip(loss_bits(batch), first, strict=True))


@gpu
def test_peak_memory():
    """Qwen2.5-0.5B's head: inputs, gradients, the float32 sum of dhidden, and at most 256 MiB."""
    head = on_device(policy_head(0, 8192, 896, 151936))
    hidden, weight = (head[n].to(torch.bfloat16).requires_grad_() for n in ("hidden", "weight"))
    targets, coefficients = head["targets"], head["logprob_grad"]
    del head
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob(hidden, weight, targets).logprob.backward(coefficients)
    extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes - 4 * hidden.numel()
    assert extra < (256 + 8) << 20


@gpu
@pytest.mark.parametrize(("tokens", "depth", "vocab"), [(131072, 64, 32000), (64, 16384, 140000)])
def test_large_sizes(tokens, depth, vocab):
    """131,072 tokens; a weight of more than 2^31 elements, whose last rows are targets."""
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(tokens, depth, generator=g, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocab, depth, generator=g, device=DEVICE, dtype=torch.bfloat16) / depth**0.5
    targets = vocab - 1 - torch.arange(tokens, device=DEVICE) % 1000
    hidden.requires_grad_(), weight.requires_grad_()
    x = linear_logprob(hidden, weight, targets, grad_tol=0.0).logprob
    x.sum().backward()
    rows = torch.tensor([0, 1, tokens - 1], device=DEVICE)
    h, w = hidden.detach()[rows].double().requires_grad_(), weight.detach().double()
    exact, _ = reference.linear_logprob(h, w, targets[rows])
    exact.sum().backward()
    assert (x[rows] - exact).abs().max() < 1e-4
    assert rms(hidden.grad[rows].double() - h.grad) <= 2 * torch.finfo(torch.bfloat16).eps * rms(h.grad)


def test_targets_out_of_range_are_nan_and_counted():
    batch = bf16_batch(1)
    batch["mask"][0, 0] = True
    batch["targets"][0, 0] = len(batch["weight"])
    out = covgrpo_loss(**batch)
    assert out.metrics["rows/invalid_targets"] == 1
    assert out.logprobs[0, 0].isnan()
    assert out.loss.isnan()


@gpu
def test_scoring_in_a_captured_graph():
    head = on_device(policy_head(2, 256, 64, 3000))
    with torch.no_grad():
        inputs = head["hidden"], head["weight"], head["targets"]
        expected = linear_logprob(*inputs).logprob  # also warms up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = linear_logprob(*inputs).logprob
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, expected)


@gpu
def test_on_a_side_stream():
    batch = bf16_batch()
    expected = loss_bits(batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = loss_bits(batch)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_a_device_that_is_not_the_current_one():
    expected = loss_bits(bf16_batch())
    results = loss_bits(bf16_batch(device=torch.device("cuda", 1)))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results, expected, strict=True))


def test_compiled_training_step():
    """fullgraph: the operators are opaque to the compiler, and a changed number of tokens is no reason to compile."""
    batch = bf16_batch()

    def loss(hidden, weight):
        return covgrpo_loss(**(batch | dict(hidden=hidden, weight=weight))).loss

    inputs = batch["hidden"], batch["weight"]
    expected = [*torch.autograd.grad(loss(*inputs), inputs)]
    # Around the operators there is nothing to compile for the interpreter, and C++ would take a minute.
    backend = "inductor" if ON_GPU else "aot_eager"
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*inputs), inputs)
    for a, b in zip(compiled, expected, strict=True):
        assert rms(a - b) <= 4 * torch.finfo(torch.bfloat16).eps * rms(b)


@gpu
def test_another_number_of_tokens_compiles_no_kernel():
    from covgrpo_kernels.kernels.triton.online_softmax import online_softmax_kernel

    head = on_device(policy_head(2, 517, 64, 5000))
    inputs = [head[n] for n in ("hidden", "weight", "targets")]
    linear_logprob(*inputs)
    known = sum(len(cache[0]) for cache in online_softmax_kernel.device_caches.values())
    for tokens in (516, 512, 33, 1):
        linear_logprob(inputs[0][:tokens].contiguous(), inputs[1], inputs[2][:tokens].contiguous())
    assert sum(len(cache[0]) for cache in online_softmax_kernel.device_caches.values()) == known
