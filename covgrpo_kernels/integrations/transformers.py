"""`patch_model`: a causal LM of transformers that returns log-probs, or a loss, in place of logits.

The model's own forward runs, and where it calls its head, the head module's ``forward`` is ours for the duration of the
call. So everything that hangs on the call of a module happens as it does for logits: FSDP2 and ZeRO-3 gather the weight
and reduce its gradient, DDP sees one forward of the whole model, a mixture of experts computes its balancing loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..logprob import linear_logprob


@dataclass
class LogprobOutput(ModelOutput):
    """What a patched model returns with ``return_logprobs=True``."""

    logprobs: Tensor | None = None  # [B, L - 1], or [B, L] with shift_labels; float32 (float64 of a float64 model)
    entropy: Tensor | None = None  # likewise; None unless asked for
    aux_loss: Tensor | None = None  # [] as the model's own forward gives it with output_router_logits=True


# What a call passes to `linear_logprob`.
_OPTIONS = ("temperature", "entropy", "grad_tol", "grad_mode", "generator")


def patch_model(model: nn.Module, **defaults: Any) -> nn.Module:
    """Gives a causal LM's ``forward`` two more ways to be called, which never build logits.

    - ``model(input_ids, attention_mask=..., labels=labels, return_logprobs=True)`` returns `LogprobOutput`: the
      log-prob of each label under the state before it. ``labels`` [B, L] are unshifted, as everywhere in transformers;
      where one is -100 the log-prob is zero and nothing is computed. ``shift_labels`` [B, L] instead stand at the
      position that predicts them. More keywords, as `covgrpo_kernels.linear_logprob` takes them: temperature (a number,
      or a tensor of the shape of the log-probs), entropy, grad_tol, grad_mode, generator.
    - ``model(input_ids, attention_mask=..., head=function)`` returns what ``function(hidden, weight, bias=...,
      logit_scale=..., softcap=...)`` returns, hidden [B, L, D] being what the model's head gets: `covgrpo_loss`, in a
      closure over the rest of its arguments. What is to have a gradient is a tensor, or in a tuple, list or dict.

    Any other call is the model's own. The head's scale and softcap come from the config, and are compared with what the
    model does to its logits (two tokens through the model; not where parameters are sharded or on the meta device).

    Patch before DDP, and after anything that replaces the model's forward (Liger's ``fused_linear_cross_entropy``);
    PEFT and FSDP2 may come before or after. ``copy.deepcopy`` of a patched model is patched.

    Args:
        model: a `transformers.PreTrainedModel` whose output embedding is a `torch.nn.Linear`, or a PEFT model of one
            whose adapters are not on the head (``modules_to_save=["lm_head"]`` is fine).
        **defaults: of the keywords temperature, entropy, grad_tol, grad_mode, generator. Patching again replaces them.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: a wrong argument, by name; a model that does something to its logits that is not known
            here; in a call, labels of a wrong shape or a head that got an adapter.
    """
    patched: Any = model
    if hasattr(patched, "get_base_model"):  # PEFT
        patched = patched.get_base_model()
    if not issubclass(type(patched), PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel or a PEFT model, got {type(model).__name__}")
    if unknown := sorted(set(defaults) - set(_OPTIONS)):
        raise TypeError(f"defaults must be among {', '.join(_OPTIONS)}, got {', '.join(unknown)}")
    head_layers(patched)
    check_logits(patched)
    if not hasattr(patched, "_own_forward"):
        # Attributes of the model rather than a closure, so that a copy of the model calls its own.
        patched._own_forward = patched.forward

        def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            return _forward(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(type(patched).forward)  # type: ignore[attr-defined]  # for generate
        patched.forward = MethodType(forward, patched)
    patched._logprob_defaults = defaults
    return model


def _forward(model: Any, *args: Any, return_logprobs: bool = False, head: Any = None, **kwargs: Any) -> Any:
    if not return_logprobs and head is None:
        return model._own_forward(*args, **kwargs)
    if return_logprobs and head is not None:
        raise ValueError("head must be None with return_logprobs=True, got both")
    labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    if head is not None:
        if labels is not None or shift_labels is not None:
            raise ValueError("labels must be None with head, whose function gets its targets by itself")
        result, outputs = _run_with_head(model, head, args, kwargs)
        if getattr(outputs, "aux_loss", None) is not None:
            raise ValueError("output_router_logits must be False with head: its auxiliary loss would be lost")
        return result

    options = model._logprob_defaults | {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    if (labels is None) == (shift_labels is None):
        raise ValueError("labels or shift_labels must be given with return_logprobs=True, and not both")

    def logprobs(hidden: Tensor, weight: Tensor, **how: Any) -> Any:  # [B, L, D], [V, D]
        name, targets = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
        if targets.shape != hidden.shape[:-1]:
            raise ValueError(f"{name} must have shape {list(hidden.shape[:-1])}, got {list(targets.shape)}")
        if shift_labels is None:
            hidden, targets = hidden[:, :-1], targets[:, 1:]
        outputs = linear_logprob(hidden, weight, targets.to(hidden.device), **how, **options)
        # Views would lose FSDP's hook on them to an operation in place.
        return [None if output is None else output.clone() for output in outputs]

    (logprob, entropy), outputs = _run_with_head(model, logprobs, args, kwargs)
    return LogprobOutput(logprob, entropy, getattr(outputs, "aux_loss", None))


def _run_with_head(
    model: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """What the function makes of the hidden states, and what the model's own forward makes of empty logits."""
    lm_head, results = model.get_output_embeddings(), list[Any]()

    def take(module: nn.Module, args: tuple[Tensor], result: Any) -> Tensor:
        results.append(result)
        return args[0].new_empty(*args[0].shape[:-1], 0)

    # The last of the head's hooks: those of FSDP have seen the result, whose gradient they wait for.
    hook = lm_head.register_forward_hook(take)
    kwargs.setdefault("use_cache", False)
    try:
        with _replaced_forwards(head_layers(model), function, head_options(model)):
            outputs = model._own_forward(*args, **(kwargs | dict(return_dict=True)))
    finally:
        hook.remove()
    if len(results) != 1:
        raise ValueError(f"a {model.config.model_type} model must call its output embedding once, got {len(results)}")
    return results[0], outputs


