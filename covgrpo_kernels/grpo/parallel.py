"""A run spread over the processes (ranks) of torchrun.

Every rank knows the whole batch, which is small. What the ranks share is the work of the model: each runs it for its
rows. In a single process each function here returns what it was given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .checkpoint import TrainingError

T = TypeVar("T")
COUNTS = ("ratio/non_finite", "rows/invalid_targets", "rows/invalid_advantages")  # metrics of the loss, of tokens


def join() -> None:
    """Waits for the other processes that torchrun started, if it did: gloo between CPUs, NCCL between GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group()


def leave(status: int) -> int:
    """Ends this process if it is one of several; else returns the exit status."""
    if not dist.is_initialized():
        return status
    if status == 0:  # otherwise others may be in a collective
        dist.destroy_process_group()
    # Under FSDP2 gloo's threads outlive the group, and one run in ten or so aborted while Python shut down ("terminate
    # called without an active exception"). Ending the process at once avoids this.
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
    """Raises ValueError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name} cannot be used: {error}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def share(rows: int) -> Tensor:  # [rows of this rank] int64
    """Which of so many rows this rank works on: consecutive ones, as many as the others, or one more. Where there are
    fewer rows than ranks, some get the last row again: all ranks have to make the same calls."""
    first, last = (max(rows, size()) * r // size() for r in (rank(), rank() + 1))
    return torch.arange(first, last).clamp(max=rows - 1)


def gather(mine: Tensor, rows: int) -> Tensor:  # [rows of this rank, ...] -> [rows, ...]
    """The rows of all ranks from each one's `share`."""
    if group() is None:
        return mine
    parts: list[Any] = [None] * size()
    dist.all_gather_object(parts, mine.cpu())
    return torch.cat(parts)[:rows].to(mine.device)


def reduce(value: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum, or what `operation` says, of the value of each rank."""
    if group() is not None:
        dist.all_reduce(value := value.clone(), operation)
    return value


def pooled(microbatches: list[dict[str, Tensor]], optimizer_steps: int) -> dict[str, float]:
    """The metrics of the loss over all microbatches and ranks. Each of them has "tokens", how many it is of."""
    stacked = {name: torch.stack([part[name] for part in microbatches]) for name in microbatches[0]}
    tokens = stacked.pop("tokens")
    share = tokens / reduce(tokens)  # of the tokens of all ranks

    def pool(name: str, values: Tensor) -> float:  # [microbatches]
        if name in COUNTS:
            return reduce(values.sum()).item()
        if name.startswith("loss"):  # the loss of an optimiser step is the sum over its microbatches
            return reduce(values.sum()).item() / optimizer_steps
        if name.endswith("/max"):
            return reduce(values.max(), dist.ReduceOp.MAX).item()
        if name.endswith("/min"):
            return reduce(values.min(), dist.ReduceOp.MIN).item()
        # Quantiles, deviations and effective sizes are no means over tokens: of them this is the mean over ranks.
        return reduce(values * share).mean().item()

    return {name: pool(name, values.float()) for name, values in stacked.items()}


def distribute(model: PreTrainedModel, how: str) -> None:
    """With "ddp" every rank keeps the whole model; with "fsdp" each has a part of the parameters, their gradients and
    the optimiser's state (FSDP2)."""
    if group() is None or how == "ddp":
        return
    mesh = init_device_mesh(model.device.type, (size(),))
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):  # the layers
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def clipped_gradients(model: nn.Module, max_norm: float) -> Tensor:  # []
    """Gives every rank the mean of all ranks' gradients, clipped to a norm; returns the norm that it had. FSDP2 has
    averaged them already, in the backward pass. Raises TrainingError where the norm is not finite."""
    if group() is not None and not isinstance(model, FSDPModule):
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad.div_(size()))
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not torch.isfinite(norm):
        raise TrainingError(f"the norm of the gradient is {norm.item()}: a lower --lr may help")
    return norm


def together(function: Callable[..., T], *arguments: Any) -> T:
    """What the function returns here, once it has returned on every rank. An error on any of them is raised on all, so
    that none waits for one that has ended."""
    result, error = None, None
    try:
        result = function(*arguments)
    except Exception as raised:
        error = raised
    errors = [error]
    if group() is not None:
        errors = [None] * size()
        dist.all_gather_object(errors, error)
    for each in filter(None, errors):
        raise each
    return result  # type: ignore[return-value]


def on_rank_0(function: Callable[..., Any], *arguments: Any) -> None:
    """Runs the function on rank 0 while the others wait."""
    together(function if rank() == 0 else lambda *_: None, *arguments)
