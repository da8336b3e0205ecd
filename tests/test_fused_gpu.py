"""The GPU engine as a whole, under Triton's interpreter: against the general engine and float64."""

import pytest
import torch

pytest.importorskip("triton")

from covgrpo_kernels import covgrpo_loss, engines, kernels, linear_logprob, reference
from covgrpo_kernels.testing import ErrorBook, random_batch, random_head, rl_head, rms, run_logprob

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here", allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float16]
TOKENS, DEPTH, VOCAB = 96, 40, 600  # several blocks of the interpreter's sizes, the last of them not whole
OPTIONS = {
    "plain": {},
    "all": dict(softcap=20.0, logit_scale=1.5, temperature=torch.linspace(0.5, 2.0, TOKENS)),
}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "triton")


def run(head, dtype, **options):
    return run_logprob(linear_logprob, **head, dtype=dtype, **options)


def policy(seed, bias=False, entropy=False):
    """Tokens of a policy of whom some are ignored and some have no coefficient."""
    head = rl_head(seed, TOKENS, DEPTH, VOCAB)
    keep = {n: head[n] for n in ("hidden", "weight", "targets", "logprob_grad")}
    keep["hidden"], keep["weight"] = keep["hidden"] / 64, keep["weight"] * 64  # within float16's range
    keep["bias"] = torch.linspace(-0.5, 0.5, VOCAB) if bias else None
    keep["entropy_grad"] = 10 * head["entropy_grad"] if entropy else None
    return keep


def test_is_chosen_for_16_bit_operands():
    cpu = torch.device("cpu")
    for dtype in DTYPES:
        assert isinstance(engines.select(cpu, dtype), engines.FusedGpu)
    for dtype in (torch.float32, torch.float64):
        assert isinstance(engines.select(cpu, dtype), engines.Chunked)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_tol", [0.0, 5e-3])
def test_equals_float64_as_well_as_eager_does(name, dtype, grad_tol):
    """With bias, entropies and rows of every class."""
    head = policy(1, bias=True, entropy=name == "all")
    rounded = {n: v.to(dtype).double() if torch.is_tensor(v) and n in ("hidden", "weight", "bias") else v
               for n, v in head.items()}  # fmt: skip
    options = OPTIONS[name]
    exact = run_logprob(reference.linear_logprob, **rounded, dtype=torch.float64, **options)
    eager = run_logprob(reference.linear_logprob, **head, dtype=dtype, **options)
    ours = run(head, dtype, grad_tol=grad_tol, entropy=head["entropy_grad"] is not None, **options)
    exact = {n: v for n, v in exact.items() if n in ours}
    book = ErrorBook()
    book.add(ours, eager, exact)
    ratios = book.ratios()
    assert ratios["logprob"] <= 0.1
    for quantity in ("dhidden", "dweight", "dbias"):
        within_tolerance = grad_tol * exact[quantity].norm() / exact[quantity].numel() ** 0.5
        assert rms(ours[quantity].double() - exact[quantity]) <= 1.1 * rms(
            eager[quantity].double() - exact[quantity]
        ) + float(within_tolerance), f"{quantity}: {ratios}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_has_sparse_rows_as_the_general_engine_does(dtype):
    """The plans of the two engines agree but for rows at the edge of the budget."""
    head = policy(2)
    classes = []
    for engine in (engines.FusedGpu(dtype), engines.Chunked(kernels.eager)):
        hidden, weight = (head[n].to(dtype) for n in ("hidden", "weight"))
        from covgrpo_kernels import operators
        from covgrpo_kernels.inputs import HeadInputs, Precision
        from covgrpo_kernels.kernels.interface import LogitTransform

        inputs = HeadInputs(hidden, weight, None, head["targets"], None, LogitTransform())
        precision = Precision(5e-3, None)
        with engines.use(engine):
            scored = operators.forward(
                inputs, entropy=False, ignore_index=-100, precision=precision, needs_grad=True, vocab_slice=None
            )
            planned = operators.plan(inputs, scored, head["logprob_grad"], None, precision)
        classes.append(planned.plan.row_class)
        assert planned.plan.error_bound <= 5e-3
        assert planned.plan.sparse.sum() > 30
    assert (classes[0] != classes[1]).sum() <= 3


@pytest.mark.parametrize("grad_tol", [0.0, 5e-3])
def test_a_gradient_has_the_same_bits_whichever_others_are_wanted(grad_tol):
    head = policy(3, bias=True)

    def gradients(*wanted):
        inputs = {n: head[n].bfloat16().requires_grad_(n in wanted) for n in ("hidden", "weight", "bias")}
        x = linear_logprob(
            inputs["hidden"], inputs["weight"], head["targets"], bias=inputs["bias"], grad_tol=grad_tol
        ).logprob
        return torch.autograd.grad(x, [inputs[n] for n in wanted], head["logprob_grad"])

    everything = dict(zip(("hidden", "weight", "bias"), gradients("hidden", "weight", "bias"), strict=True))
    for name, expected in everything.items():
        (alone,) = gradients(name)
        assert torch.equal(alone, expected), name


def test_same_bits_every_run():
    head = policy(4)
    first = run(head, torch.bfloat16, grad_tol=5e-3)
    again = run(head, torch.bfloat16, grad_tol=5e-3)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


def test_a_row_alone_is_the_row_in_its_batch():
    """Training and scoring agree to the bit, whatever shares the batch. (Inputs whose products are exact, so that this
    is a statement about our kernel.)"""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-4, 5, (70, 16), generator=g).bfloat16()
    weight = torch.randint(-2, 3, (900, 16), generator=g).bfloat16()
    targets = torch.randint(0, 900, (70,), generator=g)
    together = linear_logprob(hidden, weight, targets).logprob
    for i in (0, 33, 69):
        assert linear_logprob(hidden[i : i + 1], weight, targets[i : i + 1]).logprob[0] == together[i]


