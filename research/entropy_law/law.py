"""The premise of covariance weights, measured: how one update changes a policy's entropy, and what predicts that.

For a softmax with logits z, probabilities p and entropy H, a small change of the logits changes the entropy by

    dH = -Cov_p(log p, dz)        to first order, whatever dz is.

A natural policy gradient in the logits of each state by itself has dz = eta A, so that dH = -eta Cov_p(log p, A)
(arXiv 2505.22617); a plain gradient has dz = eta p (A - mean A). Neither is what training does: it samples one token a
state, its step is in parameters that all states share, and covariances are taken over the tokens of a group, which
mixes states. Here entropies are exact sums over a small vocabulary, before and after real optimiser steps, in float64
(but for the norms of the model, which transformers computes in float32), so that each of these differences can be seen
by itself. `python -m research entropy-law --help`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from covgrpo_kernels import CovGRPOConfig, covgrpo_loss
from covgrpo_kernels.grpo.checkpoint import write_atomically
from covgrpo_kernels.grpo.config import TrainConfig
from covgrpo_kernels.grpo.policy import Policy, new_policy
from covgrpo_kernels.grpo.rollout import Batch, sample
from covgrpo_kernels.grpo.tasks import Task
from covgrpo_kernels.grpo.train import Rollout, make_task, rollout, train_step, warm_start

from ..covariances import group_statistics
from ..study.summary import six_digits

LOGITS = "gradient of each state's logits"
STATES = ("own", "fresh")
SHARE = 0.2  # of the tokens, in the part of the highest and of the lowest covariance
RESAMPLES = 2000
LOGIT_STEPS = (0.001, 0.003, 0.01, 0.03, 0.1)
UPDATES = {  # the tokens that an update is made of
    "all": "all: GRPO",
    "top": f"highest {SHARE:.0%} of covariance",
    "middle": "between",
    "bottom": f"lowest {SHARE:.0%} of covariance",
    "CW-GRPO": "all, weighted: CW-GRPO",
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.0),  # a first step: the learning rate times the gradient's sign
}


@dataclass(frozen=True)
class Plan:
    policy: TrainConfig
    seeds: tuple[int, ...]  # of policies; the first is reported in full
    grpo_steps: tuple[int, ...]  # how long the policy was trained when its updates are measured
    batches: int  # updates at each of these times, all from the same policy
    steps: dict[str, tuple[float, ...]]  # step sizes of each optimiser; the parts are compared at the middle one


def plan(seed: int, quick: bool) -> Plan:
    policy = TrainConfig(hidden_size=64, layers=2, warm_start_lr=3e-3, prompts_per_step=16, weighting="none", lr=5e-4)
    if quick:
        # A guess: one answer in seven is right.
        policy = dataclasses.replace(
            policy, layers=1, task="arithmetic", max_new_tokens=4, warm_start_steps=25, warm_start_lr=5e-3
        )
        return Plan(policy, (seed,), (0, 2), 6, {"SGD": (0.01,), "AdamW": (1e-4,)})
    return Plan(
        policy, (seed, seed + 1, seed + 2), (0, 40), 48, {"SGD": (0.001, 0.01, 0.1), "AdamW": (1e-5, 1e-4, 1e-3)}
    )


# --- the law -----------------------------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:  # [N, V] -> [N]
    return torch.distributions.Categorical(logits=logits).entropy()


def first_order(logits: Tensor, change: Tensor) -> Tensor:  # [N, V], [N, V] -> [N]
    """-Cov_p(log p, dz): how the entropy changes with the logits."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    deviation = log_p - (p * log_p).sum(-1, keepdim=True)
    return -(p * deviation * change).sum(-1)


def sampled_gradient(logits: Tensor, advantages: Tensor, responses: Tensor) -> Tensor:  # [N, V], [N], [N] -> [N, V]
    """Of A times the log-prob of the sampled token, in the logits of its state."""
    return advantages[:, None] * (torch.nn.functional.one_hot(responses, logits.shape[1]) - logits.softmax(-1))


