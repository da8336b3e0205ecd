"""Patched models under DDP, FSDP2 and ZeRO-3: loss and reduced gradients are those of one process on the whole batch.

Every worker makes the whole batch and the single-process result from seeds; nothing is sent. What these tests are for:
a loss that bypasses the wrapper, so that gradients stay the rank's own or a head is empty; one that reduces twice; a
rank without a token to learn from, that leaves the others waiting.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import processes
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")

from test_transformers import VOCAB, assert_equal, new_model

from covgrpo_kernels import covariance_weights, covgrpo_loss, linear_logprob
from covgrpo_kernels.integrations.transformers import patch_model

SHARDINGS = ("ddp", "root", "layers", "head")
ROWS, LENGTH = 8, 9  # groups of two rows: whole ones on each of up to four ranks


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=g)
    return dict(
        ids=ids,
        labels=ids.where(torch.rand(ROWS, LENGTH, generator=g) < 0.8, -100),
        advantages=torch.randn(ROWS, generator=g, dtype=torch.float64),
    )


def policy_loss(model: nn.Module, data: dict[str, Tensor], how: str, rows: slice) -> Tensor:
    """The rows' part of the loss of the whole batch."""
    ids, labels, advantages = (data[name][rows] for name in ("ids", "labels", "advantages"))
    targets = labels[:, 1:]
    if how == "loss":
        options: dict[str, Any] = dict(group_size=2, normalizer=ROWS, metrics=False, grad_tol=0.0)

        def head(hidden: Tensor, weight: Tensor, **kwargs: Any) -> Any:
            assert type(weight) is not DTensor
            assert weight.shape == (VOCAB, hidden.shape[-1])
            return covgrpo_loss(hidden[:, :-1], weight, targets, advantages, **kwargs, **options)

        return model(ids, head=head).loss
    out = model(ids, labels=labels, return_logprobs=True, entropy=True, grad_tol=0.0)
    weights = covariance_weights(out.logprobs.detach(), advantages, targets != -100, group_size=2)
    # In place: a wrapper's hooks on the outputs survive it.
    out.logprobs *= weights * advantages.unsqueeze(1)
    return -(out.logprobs + 0.1 * out.entropy).sum() / ROWS


def new_policy(dtype: torch.dtype = torch.float64, lora: bool = False, **changes: Any) -> nn.Module:
    model = patch_model(new_model(dtype=dtype, **changes))
    if not lora:
        return model
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def wrapped(model: Any, sharding: str, **options: Any) -> Any:
    if sharding == "ddp":
        return DistributedDataParallel(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if sharding in ("layers", "head"):
        for layer in base.model.layers:
            fully_shard(layer, **options)
    if sharding == "head":
        fully_shard(base.get_output_embeddings(), **options)
    return fully_shard(model, **options)


def reduced_gradients(model: nn.Module) -> dict[str, Tensor]:
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in named.items()}


def whole_batch(data: dict[str, Tensor], how: str, **changes: Any) -> dict[str, Tensor]:
    model = new_policy(**changes)
    loss = policy_loss(model, data, how, slice(None))
    loss.backward()
    grads = reduced_gradients(model)
    assert all(g.abs().max() > 0 for g in grads.values())
    return grads | dict(loss=loss.detach())


def my_rows() -> slice:
    each = ROWS // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def check(sharding: str, data: dict[str, Tensor], how: str, micro_batches: int = 1, **changes: Any) -> None:
    want = whole_batch(data, how, **changes)
    model = new_policy(**changes)
    parallel = wrapped(model, sharding)
    # FSDP's warning of views, whose hooks an operation in place drops.
    warnings.filterwarnings("error", message=".*returned a view tensor")
    total = torch.zeros((), dtype=torch.float64)
    rows = my_rows()
    each = (rows.stop - rows.start) // micro_batches
    for first in range(rows.start, rows.stop, each):
        waits = first + each < rows.stop
        context: Any = parallel.no_sync() if waits and sharding == "ddp" else contextlib.nullcontext()
        if sharding != "ddp":
            parallel.set_requires_gradient_sync(not waits)
        with context:
            loss = policy_loss(parallel, data, how, slice(first, first + each))
            (loss * dist.get_world_size()).backward()  # both average gradients
        total += loss.detach()
    dist.all_reduce(total)
    assert_equal(reduced_gradients(model) | dict(loss=total), want)


def whole_groups(sharding: str) -> None:
    for how in ("loss", "logprobs"):
        for tied in (False,) if sharding == "head" else (False, True):
            check(sharding, batch(), how, tie_word_embeddings=tied)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("size", [2, 4])
def test_the_whole_batchs_gradients(size: int, sharding: str) -> None:
    processes(size).run(whole_groups, sharding)