@pytest.mark.parametrize(("tokens", "vocab", "depth"), [(0, 50, 8), (3, 50, 8), (1, 1, 1), (17, 257, 3)])
def test_small_shapes(tokens, vocab, depth):
    head = random_head(5, tokens, depth, vocab, bias=True)
    ours = run(head, torch.bfloat16, grad_tol=5e-3, entropy=True)
    eager = run_logprob(reference.linear_logprob, **head, dtype=torch.float64)
    for name, exact in eager.items():
        assert ours[name].shape == exact.shape
        assert (ours[name] - exact).abs().max() <= 0.1 * (1 + exact.abs().max()) if exact.numel() else True


def test_targets_outside_the_vocabulary_are_nan_and_nothing_waits():
    head = policy(6)
    targets = head["targets"].clone()
    targets[[2, 5]] = torch.tensor([VOCAB, -3])
    x = linear_logprob(head["hidden"].bfloat16(), head["weight"].bfloat16(), targets).logprob
    assert x[[2, 5]].isnan().all()
    assert x.isnan().sum() == 2


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_dense(value):
    head = policy(7)
    head["logprob_grad"] = head["logprob_grad"].clone()
    token = int(head["logprob_grad"].abs().argmax())
    head["logprob_grad"][token] = value
    ours, exact = run(head, torch.bfloat16, grad_tol=5e-3), run(head, torch.bfloat16, grad_tol=0.0)
    assert not ours["dhidden"][token].isfinite().any()
    assert not ours["dweight"].isfinite().any()
    assert torch.equal(ours["dhidden"].isfinite(), exact["dhidden"].isfinite())


def test_a_large_scale_of_the_loss_stays_within_float16():
    """A GradScaler multiplies the loss by 2**16 to begin with."""
    batch = random_batch(3, dtype=torch.float16)
    gradients = []
    for scale in (1.0, 2.0**16):
        h, w = (batch[n].detach().requires_grad_() for n in ("hidden", "weight"))
        loss = covgrpo_loss(**(batch | dict(hidden=h, weight=w)), temperature=0.3, metrics=False).loss
        gradients.append([grad.double() / scale for grad in torch.autograd.grad(loss * scale, (h, w))])
    for once, scaled in zip(*gradients, strict=True):
        assert scaled.isfinite().all()
        assert rms(scaled - once) <= 2 * torch.finfo(torch.float16).eps * rms(once)


def test_tails_stay_within_float16():
    """Flat rows at a low temperature: a tail's entries are thousands of times the floor, and the slope of logits is
    10."""
    temperature, generator = 0.1, torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=generator), torch.randn(512, 32, generator=generator)
    # Half of the rows have 100 entries that are equally probable, and no others.
    direction, length = weight[0] / weight[0].norm(), weight[0].norm()
    weight[:100] = weight[0].clone()
    weight[100:] -= torch.outer(weight[100:] @ direction, direction)
    hidden[:32] = direction * 20 * temperature / length
    hidden[32:] *= 3
    targets, g = torch.randint(100, (64,), generator=generator), torch.randn(64, generator=generator)
    g[32:] *= 30
    head = dict(hidden=hidden, weight=weight, targets=targets, logprob_grad=g, temperature=temperature)
    exact = run_logprob(reference.linear_logprob, **head, dtype=torch.float64)
    ours = run_logprob(linear_logprob, **head, dtype=torch.float16, grad_tol=3e-4)
    for name in ("dhidden", "dweight"):
        assert rms(ours[name].double() - exact[name]) <= 8 * torch.finfo(torch.float16).eps * rms(exact[name])


def test_unbiased_mode():
    """The dice are those of the general engine: the same rows, so nearly the same gradients."""
    head = policy(8, entropy=True)
    results = []
    for engine in (engines.FusedGpu(torch.bfloat16), engines.Chunked(kernels.eager)):
        with engines.use(engine):
            options = dict(grad_mode="unbiased", generator=torch.Generator().manual_seed(3), grad_tol=0.1, entropy=True)
            results.append(run(head, torch.bfloat16, **options))
    for name in ("dhidden", "dweight"):
        ours, theirs = (r[name].double() for r in results)
        assert (ours - theirs).norm() <= 2 * torch.finfo(torch.bfloat16).eps * theirs.norm()
        assert torch.equal((ours != 0).any(1), (theirs != 0).any(1))


def test_layouts():
    """A transposed head and strided hidden states cost a copy, and change no bit."""
    head = policy(9)
    plain = run(head, torch.bfloat16, grad_tol=5e-3)

    def laid_out(hidden, weight, *rest, **options):
        wide = torch.cat([hidden, hidden], 1).T.contiguous().T[:, : hidden.shape[1]]
        return linear_logprob(wide, weight.T.contiguous().T, *rest, **options)

    changed = run_logprob(laid_out, **head, dtype=torch.bfloat16, grad_tol=5e-3)
    for name, value in plain.items():
        assert torch.equal(value, changed[name]), name


def test_slabs_of_the_vocabulary(monkeypatch):
    """Several slabs give what one gives, up to the order of float32 sums."""
    from covgrpo_kernels.engines import fused_gpu

    head = policy(10, bias=True)
    whole = run(head, torch.bfloat16, grad_tol=5e-3)
    monkeypatch.setitem(fused_gpu.WORKSPACE_BYTES, "cuda", 1)
    slabs = run(head, torch.bfloat16, grad_tol=5e-3)
    for name, value in whole.items():
        off = (value.double() - slabs[name]).abs().max()
        assert off <= torch.finfo(torch.bfloat16).eps * value.abs().max(), name
