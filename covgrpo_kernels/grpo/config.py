"""The options of a training run: one list, from which the command line is made."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import CovGRPOConfig

TASKS = ("arithmetic", "countdown")
WEIGHTINGS = ("covariance", "none", "clip_cov", "kl_cov")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
PARALLEL = ("ddp", "fsdp")


def _option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    return field(default=default, metadata=dict(help=help, low=low, above=above, high=high, choices=choices))


@dataclass(frozen=True)
class TrainConfig:
    """One run of `covgrpo train`. Raises TypeError or ValueError, naming the option."""

    out: str = _option("runs/train", "folder of the run; an unfinished run in it is resumed")

    model: str | None = _option(None, "Hugging Face causal LM, a folder or a name; default: a small new Qwen2")
    hidden_size: int = _option(128, "width of the new model, a multiple of 64", low=64)
    layers: int = _option(4, "layers of the new model", low=1)
    warm_start_steps: int | None = _option(
        None, "most supervised steps before GRPO; default: 1000, none with --model", low=0
    )
    warm_start_reward: float = _option(0.35, "they end when this share of sampled responses is right", above=0, high=1)
    warm_start_lr: float | None = _option(None, "their learning rate; default: 1e-3, 1e-5 with --model", above=0)

    task: str = _option("countdown", "generated problems to train on", choices=TASKS)
    difficulty: int = _option(1, "of the generated problems, 1 to 8", low=1, high=8)
    data: str | None = _option(None, 'your problems instead: JSON lines {"prompt": ..., "answer": ...}')

    steps: int = _option(80, "rollout batches", low=1)
    prompts_per_step: int = _option(32, "prompts (groups) in a rollout batch", low=1)
    group_size: int = _option(8, "responses for each prompt", low=2)
    temperature: float = _option(0.7, "of sampling and of the loss", above=0)
    max_new_tokens: int = _option(8, "longest response; one cut off here gets no reward", low=1)

    weighting: str = _option("covariance", "token weights of the policy loss", choices=WEIGHTINGS)
    loss_type: str = _option("grpo", "how token losses are added up", choices=LOSS_TYPES)
    beta: float = _option(0.0, "coefficient of the KL to the starting policy; 0: no reference model", low=0)
    entropy_coef: float = _option(0.0, "coefficient of the entropy bonus")
    grad_tol: str = _option("auto", 'certified error of the backward, a number or "auto"; 0: exact')

    inner_steps: int = _option(2, "optimiser steps on each rollout batch", low=1)
    minibatch_prompts: int | None = _option(
        None, "groups of one optimiser step; default: --prompts-per-step / --inner-steps, or all", low=1
    )
    microbatch_prompts: int | None = _option(
        None, "groups in memory at once, divides the minibatch; default: all of it", low=1
    )
    lr: float = _option(1.5e-4, "learning rate of AdamW after the warm-up", above=0)
    warmup_steps: int = _option(10, "rollout batches over which the learning rate rises", low=0)
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm", above=0)

    seed: int = _option(0, "of everything random", low=0)
    device: str = _option("auto", 'torch device; "auto": cuda where there is one, else cpu')
    parallel: str = _option(
        "ddp", "under torchrun: the model whole on every process, or sharded over them (FSDP2)", choices=PARALLEL
    )
    checkpoint_every: int = _option(10, "rollout batches between checkpoints", low=1)
    eval_every: int = _option(20, "rollout batches between evaluations; 0: only before and after", low=0)
    eval_problems: int = _option(256, "held-out problems of an evaluation, answered greedily", low=1)

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            _check(option, getattr(self, option.name))
        if self.hidden_size % 64:
            raise ValueError(f"hidden_size must be a multiple of 64, got {self.hidden_size}")
        if self.prompts_per_step % self.groups_per_minibatch:
            raise ValueError(
                f"minibatch_prompts must divide prompts_per_step ({self.prompts_per_step}), "
                f"got {self.minibatch_prompts}"
            )
        if self.groups_per_minibatch % self.groups_per_microbatch:
            raise ValueError(
                f"microbatch_prompts must divide the prompts of a minibatch ({self.groups_per_minibatch}), "
                f"got {self.microbatch_prompts}"
            )
        if self.grad_tol != "auto":
            try:
                valid = 0 <= float(self.grad_tol) < 1
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f'grad_tol must be "auto" or a number >= 0 and < 1, got {self.grad_tol!r}')

    @property
    def groups_per_minibatch(self) -> int:
        if self.minibatch_prompts is None:
            share, rest = divmod(self.prompts_per_step, self.inner_steps)
            return self.prompts_per_step if rest else share
        return self.minibatch_prompts

    @property
    def groups_per_microbatch(self) -> int:
        return self.microbatch_prompts or self.groups_per_minibatch

    @property
    def rows_per_microbatch(self) -> int:
        return self.groups_per_microbatch * self.group_size

    @property
    def supervised_steps(self) -> int:
        if self.warm_start_steps is None:
            return 1000 if self.model is None else 0
        return self.warm_start_steps

    @property
    def supervised_lr(self) -> float:
        if self.warm_start_lr is None:
            return 1e-3 if self.model is None else 1e-5
        return self.warm_start_lr

    @property
    def loss(self) -> CovGRPOConfig:
        """The options of the policy loss; everything not named here keeps its default."""
        return CovGRPOConfig(
            weighting=self.weighting,
            loss_type=self.loss_type,
            beta=self.beta,
            entropy_coef=self.entropy_coef,
            max_completion_length=self.max_new_tokens if self.loss_type == "dr_grpo" else None,
        )

    @property
    def gradient_tolerance(self) -> float | str:
        return "auto" if self.grad_tol == "auto" else float(self.grad_tol)


def option_type(name: str) -> type:
    """int, float or str: the type of an option's value where it is not None."""
    hint = typing.get_type_hints(TrainConfig)[name]
    return next((t for t in typing.get_args(hint) if t is not type(None)), hint)


def _check(option: dataclasses.Field[Any], value: Any) -> None:
    name, kind, limits = option.name, option_type(option.name), option.metadata
    if value is None and option.default is None:
        return
    accepted: Any = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(limits['choices'])}, got {value!r}")
    if isinstance(value, str):
        return
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if limits["low"] is not None and value < limits["low"]:
        raise ValueError(f"{name} must be >= {limits['low']}, got {value!r}")
    if limits["above"] is not None and value <= limits["above"]:
        raise ValueError(f"{name} must be > {limits['above']}, got {value!r}")
    if limits["high"] is not None and value > limits["high"]:
        raise ValueError(f"{name} must be <= {limits['high']}, got {value!r}")
