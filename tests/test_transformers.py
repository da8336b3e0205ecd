"""`patch_model` on real models of transformers, judged against their own logits; packed sequences end to end."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import MethodType
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from covgrpo_kernels import CovarianceWeighting, CovGRPOConfig, covgrpo_loss, linear_logprob, reference  # noqa: E402
from covgrpo_kernels.integrations.transformers import LogprobOutput, patch_model  # noqa: E402
from covgrpo_kernels.packing import packed_sequences  # noqa: E402

VOCAB = 67
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "mistral": ("mistral", dict(sliding_window=4)),
    "phi, with a bias": ("phi", {}),
    "gemma": ("gemma", {}),
    "gemma2, softcap": ("gemma2", dict(query_pre_attn_scalar=8, sliding_window=4)),
    "gemma3, softcap": ("gemma3_text", dict(query_pre_attn_scalar=8, final_logit_softcapping=20.0)),
    "gpt_neox": ("gpt_neox", dict(tie_word_embeddings=False)),
    "gpt2": ("gpt2", dict(n_embd=32, n_head=4, n_layer=2)),
    "cohere, multiplied": ("cohere", dict(logit_scale=0.25)),
    "granite, divided": ("granite", dict(logits_scaling=4.0)),
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=4),
    "qwen2_moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def new_model(kind: str = "qwen2", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    config = AutoConfig.for_model(kind, **(SIZES | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():  # logits as large as those of a trained model, so that softcaps show
        model.get_output_embeddings().weight.mul_(10 if model.config.tie_word_embeddings else 30)
    return model


def batch(rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Padded on the right, the first three tokens being a prompt."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, length), generator=g)
    place, lengths = torch.arange(length), torch.randint(4, length + 1, (rows, 1), generator=g)
    attention = (place < lengths).long()
    return dict(
        input_ids=ids.where(attention == 1, 0),
        attention_mask=attention,
        labels=ids.where((attention == 1) & (place >= 3), -100),
    )


def own_logprob(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """From the model's own logits, the states of an identity head."""
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    eye = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return reference.linear_logprob(logits, eye, inputs["labels"][:, 1:], **options)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: g for n, g in zip(parameters, grads, strict=True) if g is not None}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Two exact routes: they differ by rounding, in ``dtype`` or that of the tensors, of a few hundred sums."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        bound = 256 * torch.finfo(dtype or value.dtype).eps * value.abs().max().item()
        torch.testing.assert_close(got[name], value, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


def weighed(logprob: Tensor, entropy: Tensor | None) -> Tensor:
    """A loss of its own coefficient for each token."""
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, *logprob.shape, generator=g, dtype=logprob.dtype)
    return (a * logprob).sum() + (0 if entropy is None else (b * entropy).sum())


# --- the models' own log-probs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_and_gradients_are_the_models_own(name: str) -> None:
    kind, changes = MODELS[name]
    model, inputs = new_model(kind, **changes), batch()
    temperature = 0.5 + torch.rand(3, 8, dtype=torch.float64)
    want, want_entropy = own_logprob(model, inputs, temperature=temperature)
    assert want.abs().max() > 3
    patch_model(model)
    out = model(**inputs, return_logprobs=True, entropy=True, temperature=temperature, grad_tol=0.0)
    assert isinstance(out, LogprobOutput)
    assert out.aux_loss is None
    # Together: the reference's entropy is a difference of numbers as large as the log-probs.
    assert_equal(dict(x=torch.stack([out.logprobs, out.entropy])), dict(x=torch.stack([want, want_entropy])))
    assert (out.logprobs[inputs["labels"][:, 1:] == -100] == 0).all()
    got_grads = gradients(weighed(out.logprobs, out.entropy), model)
    assert_equal(got_grads, gradients(weighed(want, want_entropy), model))


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_balancing_loss_of_experts(kind: str) -> None:
    model, inputs = new_model(kind, torch.float32, **MIXTURES[kind]), batch()
    own = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], output_router_logits=True)
    want, _ = own_logprob(model, inputs)
    patch_model(model)
    out = model(**inputs, return_logprobs=True, output_router_logits=True, return_dict=False, grad_tol=0.0)
    assert_equal(dict(logprob=out.logprobs, aux=out.aux_loss), dict(logprob=want, aux=own.aux_loss))
    got_grads = gradients(weighed(out.logprobs, None) + out.aux_loss, model)
    assert_equal(got_grads, gradients(weighed(want, None) + own.aux_loss, model))
    with pytest.raises(ValueError, match="output_router_logits"):
        model(inputs["input_ids"], head=lambda hidden, weight, **options: hidden.sum(), output_router_logits=True)


