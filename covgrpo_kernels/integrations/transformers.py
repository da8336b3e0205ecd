"""`patch_model`: a causal LM of transformers that returns log-probs, or a loss, in place of logits.

The model's own forward runs, and where it calls its head, the head runs a function of ours in place of its product. So
everything that hangs on the call of a module happens as it does for logits: FSDP2 and ZeRO-3 gather the weight and
reduce its gradient, DDP sees one forward of the whole model, a mixture of experts computes its balancing loss.

`patch_model` changes the model and its head once. Which function a call wants is known to the call's thread alone. So
threads can share a patched model, it can be pickled, and `torch.compile` traces it without a graph break.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .. import linear_logprob


@dataclass
class LogprobOutput(ModelOutput):
    """What a patched model returns with ``return_logprobs=True``."""

    logprobs: Tensor | None = None  # [B, L - 1], or [B, L] with shift_labels; float32 (float64 of a float64 model)
    entropy: Tensor | None = None  # likewise; None unless asked for
    aux_loss: Tensor | None = None  # [] as the model's own forward gives it with output_router_logits=True


# What a call passes to `linear_logprob`, and `autocast`.
_OPTIONS = ("temperature", "entropy", "grad_tol", "grad_mode", "generator", "autocast")

# Libraries whose hooks on a head move parameters or count operations, and leave what the head returns as it is.
_TRUSTED = ("torch.distributed.", "torch.utils.", "accelerate.", "deepspeed.", "transformers.", __name__)


def patch_model(model: nn.Module, **defaults: Any) -> nn.Module:
    """Gives a causal LM's ``forward`` two more ways to be called, which never build logits.

    - ``model(input_ids, attention_mask=..., labels=labels, return_logprobs=True)`` returns `LogprobOutput`: the
      log-prob of each label under the state before it. ``labels`` [B, L] are unshifted, as everywhere in transformers;
      where one is -100 the log-prob is zero and nothing is computed. ``shift_labels`` [B, L] instead stand at the
      position that predicts them. More keywords, as `covgrpo_kernels.linear_logprob` takes them: temperature (a number,
      or a tensor of the shape of the log-probs), entropy, grad_tol, grad_mode, generator. And autocast: with False the
      head is computed in the dtype of its weight, although the call is under autocast.
    - ``model(input_ids, attention_mask=..., head=function)`` returns what ``function(hidden, weight, bias=...,
      logit_scale=..., softcap=...)`` returns, hidden [B, L, D] being what the model's head gets: `covgrpo_loss`, in a
      closure over the rest of its arguments. What is to have a gradient is a tensor, or in a tuple, list or dict. The
      function may call the model again.

    Any other call is the model's own. The head's scale and softcap come from the config, and are compared with what the
    model does to its logits (two tokens through the model; not where parameters are sharded or on the meta device).

    Forward pre-hooks and parametrizations of the head act as they do for logits. Forward and backward hooks on the head
    expect logits, so these calls refuse them; those of FSDP, DeepSpeed and Accelerate are fine. A hook on the model
    itself gets what the call returns.

    Patch before DDP, and after anything that replaces the model's forward (Liger's ``fused_linear_cross_entropy``);
    PEFT and FSDP2 may come before or after. Copies are patched, by ``copy.deepcopy`` and by pickle. Threads may share a
    patched model.

    Args:
        model: a `transformers.PreTrainedModel` whose output embedding is a `torch.nn.Linear`, or a PEFT model of one
            whose adapters are not on the head (``modules_to_save=["lm_head"]`` is fine).
        **defaults: of the keywords temperature, entropy, grad_tol, grad_mode, generator, autocast. Patching again
            replaces them.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: a wrong argument, by name; an encoder-decoder; a model that does something to its logits
            that is not known here; a head that is quantised, has an adapter, a hook, or a forward of its own. In a
            call: labels of a wrong shape, or a head that became one of these.
    """
    patched: Any = model
    if hasattr(patched, "get_base_model"):  # PEFT
        patched = patched.get_base_model()
    if not issubclass(type(patched), PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel or a PEFT model, got {type(model).__name__}")
    if unknown := sorted(set(defaults) - set(_OPTIONS)):
        raise TypeError(f"defaults must be among {', '.join(_OPTIONS)}, got {', '.join(unknown)}")
    if patched.config.is_encoder_decoder:
        raise ValueError(
            f"model must be decoder-only, got {type(patched).__name__}, an encoder-decoder: its input_ids are not the "
            "tokens that its logits predict"
        )
    layers = head_layers(patched)
    if not patched.can_generate():
        raise ValueError(f"model must be a causal LM, got {type(patched).__name__}, which cannot generate")
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            check_weight(parameter)
    is_new = not hasattr(patched, "_patched_forward")
    head = prepared_head(patched)
    try:
        check_logits(patched, head)
    except BaseException:
        if is_new:
            _release_head(patched)
        raise
    if is_new:
        patched._patched_forward = _PatchedForward(patched)
    if is_new or isinstance(getattr(patched.forward, "__func__", None), _PatchedForward):  # rebound by Accelerate
        patched.forward = patched._patched_forward
    patched._patched_forward.defaults = defaults
    return model


# ------------------------------------------------------------------------------------------ a call, and whose it is


class _Call:
    """What a call of a model wants of the model's head."""

    def __init__(self, head: nn.Module, function: Callable[[Tensor, nn.Linear], Any], keeps_logits: bool) -> None:
        self.head = head  # the module that the model calls: the one that PEFT put around the layers, or the layer
        self.function = function
        self.keeps_logits = keeps_logits  # the function's result is logits for the model to go on with
        self.hidden: Tensor | None = None  # what the head got
        self.result: Any = None  # what the function made of it
        self.times = 0  # that the head was called


