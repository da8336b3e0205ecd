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
from .checkpoint import write_atomically
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


def pooled(microbatches: list[dict[str, Tensor]], optimizer_steps: int) -> dict[str, float]:
    """The metrics of the loss over all microbatches and ranks. Each of them has "tokens", how many it is of."""
    stacked = {name: torch.stack([part[name] for part in microbatches]) for name in microbatches[0]}
    tokens = stacked.pop("tokens")
    share = tokens / parallel.reduce(tokens)  # of the tokens of all ranks

    def pool(name: str, values: Tensor) -> float:  # [microbatches]
        if name.startswith("loss"):  # the loss of an optimiser step is the sum over its microbatches
            return parallel.reduce(values.sum()).item() / optimizer_steps
        if name.endswith("/max"):
            return parallel.reduce(values.max(), ReduceOp.MAX).item()
        if name.endswith("/min"):
            return parallel.reduce(values.min(), ReduceOp.MIN).item()
        # Quantiles, deviations and effective sizes are no means over tokens: of them this is the mean over ranks.
        return parallel.reduce(values * share).mean().item()

    return {name: pool(name, values.float()) for name, values in stacked.items()}


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """metrics.jsonl: a JSON line for each step, null for what is not finite."""
    finite = [{k: None if v != v or v in (math.inf, -math.inf) else v for k, v in row.items()} for row in rows]
    write_atomically(path, lambda file: file.writelines(json.dumps(row).encode() + b"\n" for row in finite))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