def test_the_loss_within_the_model() -> None:
    """`head=` with `covgrpo_loss`, against the reference on the hidden states of the backbone."""
    model, inputs = new_model("gemma2", query_pre_attn_scalar=8), batch(rows=6)
    tokens = inputs["input_ids"], inputs["attention_mask"]
    g = torch.Generator().manual_seed(3)
    rest = dict(
        targets=inputs["labels"][:, 1:], advantages=torch.randn(6, generator=g, dtype=torch.float64), group_size=3
    )
    hidden = model.model(*tokens).last_hidden_state[:, :-1]
    want = reference.covgrpo_loss(hidden, model.lm_head.weight, softcap=30.0, **rest)
    want_grads = gradients(want.loss, model)
    patch_model(model)
    out = model(*tokens, head=lambda h, weight, **head: covgrpo_loss(h[:, :-1], weight, grad_tol=0.0, **head, **rest))
    assert_equal(dict(loss=out.loss, weights=out.weights), dict(loss=want.loss, weights=want.weights))
    assert_equal(gradients(out.loss, model), want_grads)


def test_pre_shifted_labels() -> None:
    model, inputs = patch_model(new_model()), batch()
    labels = inputs.pop("labels")
    want = model(**inputs, labels=labels, return_logprobs=True).logprobs
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    got = model(**inputs, shift_labels=shifted, return_logprobs=True).logprobs
    assert torch.equal(got, F.pad(want, (0, 1)))


class RefuseHead(TorchFunctionMode):
    """Fails where the head's product is computed as a layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not (func is F.linear and args[1] is self.weight), "the head ran as a layer"
        return func(*args, **(kwargs or {}))


def test_the_logits_are_never_built() -> None:
    model, inputs = patch_model(new_model()), batch()
    with RefuseHead(model.lm_head.weight):
        model(**inputs, return_logprobs=True, entropy=True)
        model(inputs["input_ids"], head=lambda hidden, weight, **options: hidden.sum())
        with pytest.raises(AssertionError, match="as a layer"):
            model(inputs["input_ids"])


def test_options_and_defaults() -> None:
    model, inputs = new_model(), batch()
    patch_model(model, temperature=0.7, entropy=True)
    want = own_logprob(model, inputs, temperature=0.7)
    out = model(**inputs, return_logprobs=True)
    assert_equal(dict(logprob=out.logprobs, entropy=out.entropy), dict(zip(("logprob", "entropy"), want, strict=True)))
    out = model(**inputs, return_logprobs=True, temperature=1.0, entropy=False)
    assert out.entropy is None
    assert_equal(dict(logprob=out.logprobs), dict(logprob=own_logprob(model, inputs)[0]))
    patch_model(model)  # again: other defaults, and still one patch
    assert torch.equal(model(**inputs, return_logprobs=True).logprobs, out.logprobs)


def test_a_float32_head_on_a_16_bit_backbone() -> None:
    model, inputs = new_model(dtype=torch.bfloat16), batch()
    patch_model(model)
    model.lm_head.float()
    hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    out = model(**inputs, return_logprobs=True)
    want = linear_logprob(hidden[:, :-1].float(), model.lm_head.weight, inputs["labels"][:, 1:]).logprob
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(out.logprobs, want)


def test_autocast() -> None:
    model, inputs = patch_model(new_model(dtype=torch.float32)), batch()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], head=lambda h, weight, **_: h)
        out = model(**inputs, return_logprobs=True)
        whole = model(**inputs, return_logprobs=True, autocast=False)
    weight, targets = model.lm_head.weight, inputs["labels"][:, 1:]
    want = linear_logprob(hidden[:, :-1].bfloat16(), weight.bfloat16(), targets).logprob
    assert torch.equal(out.logprobs, want)
    assert torch.equal(whole.logprobs, linear_logprob(hidden[:, :-1].float(), weight, targets).logprob)
    assert not torch.equal(whole.logprobs, want)


# --- what the patch leaves alone ---------------------------------------------------------------------------


def test_other_calls_are_the_models_own(tmp_path: Any) -> None:
    model, inputs = new_model(), batch()
    tokens = inputs["input_ids"][:, :4]
    generate = functools.partial(model.generate, tokens, max_new_tokens=4, do_sample=False)
    want, generated, keys = model(**inputs), generate(), list(model.state_dict())
    signature = inspect.signature(model.forward)
    patch_model(model)
    got = model(**inputs)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(generate(), generated)
    with pytest.raises(ValueError, match="no_such_option"):
        model.generate(tokens, no_such_option=1)
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)(**inputs).logits, want.logits
    )


def test_a_copy_is_patched_and_its_own() -> None:
    model, inputs = patch_model(new_model()), batch()
    twin = copy.deepcopy(model)
    before = model(**inputs, return_logprobs=True).logprobs
    with torch.no_grad():
        twin.model.embed_tokens.weight.neg_()
    assert torch.equal(model(**inputs, return_logprobs=True).logprobs, before)
    changed = twin(**inputs, return_logprobs=True).logprobs
    assert_equal(dict(logprob=changed), dict(logprob=own_logprob(twin, inputs)[0]))
    assert not torch.equal(changed, before)


def test_a_failing_head_leaves_no_trace() -> None:
    model, inputs = patch_model(new_model()), batch()

    def fails(hidden: Tensor, weight: Tensor, **options: Any) -> Any:
        raise RuntimeError("no head today")

    before = dict(vars(model.lm_head)), dict(model.lm_head._forward_hooks)
    with pytest.raises(RuntimeError, match="no head today"):
        model(inputs["input_ids"], head=fails)
    assert (vars(model.lm_head), model.lm_head._forward_hooks) == before
    assert model(inputs["input_ids"]).logits.shape[-1] == VOCAB


def test_a_refused_model_is_left_as_it_was() -> None:
    model = Doubled(AutoConfig.for_model("qwen2", **SIZES))
    before = vars(model).keys(), vars(model.lm_head).keys()
    with pytest.raises(ValueError, match="does something to its logits"):
        patch_model(model)
    assert (vars(model).keys(), vars(model.lm_head).keys()) == before
    assert not model.lm_head._forward_hooks


def test_the_model_within_its_own_head() -> None:
    model, inputs = patch_model(new_model()), batch()
    tokens = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    want = model(**inputs, return_logprobs=True).logprobs, model(**tokens).logits

    def head(hidden: Tensor, weight: Tensor, **options: Any) -> Any:
        nested = model(**inputs, return_logprobs=True).logprobs, model(**tokens).logits
        return *nested, linear_logprob(hidden[:, :-1], weight, inputs["labels"][:, 1:], **options).logprob

    logprobs, logits, after = model(**tokens, head=head)
    assert torch.equal(logprobs, want[0])
    assert torch.equal(logits, want[1])
    assert torch.equal(after, want[0])


def test_threads_share_a_model() -> None:
    """Scoring, a loss and generation at once: each thread has the results that it has alone, bit for bit."""
    model, inputs = new_model(), batch()
    tokens = inputs["input_ids"]
    patch_model(model)
    before = dict(vars(model)), dict(vars(model.lm_head)), list(model.lm_head._forward_hooks)

    def generated() -> Tensor:
        out = model.generate(
            tokens[:, :3], max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(out.logits)

    jobs: list[Callable[[], Tensor]] = [
        lambda: model(**inputs, return_logprobs=True).logprobs,
        lambda: model(**inputs, return_logprobs=True, entropy=True, temperature=0.5).entropy,
        lambda: model(tokens).logits,
        lambda: model(tokens, head=lambda hidden, weight, **options: hidden.double().sum(-1)),
        generated,
    ]
    wanted = [job().detach() for job in jobs]

    def work(number: int) -> int:
        job, want = jobs[number % len(jobs)], wanted[number % len(jobs)]
        return sum(torch.equal(job().detach(), want) for _ in range(30))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2 * len(jobs)) as pool:
            assert list(pool.map(work, range(2 * len(jobs)))) == [30] * 2 * len(jobs)
    finally:
        sys.setswitchinterval(interval)
    assert (vars(model), vars(model.lm_head), list(model.lm_head._forward_hooks)) == before


def test_a_copy_by_pickle_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = patch_model(new_model(), temperature=0.7), batch()

    def results(model: Any) -> list[Tensor]:
        first = model(**inputs, return_logprobs=True).logprobs
        return [first, model(inputs["input_ids"]).logits, patch_model(model)(**inputs, return_logprobs=True).logprobs]

    file = io.BytesIO()
    torch.save(model, file)
    twins = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    # A new process numbers hooks from zero; those of the model keep their numbers.
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)
    file.seek(0)
    twins.append(torch.load(file, weights_only=False))
    for _ in range(1 + max(model.lm_head._forward_hooks)):
        twins[-1].lm_head.register_forward_hook(lambda *_: None).remove()
    want = results(model)
    for twin in twins:
        assert all(torch.equal(a, b) for a, b in zip(results(twin), want, strict=True))
        assert twin.lm_head.forward.layer is twin.lm_head
        assert twin.forward.model is twin


def marked_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Such as Liger puts in place of a model's own."""
    out = type(self).forward(self, *args, **kwargs)
    out.past_key_values = "marked"
    return out