class _Current(threading.local):
    """The call that this thread is in, None for one that wants logits. Not a ContextVar, which `torch.compile` does not
    trace."""

    call: _Call | None = None


_current = _Current()


@contextmanager
def _running(call: _Call | None) -> Iterator[None]:
    before, _current.call = _current.call, call
    try:
        yield
    finally:
        _current.call = before


class _HeadForward:
    """``forward`` of a layer that is a head: the function of the call that is running, else the layer's own. An object
    with a reference to the layer, rather than a function: copies and pickles of the layer then have their own."""

    def __init__(self, layer: nn.Linear, own: Callable[[Tensor], Tensor] | None) -> None:
        self.layer, self.own = layer, own

    def __call__(self, input: Tensor) -> Any:  # the name of `nn.Linear.forward`, for hooks that pass it by name
        call = _current.call
        if call is None:
            return type(self.layer).forward(self.layer, input) if self.own is None else self.own(input)
        call.hidden = input
        with _running(None):  # the function may call the model
            return call.function(input, self.layer)


def _take_result(module: nn.Module, args: Any, result: Any) -> Tensor | None:
    """The last of a head's forward hooks: the ones before, of FSDP, have seen the result whose gradient they wait for.
    The model gets empty logits."""
    call = _current.call
    if call is None or call.head is not module:
        return None
    call.result = result
    call.times += 1
    assert call.hidden is not None
    return None if call.keeps_logits else call.hidden.new_empty(*call.hidden.shape[:-1], 0)