@contextmanager
def _replaced_forwards(
    layers: list[nn.Linear], function: Callable[..., Any], options: dict[str, Any]
) -> Iterator[None]:
    def replacement(layer: nn.Linear) -> Callable[[Tensor], Any]:
        def forward(hidden: Tensor) -> Any:
            hidden = hidden.to(layer.weight.dtype)  # of a float32 head on a 16-bit backbone
            return function(hidden, layer.weight, bias=layer.bias, **options)

        return forward

    # Accelerate's hooks are in a forward of theirs, which calls the one it found under this name.
    names = ["_old_forward" if hasattr(layer, "_hf_hook") else "forward" for layer in layers]
    before = [vars(layer).get(name) for layer, name in zip(layers, names, strict=True)]
    try:
        for layer, name in zip(layers, names, strict=True):
            setattr(layer, name, replacement(layer))
        yield
    finally:
        for layer, name, own in zip(layers, names, before, strict=True):
            if own is None:
                vars(layer).pop(name, None)
            else:
                setattr(layer, name, own)


def head_layers(model: Any) -> list[nn.Linear]:
    """The layers one of which is the head in a call: of PEFT's ``modules_to_save`` the original and the trained ones.
    Raises ValueError for a head that is more than a matrix and a bias."""
    head = model.get_output_embeddings()
    saved = getattr(head, "modules_to_save", None)
    layers = [head] if saved is None else [head.original_module, *saved.values()]
    for layer in layers:
        if getattr(type(layer), "forward", None) is not nn.Linear.forward:
            raise ValueError(
                f"model must have a torch.nn.Linear as its output embedding, got {type(layer).__name__}: adapters and "
                'quantization of the head are not supported (PEFT: modules_to_save=["lm_head"] trains it whole)'
            )
    if (model.tp_size or 1) > 1:
        raise ValueError("model must not be tensor-parallel: give linear_logprob the head's slice and its vocab_group")
    return layers


def head_options(model: Any) -> dict[str, Any]:
    """What the model does to its logits, as `linear_logprob` and `covgrpo_loss` take it."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)):
            divides = name == "logits_scaling" and config.model_type != "hyperclovax"
            scale *= 1 / value if divides else value
    return dict(logit_scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Raises ValueError, naming the type of model, where `head_options` is not what its forward does to logits. Does
    nothing where parameters are elsewhere."""
    if any(p.is_meta or p.numel() == 0 or isinstance(p, DTensor) for p in model.parameters()):
        return
    # An architecture that does something else would otherwise train on wrong log-probs. In place of the head's product
    # come logits of every size, whatever the parameters are.
    device = model.get_input_embeddings().weight.device
    options, lm_head = head_options(model), model.get_output_embeddings()
    products = torch.linspace(-60, 60, lm_head.weight.shape[0], device=lm_head.weight.device)
    hook = lm_head.register_forward_hook(lambda module, args, output: products.expand_as(output).clone())
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout
            tokens = torch.arange(2, device=device).unsqueeze(0)
            logits = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, return_dict=True).logits
    finally:
        hook.remove()
    want = products * options["logit_scale"]
    if options["softcap"] is not None:
        want = options["softcap"] * torch.tanh(want / options["softcap"])
    bound = 16 * torch.finfo(torch.float32).eps * float(want.abs().max())
    if logits.shape[-1] != len(want) or not torch.allclose(logits.float(), want.to(logits.device), rtol=0, atol=bound):
        raise ValueError(
            f"a {model.config.model_type} model does something to its logits that is not known here: "
            "its log-probs are not those of its hidden states and output embedding"
        )
