"""What is told of a step, and metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from . import parallel
from .checkpoint import TrainingError, write_atomically
from .policy import Policy
from .rollout import Batch, finished


def rollout_metrics(policy: Policy, batch: Batch, rewards: Tensor, group_size: int) -> dict[str, Any]:
    groups, lengths = rewards.view(-1, group_size), batch.mask.sum(1).float()
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item(),
        "reward/equal_groups": (groups == groups[:, :1]).all(1).float().mean().item(),
        "response/length": lengths.mean().item(),
        "response/truncated": 1 - finished(policy, batch).float().mean().item(),
        "response/tokens": int(lengths.sum()),
    }


class UpdateMetrics:
    """The metrics of the loss in the optimiser steps on one batch, pooled over their microbatches and all ranks."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []
        self._tokens: list[Tensor] = []
        self._losses: list[Tensor] = []  # of the optimiser steps
        self._norms: list[Tensor] = []
        self._loss: Tensor | float = 0.0  # of the microbatches since the last optimiser step

    def add_microbatch(self, loss: Tensor, metrics: dict[str, Tensor], tokens: Tensor) -> None:
        self._loss = self._loss + loss.detach()
        self._parts.append(metrics)
        self._tokens.append(tokens)

    def end_minibatch(self, norm: Tensor) -> None:
        """Raises TrainingError where the loss or the norm of its gradient is not finite."""
        loss, self._loss = parallel.reduce(torch.as_tensor(self._loss)), 0.0
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingError(
                f"in the step after the last one in metrics.jsonl the loss is {loss.item()}, the norm of its gradient "
                f"{norm.item()}; the last checkpoint is untouched. A lower --lr may help."
            )
        self._losses.append(loss)
        self._norms.append(norm)

    def pooled(self) -> dict[str, float]:
        values = {name: torch.stack([part[name] for part in self._parts]).float() for name in self._parts[0]}
        tokens = torch.stack(self._tokens)
        share = tokens / parallel.reduce(tokens)
        pooled = {name: self._pool(name, value, share) for name, value in values.items()}
        norm = torch.stack(self._norms).mean().item()
        return pooled | {"loss": torch.stack(self._losses).mean().item(), "optim/grad_norm": norm}

    def _pool(self, name: str, values: Tensor, share: Tensor) -> float:  # [microbatches] both
        """Over the tokens of all ranks, and the mean over microbatches. Quantiles, deviations and effective sizes are
        no means over tokens: of them it is the mean over ranks."""
        if name.startswith("loss/"):  # the loss of an optimiser step is the sum over its microbatches
            return parallel.reduce(values.sum()).item() / len(self._losses)
        if name.endswith("/max"):
            return parallel.reduce(values.max(), ReduceOp.MAX).item()
        if name.endswith("/min"):
            return parallel.reduce(values.min(), ReduceOp.MIN).item()
        return parallel.reduce(values * share).mean().item()


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """metrics.jsonl: a JSON line for each step, null for what is not finite."""
    finite = [{k: None if v != v or v in (math.inf, -math.inf) else v for k, v in row.items()} for row in rows]
    write_atomically(path, lambda file: file.writelines(json.dumps(row).encode() + b"\n" for row in finite))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