class _PatchedForward:
    """``forward`` of a patched model. An object for the reason that `_HeadForward` is one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # A function that is bound to the model would be pickled as a name of the model's class: kept unbound.
        own = vars(model).get("forward")
        self.is_method = getattr(own, "__self__", None) is model
        self.own = own.__func__ if self.is_method else own  # None: that of the class
        self.defaults: dict[str, Any] = {}

    @property
    def __name__(self) -> str:  # which pickle looks for where Accelerate has bound this object
        raise AttributeError(
            "the model has to be patched again before it is pickled: Accelerate has rebound its forward"
        )

    @property
    def __signature__(self) -> inspect.Signature:  # for generate and trainers, which look at the names
        signature = inspect.signature(type(self.model).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, return_logprobs: bool = False, head: Any = None, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):  # Accelerate's unwrap_model binds whatever it finds to the model
            model: Any = args[0]  # or a copy of it
            return model._patched_forward(*args[1:], return_logprobs=return_logprobs, head=head, **kwargs)
        if not return_logprobs and head is None:
            return self.own_forward(*args, **kwargs)
        if return_logprobs and head is not None:
            raise ValueError("head must be None with return_logprobs=True, got both")
        if head is not None:
            return self.call_function(head, args, kwargs)
        return self.call_logprobs(args, kwargs)

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.own is None:
            return type(self.model).forward(self.model, *args, **kwargs)
        return self.own(self.model, *args, **kwargs) if self.is_method else self.own(*args, **kwargs)

    def call_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.pop("labels", None) is not None or kwargs.pop("shift_labels", None) is not None:
            raise ValueError("labels must be None with head, whose function gets its targets by itself")
        result, outputs = self.run_with_head(function, args, kwargs)
        if getattr(outputs, "aux_loss", None) is not None:
            raise ValueError("output_router_logits must be False with head: its auxiliary loss would be lost")
        return result

    def call_logprobs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LogprobOutput:
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        options = self.defaults | {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        autocast = options.pop("autocast", True)
        if not isinstance(autocast, bool):
            raise TypeError(f"autocast must be a bool, got {type(autocast).__name__}")
        if (labels is None) == (shift_labels is None):
            raise ValueError("labels or shift_labels must be given with return_logprobs=True, and not both")

        def logprobs(hidden: Tensor, weight: Tensor, **how: Any) -> Any:  # [B, L, D], [V, D]
            name, targets = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
            if targets.shape != hidden.shape[:-1]:
                raise ValueError(f"{name} must have shape {list(hidden.shape[:-1])}, got {list(targets.shape)}")
            if shift_labels is None:
                hidden, targets = hidden[:, :-1], targets[:, 1:]
            with nullcontext() if autocast else torch.autocast(hidden.device.type, enabled=False):
                outputs = linear_logprob(hidden, weight, targets.to(hidden.device), **how, **options)
            # Views would lose FSDP's hook on them to an operation in place.
            return [None if output is None else output.clone() for output in outputs]

        (logprob, entropy), outputs = self.run_with_head(logprobs, args, kwargs)
        return LogprobOutput(logprob, entropy, getattr(outputs, "aux_loss", None))

    def run_with_head(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """What the function makes of the hidden states, and what the model's own forward makes of empty logits."""
        options = head_options(self.model)

        def with_options(hidden: Tensor, layer: nn.Linear) -> Any:
            weight = layer.weight  # once: it may be computed anew each time
            check_weight(weight)
            hidden = hidden.to(weight.dtype)  # of a float32 head on a 16-bit backbone
            return function(hidden, weight, bias=layer.bias, **options)

        call = _Call(prepared_head(self.model), with_options, keeps_logits=False)
        kwargs.setdefault("use_cache", False)
        with _running(call):
            outputs = self.own_forward(*args, **(kwargs | dict(return_dict=True)))
        if call.times != 1:
            raise ValueError(
                f"a {self.model.config.model_type} model must call its output embedding once, got {call.times}"
            )
        return call.result, outputs


# ------------------------------------------------------------------------------------------------------- the head


def prepared_head(model: Any) -> nn.Module:
    """The module that the model calls as its head, ready for calls: what a user did to it since the last one is looked
    at here. Raises ValueError for a head that is more than a matrix and a bias."""
    head, layers = model.get_output_embeddings(), head_layers(model)
    for layer in layers:
        _check_hooks(layer)
        if not isinstance(vars(layer).get(_forward_name(layer)), _HeadForward):
            _replace_forward(layer)
    if head is not layers[0]:
        _check_hooks(head)
    hooks = list(head._forward_hooks.values())
    if not hooks or hooks[-1] is not _take_result:
        _put_hook_last(head)
    return head


