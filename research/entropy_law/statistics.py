"""How far each law tells the measured changes of entropy: statistics over batches, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .law import STATES

RESAMPLES = 2000


def correlation(x: Tensor, y: Tensor) -> Tensor:  # [..., n], [..., n] -> [...]
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (dx * dy).sum(-1) / (dx.square().sum(-1) * dy.square().sum(-1)).sqrt()


def slope(x: Tensor, y: Tensor) -> Tensor:
    dx = x - x.mean(-1, keepdim=True)
    return (dx * y).sum(-1) / dx.square().sum(-1)


def agreement(x: Tensor, y: Tensor) -> Tensor:
    return (x.sign() == y.sign()).to(x.dtype).mean(-1)


def interval(statistic: Callable[..., Tensor], *columns: list[float]) -> list[float]:
    """[value, low, high]: a statistic of columns over the batches, and where 95% of the bootstrap's are."""
    values = torch.tensor(columns, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(values.shape[1], (RESAMPLES, values.shape[1]), generator=generator)
    # A resample that has the same batch throughout has no correlation.
    low, high = statistic(*values[:, drawn]).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [statistic(*values).item(), low, high]


def statistics(stages: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Of every law, update and weighting, in the states of the batch itself ("own") and of held-out problems."""
    laws, updates, weights = [], [], []
    for stage in stages:
        whole = {(row["optimizer"], row["step"]): row for row in stage["changes"] if row["update"] == "all"}
        for row in stage["changes"]:
            for states in STATES:
                label = {**stage_of(stage), "states": states}
                label |= {key: row[key] for key in ("optimizer", "step")}
                change, all_of_it = row[states], whole[row["optimizer"], row["step"]]
                if row["update"] == "all":
                    predicted = stage["predicted"] | {
                        "gradient of the parameters": [v / row["step"] for v in row[f"{states}, first order"]]
                    }
                    rates = [v / row["step"] for v in change]
                    for law, rate in predicted.items():
                        found = {f.__name__: interval(f, rate, rates) for f in (correlation, agreement, slope)}
                        laws.append({**label, "law": law, **found})
                updates.append({**label, "update": row["update"], "change": interval(mean, change)})
                if row["update"] == "CW-GRPO":
                    norms = stage["gradient norm"]
                    weights.append({
                        **label,
                        "difference": interval(lambda a, b: mean(b - a), all_of_it[states], change),
                        "spread ratio": interval(lambda a, b: b.std(-1) / a.std(-1), all_of_it[states], change),
                        "gradient ratio": interval(ratio, norms["all"], norms["CW-GRPO"]),
                    })  # fmt: skip
    return {"laws": laws, "updates": updates, "weights": weights}


def stage_of(stage: dict[str, Any]) -> dict[str, int]:
    return {key: stage[key] for key in ("seed", "grpo_steps")}


def reported(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of the first seed."""
    return [stage for stage in results["stages"] if stage["seed"] == results["settings"]["seeds"][0]]


def mean(values: Tensor) -> Tensor:
    return values.mean(-1)


def ratio(of: Tensor, values: Tensor) -> Tensor:
    return values.mean(-1) / of.mean(-1)


def middle(results: dict[str, Any], optimizer: str) -> float:
    steps = results["settings"]["steps"][optimizer]
    return steps[len(steps) // 2]


def chosen(results: dict[str, Any], kind: str, **label: Any) -> Iterator[dict[str, Any]]:
    """Rows of the statistics at the middle step of their optimiser."""
    for row in results["statistics"][kind]:
        if row["step"] == middle(results, row["optimizer"]) and label.items() <= row.items():
            yield row