def test_a_copy_of_a_model_with_another_forward() -> None:
    model, inputs = new_model(), batch()
    model.forward = MethodType(marked_forward, model)
    patch_model(model)
    want = model(**inputs, return_logprobs=True).logprobs
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert twin(inputs["input_ids"]).past_key_values == "marked"
        with torch.no_grad():
            twin.lm_head.weight.neg_()
        assert_equal(dict(x=twin(**inputs, return_logprobs=True).logprobs), dict(x=own_logprob(twin, inputs)[0]))
    assert torch.equal(model(**inputs, return_logprobs=True).logprobs, want)


def test_a_pickled_model_with_a_trained_head() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model, inputs = peft.get_peft_model(patch_model(new_model()), config), batch()
    want = model(**inputs, return_logprobs=True).logprobs
    twin = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.zero_()
    assert torch.equal(twin(**inputs, return_logprobs=True).logprobs, want)


@pytest.mark.parametrize(("kind", "in_place"), [("qwen2", False), ("mixtral", True)])
def test_compile(kind: str, in_place: bool) -> None:
    """One graph a call without a break; and one more for all lengths but the first."""
    model = patch_model(new_model(kind, torch.float32, num_hidden_layers=1, **MIXTURES.get(kind, {})))
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    graphs = CompileCounter()
    if in_place:
        model.compile(backend=graphs, fullgraph=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for length in (9, 11, 7, 12):
        inputs = batch(length=length)
        out, want = (m(**inputs, return_logprobs=True, entropy=True, grad_tol=0.0) for m in (compiled, eager))
        assert_equal(dict(x=out.logprobs, h=out.entropy), dict(x=want.logprobs, h=want.entropy))
        got_grads = gradients(weighed(out.logprobs, out.entropy), model)
        assert_equal(got_grads, gradients(weighed(want.logprobs, want.entropy), eager))
    assert graphs.frame_count <= 2
    graphs.clear()
    torch._dynamo.reset()
    ids, eye = batch()["input_ids"], torch.ones(32)
    got = compiled(ids, head=lambda hidden, weight, **options: hidden @ eye)
    assert_equal(dict(x=got), dict(x=eager(ids, head=lambda hidden, weight, **options: hidden @ eye)))
    assert graphs.frame_count == 1
    torch._dynamo.reset()


# --- what users do to the head -----------------------------------------------------------------------------


def mask_padding(module: nn.Module, args: Any, output: Any) -> Any:
    """A vocabulary of 60 that was padded."""
    if not isinstance(output, Tensor):
        return output
    return output.masked_fill(torch.arange(output.shape[-1]) >= 60, -torch.inf)


class MaskPadding:
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return mask_padding(module, args, output)


def scale_gradient(module: nn.Module, *grads: Any) -> Any:
    return tuple(None if grad is None else 2 * grad for grad in grads[0])


HOOKS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "forward": ("forward hook.*mask_padding", lambda m: m.register_forward_hook(mask_padding)),
    "first of all": ("forward hook.*mask_padding", lambda m: m.register_forward_hook(mask_padding, prepend=True)),
    "always": ("forward hook.*mask_padding", lambda m: m.register_forward_hook(mask_padding, always_call=True)),
    "with keywords": ("forward hook.*MaskPadding", lambda m: m.register_forward_hook(MaskPadding(), with_kwargs=True)),
    "a partial": ("forward hook.*mask_padding", lambda m: m.register_forward_hook(functools.partial(mask_padding))),
    "of all modules": (
        "forward hook.*<lambda>",
        lambda m: nn.modules.module.register_module_forward_hook(
            lambda *args: mask_padding(*args) if args[0] is m else None
        ),
    ),
    "backward": ("backward hook.*scale_gradient", lambda m: m.register_full_backward_hook(scale_gradient)),
    "before backward": ("backward hook.*scale_gradient", lambda m: m.register_full_backward_pre_hook(scale_gradient)),
    "backward of all modules": (
        "backward hook.*<lambda>",
        lambda m: nn.modules.module.register_module_full_backward_hook(
            lambda *args: scale_gradient(*args) if args[0] is m else None
        ),
    ),
    "before backward of all modules": (
        "backward hook.*<lambda>",
        lambda m: nn.modules.module.register_module_full_backward_pre_hook(
            lambda *args: scale_gradient(*args) if args[0] is m else None
        ),
    ),
}