def head_layers(model: Any) -> list[nn.Linear]:
    """The layers one of which is the head in a call: of PEFT's ``modules_to_save`` the original and the trained ones.
    Raises ValueError for a head that is more than a matrix and a bias."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have an output embedding, got {type(model).__name__}, which has none")
    saved = getattr(head, "modules_to_save", None)
    layers = [head] if saved is None else [head.original_module, *saved.values()]
    for layer in layers:
        if getattr(type(layer), "forward", None) is not nn.Linear.forward:
            raise ValueError(
                "model must have a torch.nn.Linear as its output embedding, got "
                f"{type(layer).__module__}.{type(layer).__qualname__}: adapters and quantization of the head are not "
                'supported (PEFT: modules_to_save=["lm_head"] trains it whole)'
            )
    if (model.tp_size or 1) > 1:
        raise ValueError("model must not be tensor-parallel: give linear_logprob the head's slice and its vocab_group")
    return layers


def check_weight(weight: Tensor) -> None:
    """Raises ValueError for a head whose weight is not the numbers that the head multiplies with."""
    # A quantised weight is often a tensor subclass in an ordinary nn.Linear, with an F.linear of its own.
    is_plain = type(weight) in (Tensor, nn.Parameter) or isinstance(weight, (DTensor, FakeTensor))
    if not is_plain or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(
            "model must have an output embedding whose weight is a plain float32, bfloat16, float16 or float64 tensor, "
            f"got {type(weight).__name__} of {weight.dtype}: quantization of the head is not supported"
        )


def _forward_name(layer: nn.Linear) -> str:
    # Accelerate's hooks are in a forward of theirs, which calls the one it found under this name.
    return "_old_forward" if hasattr(layer, "_hf_hook") else "forward"


_lock = threading.Lock()


@torch.compiler.disable
def _replace_forward(layer: nn.Linear) -> None:
    with _lock:
        name = _forward_name(layer)
        own = vars(layer).get(name)
        if isinstance(own, _HeadForward):  # another thread's
            return
        is_method = getattr(own, "__func__", None) is nn.Linear.forward  # as Accelerate keeps it
        # TRL's cast_lm_head_to_fp32 is a forward that multiplies in float32, as linear_logprob does.
        if own is not None and not is_method and not _is_from(own, ("trl.",)):
            raise ValueError(
                "model must have an output embedding with the forward of torch.nn.Linear, "
                f"got {_name(own)} in its place"
            )
        setattr(layer, name, _HeadForward(layer, own))


@torch.compiler.disable
def _put_hook_last(head: nn.Module) -> None:
    with _lock:
        for key, hook in head._forward_hooks.items():
            if hook is _take_result:
                head._forward_hooks.move_to_end(key)  # type: ignore[attr-defined]  # an OrderedDict
                return
        head.register_forward_hook(_take_result)


def _release_head(model: Any) -> None:
    """Takes back what `prepared_head` did."""
    for layer in head_layers(model):
        name = _forward_name(layer)
        own = vars(layer)[name].own
        if own is None:
            delattr(layer, name)
        else:
            setattr(layer, name, own)
    hooks = model.get_output_embeddings()._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _take_result]:
        del hooks[key]


def _check_hooks(module: nn.Module) -> None:
    """Raises ValueError where a hook would get log-probs in place of logits, or their gradient."""
    for kind, hooks in (
        ("forward", module._forward_hooks),
        ("forward", torch_module._global_forward_hooks),
        ("backward", module._backward_hooks),
        ("backward", torch_module._global_backward_hooks),
        ("backward", module._backward_pre_hooks),
        ("backward", torch_module._global_backward_pre_hooks),
    ):
        for hook in hooks.values():
            if not _is_from(hook, _TRUSTED):
                raise ValueError(
                    f"model must have no {kind} hook on its output embedding, got {_name(hook)}: it expects logits, "
                    "which are not built here (remove the hook before the call, and register it again after it)"
                )


def _is_from(function: Any, libraries: tuple[str, ...]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return f"{getattr(function, '__module__', '')}.".startswith(libraries)


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


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
def check_logits(model: Any, head: nn.Module) -> None:
    """Raises ValueError, naming the type of model, where `head_options` is not what its forward does to logits. Does
    nothing where parameters are elsewhere."""
    if any(p.is_meta or p.numel() == 0 or isinstance(p, (DTensor, FakeTensor)) for p in model.parameters()):
        return
    # An architecture that does something else would otherwise train on wrong log-probs. In place of the head's product
    # come logits of every size, whatever the parameters are.
    products = torch.linspace(-60, 60, head_layers(model)[0].out_features)
    call = _Call(head, lambda h, layer: products.to(h.device).expand(*h.shape[:-1], -1).clone(), keeps_logits=True)
    device = model.get_input_embeddings().weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _running(call):  # dropout
        tokens = torch.arange(2, device=device).unsqueeze(0)
        logits = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, return_dict=True).logits
    options = head_options(model)
    want = products * options["logit_scale"]
    if options["softcap"] is not None:
        want = options["softcap"] * torch.tanh(want / options["softcap"])
    bound = 16 * torch.finfo(torch.float32).eps * float(want.abs().max())
    if logits.shape[-1] != len(want) or not torch.allclose(logits.float().cpu(), want, rtol=0, atol=bound):
        raise ValueError(
            f"a {model.config.model_type} model does something to its logits that is not known here: "
            "its log-probs are not those of its hidden states and output embedding"
        )