def accumulated(sharding: str) -> None:
    check(sharding, batch(), "loss", micro_batches=2)
    check(sharding, batch(), "logprobs", micro_batches=2)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_accumulation_reduces_once(sharding: str) -> None:
    processes(2).run(accumulated, sharding)


def adapted(sharding: str) -> None:
    check(sharding, batch(), "loss", lora=True)
    check(sharding, batch(), "logprobs", lora=True)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_adapters_and_a_saved_head(sharding: str) -> None:
    processes(2).run(adapted, sharding)


def one_rank_idle(sharding: str, idle: str) -> None:
    data = batch()
    if idle == "masked":
        data["labels"][: ROWS // 2] = -100
    else:
        data["advantages"][: ROWS // 2] = 0
    check(sharding, data, "loss")
    if idle == "masked":
        check(sharding, data, "logprobs")


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("idle", ["masked", "without advantage"])
def test_a_rank_without_a_live_token(idle: str, sharding: str) -> None:
    processes(2).run(one_rank_idle, sharding, idle)


def all_ranks_idle(sharding: str) -> None:
    data, model = batch(), new_policy()
    data["labels"][:] = -100
    parallel = wrapped(model, sharding)
    for how in ("loss", "logprobs"):
        loss = policy_loss(parallel, data, how, my_rows())
        loss.backward()
        assert loss == 0
    grads = reduced_gradients(model)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert not any(g.any() for g in grads.values())


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_no_live_token_at_all(sharding: str) -> None:
    processes(2).run(all_ranks_idle, sharding)


def scores(sharding: str) -> None:
    data = batch()
    inputs = dict(input_ids=data["ids"], labels=data["labels"], return_logprobs=True)
    mine = {name: value if name == "return_logprobs" else value[my_rows()] for name, value in inputs.items()}
    parallel = wrapped(new_policy(), sharding)
    with torch.no_grad():
        got, want = parallel(**mine).logprobs, new_policy()(**inputs).logprobs[my_rows()]
        assert_equal(dict(logprobs=got), dict(logprobs=want))
    check(sharding, data, "loss")


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_scoring_before_training(sharding: str) -> None:
    processes(2).run(scores, sharding)


def in_bfloat16(sharding: str) -> None:
    data = batch()
    inputs = dict(input_ids=data["ids"][my_rows()], labels=data["labels"][my_rows()], return_logprobs=True)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = patch_model(wrapped(new_model(dtype=torch.float32), sharding, mp_policy=policy))  # in the other order
    out = model(**inputs)
    want = new_policy(torch.float32)
    for parameter in want.parameters():  # buffers stay float32
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(out.logprobs, want(**inputs).logprobs)
    out.logprobs.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("sharding", SHARDINGS[1:])
def test_parameters_in_bfloat16(sharding: str) -> None:
    processes(2).run(in_bfloat16, sharding)


def patched_half_way() -> None:
    data, model = batch(), new_model()
    for layer in model.model.layers:
        fully_shard(layer)
    patch_model(model)
    loss = policy_loss(fully_shard(model), data, "loss", my_rows())
    (loss * dist.get_world_size()).backward()
    want = whole_batch(data, "loss")
    del want["loss"]
    assert_equal(reduced_gradients(model), want)


def test_patching_between_the_layers_and_the_root() -> None:
    processes(2).run(patched_half_way)


def bare_head() -> None:
    model, data = new_policy(), batch()
    fully_shard(model)
    hidden = torch.zeros(ROWS, LENGTH, 32, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"weight must be a plain tensor.*patch_model"):
        linear_logprob(hidden, model.lm_head.weight, data["labels"])


def test_a_sharded_head_is_refused_outside_of_the_forward() -> None:
    processes(2).run(bare_head)


def zero_3(how: str, tied: bool) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    data, options = batch(), dict(dtype=torch.float32, tie_word_embeddings=tied)
    data["advantages"] = data["advantages"].float()
    want, model = whole_batch(data, how, **options), new_policy(**options)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters()),
        config=dict(
            train_micro_batch_size_per_gpu=ROWS // dist.get_world_size(),
            zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0),
            zero_allow_untested_optimizer=True,
            zero_force_ds_cpu_optimizer=False,
        ),
    )
    loss = policy_loss(engine, data, how, my_rows())
    engine.backward(loss * dist.get_world_size())
    total = loss.detach().clone()
    dist.all_reduce(total)
    grads = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
    assert_equal(grads | dict(loss=total), want)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["loss", "logprobs"])
def test_zero_3(how: str, tied: bool) -> None:
    pytest.importorskip("deepspeed")
    processes(2).run(zero_3, how, tied)