@pytest.mark.filterwarnings("ignore:For backward hooks to be called, module output")
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_expect_logits_are_refused(name: str) -> None:
    match, register = HOOKS[name]
    model, inputs = new_model(), batch()
    handle = register(model.lm_head)
    try:
        own = model(**inputs)
        with pytest.raises(ValueError, match=f"no {match}"):
            patch_model(model)
    finally:
        handle.remove()
    want = own_logprob(model, inputs)[0]
    patch_model(model)
    handle = register(model.lm_head)
    try:
        for call in (dict(return_logprobs=True, **inputs), dict(input_ids=inputs["input_ids"], head=print)):
            with pytest.raises(ValueError, match=f"no {match}"):
                model(**call)
        assert torch.equal(model(**inputs).logits, own.logits)  # where they belong they act
    finally:
        handle.remove()
    assert_equal(dict(x=model(**inputs, return_logprobs=True).logprobs), dict(x=want))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sharding_hook_that_came_later_sees_the_result(compiled: bool) -> None:
    """FSDP waits for the gradient of what the head returned to its hook."""
    model, inputs, seen = patch_model(new_model()), batch(), []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output)

    hook.__module__ = "torch.distributed.fsdp"
    model.lm_head.register_forward_hook(hook)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager") if compiled else model
    out = run(**inputs, return_logprobs=True).logprobs
    assert_equal(dict(x=out), dict(x=own_logprob(model, inputs)[0]))
    assert torch.equal(seen[0][0], out)


def test_a_hook_on_the_trained_head_of_peft_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model, inputs = peft.get_peft_model(patch_model(new_model()), config), batch()
    wrapper = model.get_base_model().lm_head
    for module in (wrapper, wrapper.modules_to_save["default"]):
        handle = module.register_forward_hook(mask_padding)
        with pytest.raises(ValueError, match="no forward hook"):
            model(**inputs, return_logprobs=True)
        handle.remove()
    model(**inputs, return_logprobs=True)


def test_counting_operations() -> None:
    """torch's own hooks on every module change nothing."""
    model, inputs = patch_model(new_model()), batch()
    want = model(**inputs, return_logprobs=True).logprobs
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(model(**inputs, return_logprobs=True).logprobs, want)
    assert counter.get_total_flops() > 0


