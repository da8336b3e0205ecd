"""A run spread over the processes (ranks) of torchrun.

Every rank knows the whole batch, which is small; what the ranks share is the work of the model, which each does for its
rows. In a single process each function here gives back what it got.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .policy import Policy

T = TypeVar("T")


def join() -> None:
    """Waits for the other processes that torchrun started, if it did: gloo between CPUs, NCCL between GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group()


def leave(status: int) -> int:
    """The end of this process, if it is one of several; else gives the exit status back."""
    if not dist.is_initialized():
        return status
    if status == 0:  # else others may be in a collective
        dist.destroy_process_group()
    # Under FSDP2 gloo's threads outlive the group, and one run in ten or so was seen to abort while Python shuts down
    # ("terminate called without an active exception"): this ends it without.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device_of_rank(name: str) -> torch.device:
    """Raises RuntimeError or AssertionError where there is no such device."""
    if name == "cuda" and size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.empty(0, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# --- rows --------------------------------------------------------------------------------------------------


def share(rows: int) -> Tensor:  # [rows of this rank] int64
    """Which of so many rows this rank works on: consecutive ones, as many as the others, or one more. Where there are
    fewer rows than ranks, some get the last row again: all ranks have to make the same calls."""
    first, last = (max(rows, size()) * r // size() for r in (rank(), rank() + 1))
    return torch.arange(first, last).clamp(max=rows - 1)


def gather(mine: Tensor, rows: int) -> Tensor:  # [rows of this rank, ...] -> [rows, ...]
    """The rows of all ranks from each one's `share`."""
    if group() is None:
        return mine
    every = max(rows, size())
    padded = mine.new_zeros(-(-every // size()), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(parts, padded)
    lengths = [every * (r + 1) // size() - every * r // size() for r in range(size())]
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])[:rows]


def reduce(value: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum, or what `operation` says, of the value of each rank."""
    if group() is None:
        return value
    value = value.clone()
    dist.all_reduce(value, operation)
    return value


# --- the model ---------------------------------------------------------------------------------------------


def distribute(policy: Policy, how: str) -> None:
    """Prepares the model for gradients that are averaged over ranks. "ddp": every rank has the whole of it; "fsdp": of
    parameters, gradients and the optimiser's state each has a part (FSDP2)."""
    if group() is None:
        return
    model = policy.model
    if how == "fsdp":
        mesh = init_device_mesh(policy.device.type, (size(),))
        for module in list(model.modules()):
            if type(module).__name__ in (model._no_split_modules or ()):  # the layers
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif any(p.requires_grad for p in model.parameters()):
        policy.wrapper = DistributedDataParallel(model)


@contextmanager
def accumulation(policy: Policy, last: bool) -> Iterator[None]:
    """Around a forward and backward pass: the last one of an accumulation reduces the gradients of all of them."""
    if isinstance(policy.model, FSDPModule):
        policy.model.set_requires_gradient_sync(last)
    ddp = policy.wrapper if isinstance(policy.wrapper, DistributedDataParallel) else None
    with nullcontext() if ddp is None or last else ddp.no_sync():
        yield


def clip_gradients(policy: Policy, max_norm: float) -> Tensor:  # []
    """The norm that the gradient had."""
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_model(policy: Policy) -> dict[str, Any]:
    """The model's state on the CPU, on rank 0; the others get nothing."""
    return get_model_state_dict(policy.model, options=_WHOLE)


def whole_optimizer(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Likewise the optimiser's, by names of parameters."""
    return get_optimizer_state_dict(policy.model, optimizer, options=_WHOLE)


def load_whole(policy: Policy, optimizer: torch.optim.Optimizer, model: dict[str, Any], state: dict[str, Any]) -> None:
    """What the two gave, whatever the number of ranks was."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=group() is not None)
    set_state_dict(policy.model, optimizer, model_state_dict=model, optim_state_dict=state, options=options)


# --- errors ------------------------------------------------------------------------------------------------


def together(function: Callable[..., T], *arguments: Any) -> T:
    """What the function returns here, once it has returned on every rank. An error on any of them is raised on all, so
    that none waits for one that has ended."""
    error: Exception | None = None
    try:
        result = function(*arguments)
    except Exception as raised:
        error = raised
    errors = [error]
    if group() is not None:
        errors = [None] * size()
        dist.all_gather_object(errors, error)
    for each in errors:
        if each is not None:
            raise each
    return result


def on_rank_0(function: Callable[..., T], *arguments: Any) -> T | None:
    """Runs the function on rank 0 while the others wait; None on those."""
    return together(function if rank() == 0 else lambda *_: None, *arguments)