def logit_law(logits: Tensor, advantages: Tensor, responses: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Error of the law against the size of the step, which has to fall with its square. An advantage is known of the
    sampled tokens only: for the gradients over all actions they are drawn at random."""
    p = logits.softmax(-1)
    drawn = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    directions = {
        "natural gradient": drawn,
        "gradient": p * (drawn - (p * drawn).sum(-1, keepdim=True)),
        "gradient of a sampled token": sampled_gradient(logits, advantages, responses),
    }
    laws = {}
    for name, direction in directions.items():
        changes = [entropy(logits + eta * direction) - entropy(logits) for eta in LOGIT_STEPS]
        law = first_order(logits, direction)
        errors = [_rms(change - eta * law) for eta, change in zip(LOGIT_STEPS, changes, strict=True)]
        laws[name] = {
            "change": [_rms(change) for change in changes],
            "error": errors,
            "slope": float(np.polyfit(np.log(LOGIT_STEPS), np.log(errors), 1)[0]),
        }
    return {"step": list(LOGIT_STEPS), "laws": laws}


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


# --- one batch ---------------------------------------------------------------------------------------------


def response_logits(policy: Policy, batch: Batch, temperature: float) -> Tensor:  # [N, V]
    """Of the policy that samples, at every token of a response. 258 tokens: here they may be built."""
    last = batch.mask.shape[1]
    logits = policy.forward(batch.tokens, batch.attention).logits
    return logits[:, -last - 1 : -1][batch.mask] / temperature


@dataclass
class Tokens:
    """The tokens of a batch, and what covariances are made of."""

    x: Tensor  # [N] log-prob
    H: Tensor  # [N] entropy of the state
    covariance: Tensor  # [N] of the group
    dA: Tensor  # [N] advantage less its group's mean
    A: Tensor  # [N]


def tokens_of(data: Rollout, logits: Tensor, group_size: int) -> Tokens:
    mask = data.batch.mask
    x = logits.log_softmax(-1).gather(1, data.batch.responses[mask][:, None]).squeeze(1)
    A = data.advantages.to(x.dtype)[:, None].expand(mask.shape)[mask]
    found = group_statistics(x.new_zeros(mask.shape).masked_scatter(mask, x), data, group_size)
    valid = mask.flatten()
    return Tokens(x, entropy(logits), found.covariance[valid], found.advantage_deviation[valid], A)


def predictions(tokens: Tokens, logits: Tensor, responses: Tensor) -> dict[str, float]:  # [N, V], [N]
    """What the entropy does for a step of 1, by laws that need no gradient. As x - mean x is (x + H) + (-H - mean x),
    the covariance is the sum of its parts within and between states; the law speaks of the first."""
    within = (tokens.x + tokens.H) * tokens.dA
    sampled = sampled_gradient(logits, tokens.A, responses)
    return {
        "covariance": -tokens.covariance.mean().item(),
        "covariance within states": -within.mean().item(),
        "covariance between states": -(tokens.covariance - within).mean().item(),
        LOGITS: first_order(logits, sampled).mean().item(),
    }


def parts(covariance: Tensor) -> dict[str, Tensor]:  # [N] -> [N] of zeros and ones
    """The tokens that an update is made of."""
    place = covariance.argsort(stable=True).argsort(stable=True)
    low, high = SHARE * len(place), (1 - SHARE) * len(place)
    chosen = {"all": place >= 0, "top": place >= high, "middle": (place >= low) & (place < high), "bottom": place < low}
    return {name: part.to(covariance.dtype) for name, part in chosen.items()}


def gradients(
    policy: Policy, data: Rollout, config: TrainConfig, weighting: str, part: Tensor | None = None  # [N]
) -> list[Tensor]:  # fmt: skip
    """Of the loss, of the tokens of a part."""
    loss_of = partial(
        covgrpo_loss,
        targets=data.batch.responses,
        advantages=data.advantages,
        mask=data.batch.mask,
        group_size=config.group_size,
        rollout_weights=None if part is None else part.new_zeros(data.batch.mask.shape).masked_scatter(
            data.batch.mask, part
        ),
        temperature=config.temperature,
        # Divided by the number of tokens, as the covariance is.
        config=CovGRPOConfig(weighting=weighting, loss_type="bnpo"),
        metrics=False,
        grad_tol=0.0,
    )  # fmt: skip
    loss = data.batch.apply_head(policy, loss_of).loss
    return list(torch.autograd.grad(loss, list(policy.model.parameters())))


def mean_entropy(policy: Policy, batch: Batch, temperature: float) -> Tensor:  # []
    return entropy(response_logits(policy, batch, temperature)).mean()


@dataclass
class States:
    """States whose entropy is measured before and after updates."""

    batch: Batch
    before: float
    gradient: list[Tensor]  # of their mean entropy, in every parameter

    @classmethod
    def of(cls, policy: Policy, batch: Batch, temperature: float) -> States:
        H = mean_entropy(policy, batch, temperature)
        return cls(batch, H.item(), list(torch.autograd.grad(H, list(policy.model.parameters()))))


def measure_step(
    policy: Policy, gradient: list[Tensor], optimizer: str, step: float, states: dict[str, States], temperature: float
) -> dict[str, float]:
    """Change of the mean entropy with one step of a new optimiser, in each set of states, and to first order in the
    parameters. The policy is left as it was."""
    parameters = list(policy.model.parameters())
    before = [p.detach().clone() for p in parameters]
    for p, g in zip(parameters, gradient, strict=True):
        p.grad = g.clone()
    OPTIMIZERS[optimizer](parameters, lr=step).step()
    moved = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
    result = {}
    with torch.no_grad():
        for name, there in states.items():
            result[name] = mean_entropy(policy, there.batch, temperature).item() - there.before
            result[f"{name}, first order"] = sum(
                (g * m).sum().item() for g, m in zip(there.gradient, moved, strict=True)
            )
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b)
            p.grad = None
    return result


def measure_batch(policy: Policy, data: Rollout, fresh: States, plan: Plan) -> dict[str, Any]:
    config = plan.policy
    logits = response_logits(policy, data.batch, config.temperature).detach()
    tokens = tokens_of(data, logits, config.group_size)
    states = {"own": States.of(policy, data.batch, config.temperature), "fresh": fresh}
    updates = {name: gradients(policy, data, config, "none", part) for name, part in parts(tokens.covariance).items()}
    updates["CW-GRPO"] = gradients(policy, data, config, "covariance")
    rows = []
    for optimizer, steps in plan.steps.items():
        for name, gradient in updates.items():
            for step in steps if name == "all" else [steps[len(steps) // 2]]:
                row = measure_step(policy, gradient, optimizer, step, states, config.temperature)
                rows.append({"optimizer": optimizer, "step": step, "update": name, **row})
    return {
        "entropy": tokens.H.mean().item(),
        "predicted": predictions(tokens, logits, data.batch.responses[data.batch.mask]),
        "gradient norm": {name: _norm(gradient) for name, gradient in updates.items()},
        "changes": rows,
    }


def _norm(gradient: list[Tensor]) -> float:
    return math.sqrt(sum(g.square().sum().item() for g in gradient))


def measure(plan: Plan) -> dict[str, Any]:
    stages = [stage for seed in plan.seeds for stage in measure_policy(seed, plan)]
    return {"settings": dataclasses.asdict(plan), "stages": stages}


def measure_policy(seed: int, plan: Plan) -> Iterator[dict[str, Any]]:
    """A stage of its training after the other."""
    config = dataclasses.replace(plan.policy, seed=seed)
    task = make_task(config)
    policy = new_policy(config.hidden_size, config.layers, config.seed, torch.device("cpu"))
    warm_start(policy, task, config)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0)
    done = 0
    for grpo_steps in plan.grpo_steps:
        for step in range(done + 1, grpo_steps + 1):
            train_step(step, policy, None, optimizer, task, config)
        done = grpo_steps
        exact = copy.deepcopy(policy)
        exact.model.double()
        yield {"seed": seed, "grpo_steps": grpo_steps, **measure_stage(exact, task, config, grpo_steps, plan)}


def measure_stage(policy: Policy, task: Task, config: TrainConfig, grpo_steps: int, plan: Plan) -> dict[str, Any]:
    fresh = States.of(policy, held_out(policy, task, config), config.temperature)
    batches = []
    for i in range(plan.batches):
        key = f"{config.seed}/entropy law/{grpo_steps}/{i}"
        generator = torch.Generator().manual_seed(random.Random(key).getrandbits(63))
        # Problems that no training step has seen.
        data, metrics = rollout(plan.grpo_steps[-1] + 1 + i, policy, None, task, config, generator)
        if i == 0:
            logits = response_logits(policy, data.batch, config.temperature).detach()
            advantages = tokens_of(data, logits, config.group_size).A
            law = logit_law(logits, advantages, data.batch.responses[data.batch.mask], generator)
        batches.append({"reward": metrics["reward/mean"], **measure_batch(policy, data, fresh, plan)})
        if (i + 1) % 10 == 0:
            print(f"seed {config.seed}, {grpo_steps} steps of GRPO: batch {i + 1} of {plan.batches}", flush=True)
    return {"logits": law, **collated(batches)}


def held_out(policy: Policy, task: Task, config: TrainConfig) -> Batch:
    """One response to each of as many problems as a batch has rows."""
    prompts = [task.held_out_problem(i).prompt for i in range(config.prompts_per_step * config.group_size)]
    generator = torch.Generator().manual_seed(config.seed)
    return sample(policy, prompts, 1, config.max_new_tokens, config.temperature, generator)


def collated(batches: list[Any]) -> Any:
    """One tree of lists in place of a list of trees; labels stay single."""
    first = batches[0]
    if isinstance(first, dict):
        return {
            key: value if key in ("optimizer", "step", "update") else collated([b[key] for b in batches])
            for key, value in first.items()
        }
    if isinstance(first, list):
        return [collated(list(rows)) for rows in zip(*batches, strict=True)]
    return batches


# --- what it amounts to ------------------------------------------------------------------------------------


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
                updates.append({**label, "update": row["update"], "change": interval(_mean, change)})
                if row["update"] == "CW-GRPO":
                    norms = stage["gradient norm"]
                    weights.append({
                        **label,
                        "difference": interval(lambda a, b: _mean(b - a), all_of_it[states], change),
                        "spread ratio": interval(lambda a, b: b.std(-1) / a.std(-1), all_of_it[states], change),
                        "gradient ratio": interval(_ratio, norms["all"], norms["CW-GRPO"]),
                    })  # fmt: skip
    return {"laws": laws, "updates": updates, "weights": weights}


def stage_of(stage: dict[str, Any]) -> dict[str, int]:
    return {key: stage[key] for key in ("seed", "grpo_steps")}


def reported(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of the first seed."""
    return [stage for stage in results["stages"] if stage["seed"] == results["settings"]["seeds"][0]]


def _mean(values: Tensor) -> Tensor:
    return values.mean(-1)


def _ratio(of: Tensor, values: Tensor) -> Tensor:
    return values.mean(-1) / of.mean(-1)


# --- in words ----------------------------------------------------------------------------------------------


def middle(results: dict[str, Any], optimizer: str) -> float:
    steps = results["settings"]["steps"][optimizer]
    return steps[len(steps) // 2]


def chosen(results: dict[str, Any], kind: str, **label: Any) -> Iterator[dict[str, Any]]:
    """Rows of the statistics at the middle step of their optimiser."""
    for row in results["statistics"][kind]:
        if row["step"] == middle(results, row["optimizer"]) and label.items() <= row.items():
            yield row


def findings(results: dict[str, Any]) -> str:
    """Markdown: every number is one of entropy_law.json, and so is the reason for every verdict."""
    settings, logits = results["settings"], results["stages"][0]["logits"]
    laws = logits["laws"]
    slopes = ", ".join(f"{law['slope']:.2f} ({name})" for name, law in laws.items())
    worst = max(law["error"][0] / law["change"][0] for law in laws.values())
    text = [
        f"**Logits changed directly.** The error of `-Cov_p(log p, dz)` grows with the step to the power of {slopes}; "
        f"the law demands 2. At a step of {logits['step'][0]:g} it is at most {worst:.2%} of the change.",
        f"**Real updates.** Of each policy {settings['batches']} batches give one update each. In brackets are 95% "
        "bootstrap intervals over these batches, of each number by itself; they say nothing of other policies. *Own* "
        "states are those of the batch that gave the update; *fresh* ones are of held-out problems.",
        _in_short(results),
        f"Seed {settings['seeds'][0]} in full; all of them are in `research/results/entropy_law.json`:",
    ]
    for stage in reported(results):
        text += _stage(results, stage)
    return "\n\n".join(text)


def _stage(results: dict[str, Any], stage: dict[str, Any]) -> Iterator[str]:
    at = stage_of(stage)
    reward, before = (float(np.mean(stage[key])) for key in ("reward", "entropy"))
    yield f"#### After {stage['grpo_steps']} steps of GRPO: reward {reward:.2f}, entropy {before:.3f} nats"
    yield "\n".join(f"- {sentence}" for sentence in _verdicts(results, at))
    columns = [(optimizer, states) for optimizer in OPTIMIZERS for states in STATES]
    heads = [f"{o} {middle(results, o):g}, {s}" for o, s in columns]

    def rows(kind: str, key: str, cell: Callable[[dict[str, Any]], str]) -> list[list[str]]:
        table: dict[str, list[str]] = {}
        for optimizer, states in columns:
            for row in chosen(results, kind, **at, optimizer=optimizer, states=states):
                table.setdefault(row[key], []).append(cell(row))
        return [[UPDATES.get(name, name), *cells] for name, cells in table.items()]

    yield "Correlation of the change of entropy with what each law predicts, and how often the sign is right:"
    yield _table(
        ["law", *heads],
        rows("laws", "law", lambda row: f"{_between(row['correlation'])}; {row['agreement'][0]:.0%}"),
    )
    yield "Change of entropy, in thousandths of a nat, by the tokens that the update is made of:"
    yield _table(["tokens", *heads], rows("updates", "update", lambda row: _thousandths(row["change"])))


def _in_short(results: dict[str, Any]) -> str:
    """In how many cases a whole interval is on the side of the premise."""
    count = {}
    for states in STATES:
        laws, updates, weights = (list(chosen(results, kind, states=states)) for kind in results["statistics"])
        for law in ("covariance", LOGITS):
            count[law, states] = sum(row["correlation"][1] > 0 for row in laws if row["law"] == law)
        count["top", states] = sum(row["change"][2] < 0 for row in updates if row["update"] == "top")
        count["bottom", states] = sum(row["change"][1] > 0 for row in updates if row["update"] == "bottom")
        count["CW-GRPO", states] = sum(row["difference"][1] > 0 for row in weights)
    settings = results["settings"]
    among = {"seeds": settings["seeds"], "times in training": settings["grpo_steps"], "optimisers": OPTIMIZERS}
    cases = math.prod(map(len, among.values()))

    def both(name: str) -> str:
        return f"{count[name, 'own']} of {cases} for own states and in {count[name, 'fresh']} for fresh ones"

    return (
        f"**In short.** There are {cases} cases ({', '.join(f'{name}: {len(of)}' for name, of in among.items())}). "
        f"From batch to batch the covariance predicts the change of entropy in {both('covariance')}; the gradient of "
        f"each state's logits does in {both(LOGITS)}. An update on the fifth of the tokens with the highest "
        f"covariance lowers entropy in {both('top')}; one on the lowest fifth raises it in {both('bottom')}. After one "
        f"with CW-GRPO's weights entropy is higher than after GRPO's in {both('CW-GRPO')}."
    )


def _verdicts(results: dict[str, Any], at: dict[str, Any]) -> Iterator[str]:
    adam = {**at, "optimizer": "AdamW"}
    [stage] = [stage for stage in results["stages"] if at.items() <= stage.items()]
    predicted = stage["predicted"]
    covariance = interval(_mean, predicted["covariance"])
    between = interval(_ratio, predicted["covariance"], predicted["covariance between states"])
    moved = {
        (row["optimizer"], row["states"]): _moved(row["change"])
        for row in chosen(results, "updates", **at, update="all")
    }
    yield (
        f"By the covariances ({_thousandths(covariance)} thousandths of a nat for a step of 1, on average, of which a "
        f"share of {_between(between)} between states) entropy "
        f"{_verdict(covariance, 'should fall', 'should rise', 'should go neither way for certain')}. On average, that "
        f"of own states {moved['SGD', 'own']} with SGD and {moved['AdamW', 'own']} with AdamW, that of fresh ones "
        f"{moved['SGD', 'fresh']} with SGD and {moved['AdamW', 'fresh']} with AdamW."
    )
    for states in STATES:
        laws = {row["law"]: row["correlation"] for row in chosen(results, "laws", **adam, states=states)}
        paper, logits = laws["covariance"], laws[LOGITS]
        yield (
            f"From batch to batch, the covariance {_predicts(paper)} how the entropy of {states} states changes with "
            f"AdamW: r = {_between(paper)}, {paper[0] ** 2:.0%} of the variance. The gradient of each state's logits "
            f"{_predicts(logits)} it: r = {_between(logits)}, {logits[0] ** 2:.0%}."
        )
    own = {row["update"]: row["change"] for row in chosen(results, "updates", **adam, states="own")}
    expected = own["top"][2] < 0 < own["bottom"][1]
    yield (
        f"After an update on the fifth of the tokens with the highest covariance entropy {_moved(own['top'])}, on the "
        f"lowest fifth it {_moved(own['bottom'])}, on those between it {_moved(own['middle'])}: "
        f"{'the signs are those' if expected else 'these are not, beyond doubt, the signs'} of the premise."
    )
    [sgd] = chosen(results, "laws", **at, optimizer="SGD", states="own", law="covariance")
    yield (
        f"With SGD a unit of the covariance is {_between(sgd['slope'])} units of the change of own states' entropy for "
        "a unit of the step: states share parameters, so that nothing fixes this factor."
    )
    weights = {s: next(chosen(results, "weights", **adam, states=s)) for s in STATES}
    [plain] = chosen(results, "weights", **at, optimizer="SGD", states="own")
    own, fresh = (weights[s]["difference"] for s in STATES)
    yield (
        f"After an update with CW-GRPO's weights the entropy of own states {_compared(own)} ({_thousandths(own)} "
        f"thousandths of a nat, AdamW), that of fresh ones {_compared(fresh)} ({_thousandths(fresh)}). The norm of the "
        f"gradient is {_between(plain['gradient ratio'])} of GRPO's. Of the standard deviation of the change of own "
        f"states over batches {_between(plain['spread ratio'])} is left with SGD, and "
        f"{_between(weights['own']['spread ratio'])} with AdamW, whose first step has the same length for any gradient."
    )


def _between(found: list[float]) -> str:
    value, low, high = found
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _thousandths(found: list[float]) -> str:
    return _between([1000 * value for value in found])


def _verdict(found: list[float], below: str, above: str, neither: str) -> str:
    """By where the whole interval lies."""
    return below if found[2] < 0 else above if found[1] > 0 else neither


def _moved(found: list[float]) -> str:
    return _verdict(found, "falls", "rises", "goes neither way for certain")


def _predicts(found: list[float]) -> str:
    return _verdict(found, "predicts the opposite of", "predicts", "does not predict")


def _compared(found: list[float]) -> str:
    return _verdict(found, "is lower than after GRPO's", "is higher than after GRPO's", "does not certainly differ")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- as a picture ------------------------------------------------------------------------------------------

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3")


def draw(results: dict[str, Any]) -> Figure:
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(15, 8), layout="constrained")
        law, own, fresh, orders, correlations, parts = figure.subplots(2, 3).flat
        _draw_law(law, results["stages"][0]["logits"])
        _draw_scatter(own, results, "own", "The batch's own states")
        _draw_scatter(fresh, results, "fresh", "Fresh states")
        _draw_orders(orders, results)
        _draw_correlations(correlations, results)
        _draw_parts(parts, results)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def _title(axes: Axes, title: str, what: str) -> None:
    axes.set_title(title, fontweight="bold", loc="left", pad=18)
    axes.text(0, 1.02, what, transform=axes.transAxes, color="0.4", fontsize=8)


def _legend(axes: Axes, **place: Any) -> None:
    axes.legend(frameon=False, fontsize=7, **place).set_in_layout(False)


def _after(stage: dict[str, Any]) -> str:
    return f"after {stage['grpo_steps']} steps"


def _draw_law(axes: Axes, logits: dict[str, Any]) -> None:
    _title(axes, "The law in the logits", "error of dH = -Cov(log p, dz), root mean square, nats")
    for (name, law), colour in zip(logits["laws"].items(), COLOURS, strict=False):
        axes.loglog(logits["step"], law["change"], color=colour, linestyle=":")
        axes.loglog(
            logits["step"], law["error"], color=colour, marker="o", markersize=4,
            label=f"{name}: step^{law['slope']:.2f}",
        )  # fmt: skip
    axes.set_xlabel("step; dotted: the change itself")
    _legend(axes)


def _draw_scatter(axes: Axes, results: dict[str, Any], states: str, title: str) -> None:
    step = middle(results, "AdamW")
    _title(axes, title, f"one AdamW step of {step:g}, change in 1e-3 nats")
    for stage, colour in zip(reported(results), COLOURS, strict=False):
        [row] = [
            r for r in stage["changes"] if (r["optimizer"], r["step"], r["update"]) == ("AdamW", step, "all")
        ]  # fmt: skip
        [found] = chosen(results, "laws", **stage_of(stage), optimizer="AdamW", states=states, law="covariance")
        label = f"{_after(stage)}: r = {_between(found['correlation'])}"
        axes.scatter(stage["predicted"]["covariance"], [1000 * v for v in row[states]], s=12, color=colour, label=label)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("minus the mean covariance of the batch")
    _legend(axes)


def _draw_orders(axes: Axes, results: dict[str, Any]) -> None:
    _title(axes, "How far the first order reaches", "error of the gradient in the parameters, of the change")
    for stage, style in zip(reported(results), ("-", "--", ":"), strict=False):
        for optimizer, colour in zip(OPTIMIZERS, COLOURS, strict=False):
            rows = [r for r in stage["changes"] if (r["optimizer"], r["update"]) == (optimizer, "all")]
            errors = [
                np.abs(np.subtract(r["own"], r["own, first order"])).mean() / np.abs(r["own"]).mean() for r in rows
            ]
            steps = [r["step"] for r in rows]
            axes.loglog(
                steps, errors, style, color=colour, marker="o", markersize=4, label=f"{optimizer}, {_after(stage)}"
            )
    axes.set_xlabel("step size")
    _legend(axes)


def _draw_correlations(axes: Axes, results: dict[str, Any]) -> None:
    step = middle(results, "AdamW")
    _title(axes, "What tells the change", f"correlation over batches, AdamW {step:g}")
    marks = [(stage, states) for stage in reported(results) for states in STATES]
    for i, (stage, states) in enumerate(marks):
        rows = list(chosen(results, "laws", **stage_of(stage), optimizer="AdamW", states=states))
        axes.set_yticks(range(len(rows)), [row["law"] for row in rows])
        label = f"{states}, {_after(stage)}"
        _dots(axes, [row["correlation"] for row in rows], i, len(marks), label)
    axes.invert_yaxis()
    axes.axvline(0, color="0.6", linewidth=0.8)
    _legend(axes, loc="lower left")


def _draw_parts(axes: Axes, results: dict[str, Any]) -> None:
    step = middle(results, "AdamW")
    _title(axes, "Which tokens move it", f"own states, AdamW {step:g}, change in 1e-3 nats")
    for i, stage in enumerate(reported(results)):
        rows = list(chosen(results, "updates", **stage_of(stage), optimizer="AdamW", states="own"))
        axes.set_yticks(range(len(rows)), [UPDATES[row["update"]] for row in rows])
        changes = [[1000 * v for v in row["change"]] for row in rows]
        _dots(axes, changes, i, len(reported(results)), _after(stage))
    axes.invert_yaxis()
    axes.axvline(0, color="0.6", linewidth=0.8)
    _legend(axes)


def _dots(axes: Axes, found: list[list[float]], i: int, of: int, label: str) -> None:
    values, low, high = np.array(found).T
    places = np.arange(len(found)) + (i - (of - 1) / 2) * 0.6 / of
    axes.errorbar(
        values, places, xerr=[values - low, high - values], fmt="o", markersize=4, color=COLOURS[i], label=label
    )


# --- the command -------------------------------------------------------------------------------------------


def run(out: Path, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Measures, and writes OUT/entropy_law.json and OUT/entropy_law.png; some minutes on one core, `quick` (a smaller
    policy, few batches, to see that all works) some seconds. Returns what is in the JSON."""
    results = six_digits(measure(plan(seed, quick)))
    results["statistics"] = six_digits(statistics(results["stages"]))
    text = json.dumps(results, allow_nan=False)
    save_figure(results, out)
    # Last: where it is, all is done.
    write_atomically(out / "entropy_law.json", lambda file: file.write(text.encode()))
    return json.loads(text)


def save_figure(results: dict[str, Any], out: Path) -> None:
    write_atomically(out / "entropy_law.png", lambda file: draw(results).savefig(file, format="png", dpi=110))


BEGIN, END = "<!-- figures: python -m research entropy-law -->", "<!-- end of figures -->"


def updated(text: str, figures: str) -> str:
    """The document with the findings in place of those it has."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"


def command(*, out: Path, seed: int, quick: bool, report_only: bool, document: Path | None) -> None:
    """Measures, or with `report_only` reads OUT/entropy_law.json; prints what was found, and writes it into a
    document."""
    torch.set_num_threads(1)  # products this small lose with more
    if report_only:
        results = json.loads((out / "entropy_law.json").read_text())
        save_figure(results, out)
    else:
        results = run(out, seed, quick)
    print(findings(results))
    if document:
        document.write_text(updated(document.read_text(), findings(results)))