def halved(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0] / 2


def halved_keywords(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> Any:
    return (), dict(input=args[0] / 2)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "pre-hook": lambda m: m.register_forward_pre_hook(halved),
    "pre-hook with keywords": lambda m: m.register_forward_pre_hook(halved_keywords, with_kwargs=True),
    "parametrization": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Halved()),
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "old weight norm": nn.utils.weight_norm,
    "pruning": lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5),
    "another head": lambda m: None,
    "larger vocabulary": lambda m: None,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_what_acts_before_the_product_acts_as_for_logits(name: str, patch_first: bool) -> None:
    model, inputs = new_model(), batch()
    if patch_first:
        patch_model(model)
    CHANGES[name](model.lm_head)
    if name == "another head":
        model.set_output_embeddings(nn.Linear(32, VOCAB, dtype=torch.float64))
    if name == "larger vocabulary":
        model.resize_token_embeddings(VOCAB + 5)
    if not patch_first:
        patch_model(model)
    want, want_entropy = own_logprob(model, inputs)
    out = model(**inputs, return_logprobs=True, entropy=True, grad_tol=0.0)
    assert_equal(dict(x=torch.stack([out.logprobs, out.entropy])), dict(x=torch.stack([want, want_entropy])))
    got_grads = gradients(weighed(out.logprobs, out.entropy), model)
    assert_equal(got_grads, gradients(weighed(want, want_entropy), model))


def test_power_iterations_are_not_counted_twice() -> None:
    """A weight that changes when it is looked at is looked at once a call, as by a layer."""
    model, inputs = patch_model(new_model()).train(), batch()
    nn.utils.parametrizations.spectral_norm(model.lm_head)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model(**inputs, return_logprobs=True)
        twin(inputs["input_ids"])
    for got, want in zip(model.lm_head.buffers(), twin.lm_head.buffers(), strict=True):
        assert torch.equal(got, want)


def test_a_head_with_a_forward_of_its_own_is_refused() -> None:
    model, inputs = new_model(), batch()

    def capped(hidden: Tensor) -> Tensor:
        return torch.tanh(F.linear(hidden, model.lm_head.weight))

    model.lm_head.forward = capped
    with pytest.raises(ValueError, match=r"forward of torch.nn.Linear, got .*capped"):
        patch_model(model)
    del model.lm_head.forward
    patch_model(model)
    before = model.lm_head.forward
    model.lm_head.forward = capped
    with pytest.raises(ValueError, match=r"forward of torch.nn.Linear, got .*capped"):
        model(**inputs, return_logprobs=True)
    assert model(**inputs).logits.abs().max() <= 1
    model.lm_head.forward = before
    assert_equal(dict(x=model(**inputs, return_logprobs=True).logprobs), dict(x=own_logprob(model, inputs)[0]))


class Quantised(Tensor):
    """As torchao's: another number stands for each of its entries, and its own `F.linear` knows which."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], args[1].as_subclass(Tensor).round(decimals=1), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


class Int4Params(nn.Parameter):
    """As bitsandbytes': packed integers."""


def test_a_quantised_head_is_refused() -> None:
    class Int8Linear(nn.Linear):  # as of most libraries, where a class of layers comes with a format
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden).round(decimals=1)

    weights: list[tuple[str, Any]] = [
        ("Quantised", lambda w: nn.Parameter(w.as_subclass(Quantised))),
        ("Int4Params", lambda w: Int4Params(w.to(torch.uint8), requires_grad=False)),
        ("Parameter of torch.int8", lambda w: nn.Parameter(w.to(torch.int8), requires_grad=False)),
        ("Parameter of torch.float8_e4m3fn", lambda w: nn.Parameter(w.to(torch.float8_e4m3fn))),
    ]
    for match, quantise in weights:
        model = new_model()
        weight = model.lm_head.weight
        model.lm_head.weight = quantise(weight.detach())
        with pytest.raises(ValueError, match=f"got {match}.*quantization"):
            patch_model(model)
        model.lm_head.weight = weight
        patch_model(model)
        model.lm_head.weight = quantise(weight.detach())
        with pytest.raises(ValueError, match=f"got {match}.*quantization"):
            model(**batch(), return_logprobs=True)
    model = new_model()
    model.lm_head.__class__ = Int8Linear
    with pytest.raises(ValueError, match=r"got .*Int8Linear: .*quantization"):
        patch_model(model)


def test_gradient_checkpointing_and_dropout() -> None:
    model = new_model(attention_dropout=0.3).train()
    inputs, state = batch(), torch.random.get_rng_state()
    patch_model(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    results = []
    for _ in range(2):
        torch.random.set_rng_state(state)
        out = model(**inputs, return_logprobs=True, grad_tol=0.0)
        results.append({"logprob": out.logprobs} | gradients(weighed(out.logprobs, None), model))
        model.gradient_checkpointing_enable()
    assert_equal(results[1], results[0])


# --- together with other libraries -------------------------------------------------------------------------


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_peft(patch_first: bool, saved: list[str] | None) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], modules_to_save=saved, init_lora_weights=False
    )
    base, inputs = new_model(), batch()
    torch.manual_seed(4)
    if patch_first:
        model = peft.get_peft_model(patch_model(base), config)
    else:
        model = peft.get_peft_model(base, config)
        assert patch_model(model) is model
    if saved:
        with torch.no_grad():  # the trained copy is another head than the original
            base.lm_head.modules_to_save["default"].weight.mul_(1.1)
    want, want_entropy = own_logprob(model, inputs)
    out = model(**inputs, return_logprobs=True, entropy=True, grad_tol=0.0)
    assert_equal(dict(x=out.logprobs, h=out.entropy), dict(x=want, h=want_entropy))
    grads = gradients(weighed(out.logprobs, out.entropy), model)
    assert any("lora_B" in name for name in grads)
    assert any("lm_head" in name for name in grads) == bool(saved)
    assert_equal(grads, gradients(weighed(want, want_entropy), model))
    with model.disable_adapter():  # the reference model of trainers
        off = model(**inputs, return_logprobs=True).logprobs
        assert_equal(dict(x=off), dict(x=own_logprob(model, inputs)[0]))
    assert (off - out.logprobs).abs().max() > 0.01


def test_an_adapter_on_the_head_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"got peft.tuners.lora.layer.Linear: .*modules_to_save"):
        patch_model(peft.get_peft_model(new_model(), config))
    model = peft.get_peft_model(patch_model(new_model()), config)
    with pytest.raises(ValueError, match="modules_to_save"):
        model(**batch(), return_logprobs=True)


@pytest.mark.parametrize("fused", [True, False])
def test_liger(fused: bool) -> None:
    """Its kernels don't run here; what it replaces, the model's forward or nothing, and the patch go together."""
    liger = pytest.importorskip("liger_kernel.transformers")
    model, inputs = new_model(), batch()
    want = own_logprob(model, inputs)[0]
    apply = functools.partial(
        liger.apply_liger_kernel_to_qwen2,
        rope=False, rms_norm=False, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=fused, model=model,
    )  # fmt: skip
    apply()
    patch_model(model)
    if not fused:
        apply()
    for mode in (model.train, model.eval):
        mode()
        assert_equal(dict(x=model(**inputs, return_logprobs=True).logprobs), dict(x=want))
    assert_equal(dict(x=own_logprob(model, inputs)[0]), dict(x=want))
    assert type(model(inputs["input_ids"])).__name__.startswith("Liger") == fused


def test_accelerate_mixed_precision() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = patch_model(new_model(dtype=torch.float32)), batch()
    plain = model(**inputs, return_logprobs=True).logprobs
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**inputs, return_logprobs=True).logprobs
    # What it keeps for the whole process a trainer of another test may have set.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    out = prepared(**inputs, return_logprobs=True)
    assert torch.equal(out.logprobs, want)
    assert not torch.equal(out.logprobs, plain)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    twin = copy.deepcopy(unwrapped)
    with torch.no_grad():
        unwrapped.lm_head.weight.neg_()
    assert torch.equal(twin(**inputs, return_logprobs=True).logprobs, plain)
    assert not torch.equal(unwrapped(**inputs, return_logprobs=True).logprobs, plain)
    with pytest.raises(AttributeError, match="patched again before it is pickled"):
        pickle.dumps(twin)
    twin = pickle.loads(pickle.dumps(patch_model(twin)))
    assert torch.equal(twin(**inputs, return_logprobs=True).logprobs, plain)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_offload() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = patch_model(new_model()), batch()
    want, logits = model(**inputs, return_logprobs=True).logprobs, model(**inputs).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    with torch.no_grad():
        assert torch.equal(model(**inputs, return_logprobs=True).logprobs, want)
        assert torch.equal(model(**inputs).logits, logits)


# --- errors ------------------------------------------------------------------------------------------------


class Doubled(transformers.Qwen2ForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


class Forbids(transformers.Qwen2ForCausalLM):
    """A token that never comes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits[..., 5:6] = -100
        return out


class Cuts(transformers.Qwen2ForCausalLM):
    """A vocabulary that was padded."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits[..., :-3]
        return out


class Bypasses(transformers.Qwen2ForCausalLM):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=F.linear(hidden, self.lm_head.weight))


@pytest.mark.parametrize("kind", [Doubled, Forbids, Cuts, Bypasses])
def test_unknown_logits_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="qwen2 model does something to its logits"):
        patch_model(kind(AutoConfig.for_model("qwen2", **SIZES)))


def test_tensors_without_values() -> None:
    with FakeTensorMode() as mode:
        model, ids = patch_model(new_model(dtype=torch.float32)), mode.from_tensor(batch()["input_ids"])
        assert model(ids, labels=ids, return_logprobs=True).logprobs.shape == (3, 8)


def test_parameters_elsewhere_are_not_checked() -> None:
    with torch.device("meta"):
        model = patch_model(Bypasses(AutoConfig.for_model("qwen2", **SIZES)))
        with pytest.raises(ValueError, match="call its output embedding once, got 0"):
            model(torch.zeros(1, 2, dtype=torch.long), head=print)


def test_a_softcap_that_is_not_in_the_config_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the weights: these logits are so small that the cap changes none of them."""
    model = new_model("gemma2", torch.float32, query_pre_attn_scalar=8)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    options = dict(logit_scale=1.0, softcap=None)
    monkeypatch.setattr("covgrpo_kernels.integrations.transformers.head_options", lambda model: options)
    with pytest.raises(ValueError, match="gemma2"):
        patch_model(model)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="model must be"):
        patch_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="output embedding"):
        patch_model(transformers.Qwen2Model(AutoConfig.for_model("qwen2", **SIZES)))
    small = dict(vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1)
    both = transformers.BartForConditionalGeneration(AutoConfig.for_model("bart", **small))
    with pytest.raises(ValueError, match="decoder-only, got BartForConditionalGeneration, an encoder-decoder"):
        patch_model(both)
    with pytest.raises(ValueError, match="causal LM, got BertForMaskedLM"):
        patch_model(transformers.BertForMaskedLM(AutoConfig.for_model("bert", **SIZES)))
    with pytest.raises(ValueError, match="output embedding, got ViTModel, which has none"):
        patch_model(transformers.ViTModel(AutoConfig.for_model("vit", hidden_size=32, num_hidden_layers=1)))
    with pytest.raises(TypeError, match="autocast must be a bool"):
        patch_model(new_model(), autocast=1)(**batch(), return_logprobs=True)
    with pytest.raises(TypeError, match=r"defaults must be among temperature.*got labels"):
        patch_model(new_model(), labels=None)
    parallel = new_model()
    parallel._tp_size = 2
    with pytest.raises(ValueError, match="vocab_group"):
        patch_model(parallel)
    model, inputs = patch_model(new_model()), batch()
    ids, labels = inputs["input_ids"], inputs["labels"]
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("labels or shift_labels must be given", lambda: model(ids, return_logprobs=True)),
        ("not both", lambda: model(ids, labels=labels, shift_labels=labels, return_logprobs=True)),
        (r"labels must have shape \[3, 9\]", lambda: model(ids, labels=labels[:, 1:], return_logprobs=True)),
        (r"shift_labels must have shape", lambda: model(ids, shift_labels=labels[:, 1:], return_logprobs=True)),
        ("head must be None", lambda: model(ids, labels=labels, return_logprobs=True, head=print)),
        ("labels must be None", lambda: model(ids, labels=labels, head=print)),
        ("temperature", lambda: model(ids, labels=labels, return_logprobs=True, temperature=0.0)),
    ]
    for match, call in calls:
        with pytest.raises(ValueError, match=match):
            call()


# --- packed sequences --------------------------------------------------------------------------------------

LENGTHS = (5, 2, 7, 4, 1, 6)


@functools.cache
def packed_case(attention: str) -> tuple[Any, dict[str, Tensor]]:
    """A model, and a padded batch of prompts and responses, all per token: [B, L]."""
    model = patch_model(new_model("qwen2", attn_implementation=attention))
    g = torch.Generator().manual_seed(5)
    rows, longest = len(LENGTHS), max(LENGTHS)
    ids = torch.randint(3, VOCAB, (rows, longest), generator=g)
    place = torch.arange(longest)
    attended = place < torch.tensor(LENGTHS).unsqueeze(1)
    # Two prompt tokens, and of the response some tokens that a tool wrote.
    mask = attended & (place >= 2) & (torch.rand(rows, longest, generator=g) < 0.8)
    data = dict(
        input_ids=ids.where(attended, 0),
        attended=attended,
        mask=mask,
        advantages=torch.randn(rows, 1, generator=g, dtype=torch.float64).expand(rows, longest),
        temperature=0.5 + torch.rand(rows, longest, generator=g, dtype=torch.float64),
        rollout_weights=(2 * torch.rand(rows, longest, generator=g, dtype=torch.float64)).clamp(max=1.5),
        group_ids=(torch.arange(rows) % 2).unsqueeze(1).expand(rows, longest),
    )
    with torch.no_grad():
        x = model(ids, attention_mask=attended.long(), labels=ids, return_logprobs=True).logprobs
    off = 0.2 * torch.randn(rows, longest, generator=g, dtype=torch.float64)
    return model, data | dict(old_logprobs=F.pad(x, (1, 0)) + off)


CONFIGS = [
    *(
        CovGRPOConfig(loss_type=kind, max_completion_length=9, entropy_coef=0.01)
        for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
    ),
    CovGRPOConfig(importance_level="sequence", clip_low=3e-4, clip_high=4e-4),  # GSPO
    CovGRPOConfig(weighting=CovarianceWeighting(centering="sequence", advantage_centering="response")),
]


@pytest.mark.parametrize(("config", "attention"), [*((c, "sdpa") for c in CONFIGS), (CONFIGS[0], "eager")])
def test_packed_is_padded(config: CovGRPOConfig, attention: str) -> None:
    model, data = packed_case(attention)
    per_token = ("mask", "advantages", "temperature", "rollout_weights", "group_ids", "old_logprobs")
    results = []

    padded = {name: data[name][:, 1:] for name in per_token}
    targets = data["input_ids"][:, 1:].where(data["attended"][:, 1:], -100)

    def padded_loss(hidden: Tensor, weight: Tensor, **options: Any) -> Any:
        return covgrpo_loss(hidden[:, :-1], weight, targets, grad_tol=0.0, config=config, **padded, **options)

    out = model(data["input_ids"], attention_mask=data["attended"].long(), head=padded_loss)
    response = data["mask"][:, 1:]
    results.append(dict(x=out.logprobs[response], w=out.weights[response], loss=out.loss) | gradients(out.loss, model))

    ids = data["input_ids"][data["attended"]]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    packed = packed_sequences(ids, cu_seqlens=ends)
    rolled = {name: data[name][data["attended"]].roll(-1) for name in per_token}
    shapes = {"[N]": lambda value: value, "[1, N]": lambda value: value.unsqueeze(0)}
    for name, shape in shapes.items():

        def packed_loss(hidden: Tensor, weight: Tensor, name: str = name, shape: Any = shape, **options: Any) -> Any:
            return covgrpo_loss(
                hidden[0] if name == "[N]" else hidden, weight, shape(packed.targets), grad_tol=0.0, config=config,
                sequence_ids=shape(packed.sequence_ids), **{n: shape(v) for n, v in rolled.items()}, **options,
            )  # fmt: skip

        out = model(ids.unsqueeze(0), position_ids=packed.position_ids.unsqueeze(0), head=packed_loss)
        response = shape(rolled["mask"] & (packed.targets != -100))
        results.append(
            dict(x=out.logprobs[response], w=out.weights[response], loss=out.loss) | gradients(out.loss, model)
        )
    for result in results[1:]:
        assert_equal(result, results[0], torch.float32 if attention == "eager" else None)  # its softmax's
    assert len(results[0]["x"]) > 8
    assert results[0]["w"].std() > 0


def test_packed_logprobs() -> None:
    model, data = packed_case("sdpa")
    ids, attended = data["input_ids"], data["attended"]
    want = model(ids, attention_mask=attended.long(), labels=ids.where(attended, -100), return_logprobs=True).logprobs
    packed = packed_sequences(ids[attended].unsqueeze(0), cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0))
    got = model(
        ids[attended].unsqueeze(0), position_ids=packed.position_ids, shift_labels=packed.targets, return_logprobs=True
    ).logprobs
    assert_equal(dict(x=got[packed.targets != -100]), dict(x=want[attended[:, 1:]]))


def test_where_sequences_end() -> None:
    ids = torch.tensor([7, 8, 9, 5, 6, 4])
    by_places = packed_sequences(ids, cu_seqlens=torch.tensor([0, 3, 3, 5, 6], dtype=torch.int32))
    assert by_places.targets.tolist() == [8, 9, -100, 6, -100, -100]
    assert by_places.sequence_ids.tolist() == [0, 0, 0, 2, 2, 3]
    assert by_places.position_ids.tolist() == [0, 1, 2, 0, 1, 0]
    by_positions = packed_sequences(ids.unsqueeze(0), position_ids=torch.tensor([[4, 5, 6, 0, 1, 0]]))
    assert by_positions.targets.tolist() == [[8, 9, -100, 6, -100, -100]]
    assert by_positions.sequence_ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert by_positions.position_ids.tolist() == [[4, 5, 6, 0, 1, 0]]
    # Labels: a -100 is no target, and ends nothing. The last position being one less than the first, as in a circle.
    masked = packed_sequences(torch.tensor([7, -100, 9]), position_ids=torch.tensor([3, 4, 2]))
    assert masked.targets.tolist() == [-100, -100, -100]
    assert masked.sequence_ids.tolist() == [0, 0, 1]
    alone = packed_sequences(ids, position_ids=torch.arange(6))
    assert alone.targets.tolist() == [8, 9, 5, 6, 4, -100]
    assert packed_sequences(ids[:0], cu_seqlens=torch.tensor([0, 0])).targets.shape == (0,)


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        (
            "input_ids must have shape",
            dict(input_ids=torch.zeros(2, 3, dtype=torch.long), cu_seqlens=torch.tensor([0, 3])),
        ),
        ("input_ids", dict(input_ids=torch.zeros(3), cu_seqlens=torch.tensor([0, 3]))),
        ("and not both", dict()),
        ("and not both", dict(cu_seqlens=torch.tensor([0, 3]), position_ids=torch.arange(3))),
        ("position_ids must have shape", dict(position_ids=torch.arange(4))),
        ("position_ids", dict(position_ids=torch.zeros(3))),
        ("cu_seqlens must have shape", dict(cu_seqlens=torch.tensor([0]))),
        ("cu_seqlens must ascend", dict(cu_seqlens=torch.tensor([0, 2]))),
        ("cu_seqlens must ascend", dict(cu_seqlens=torch.tensor([1, 3]))),
        ("cu_seqlens must ascend", dict(cu_seqlens=torch.tensor([0, 2, 1, 3]))),
    ],
)
def test_wrong_packing_is_named(match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        packed_sequences(**(dict(input_ids=torch.arange(3)) | arguments))
