"""The options of a training run: one list, from which the command line is made."""

from __future__ import annotations

import dataclasses
import math
import operator
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds, which `covgrpo --help` need not wait for
    import torch

    from .. import CovGRPOConfig

# The values of --weighting, and what progress lines, tables and plots call them.
ALGORITHMS = {
    "covariance": "CW-GRPO",
    "none": "GRPO",
    "clip_cov": "Clip-Cov",
    "kl_cov": "KL-Cov",
    "steer": "STEER",
    "high_entropy": "80/20",
}
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


def _option(
    default: Any, help: str, limits: str = "", choices: Sequence[str] | None = None, with_model: Any = None
) -> Any:
    """`with_model`: the default where --model is given, if it is another one."""
    metadata = dict(default=default, help=help, limits=limits, choices=choices, with_model=with_model)
    return field(default=default if with_model is None else None, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """One run of `covgrpo train`. None stands for an option's default. Raises TypeError or ValueError, naming the
    option."""

    out: str = _option("runs/train", "folder of the run, new or empty; an unfinished run in it is resumed")

    model: str | None = _option(None, "Hugging Face causal LM, a folder or a name; default: a small new Qwen2")
    hidden_size: int = _option(128, "width of the new model, a multiple of 64", ">= 64")
    layers: int = _option(4, "layers of the new model", ">= 1")
    warm_start_steps: int = _option(1000, "most supervised steps before GRPO", ">= 0", with_model=0)
    warm_start_reward: float = _option(0.35, "they end when this share of sampled responses is right", "> 0, <= 1")
    warm_start_lr: float = _option(1e-3, "their learning rate", "> 0", with_model=1e-5)

    data: str | None = _option(None, 'your problems, JSON lines {"prompt": ..., "answer": ...}; default: Countdown')
    difficulty: int = _option(1, "of Countdown: how many operations", ">= 1, <= 8")
    chat_template: str = _option("auto", "auto: the tokenizer's, where it has one", choices=("auto", "none"))

    steps: int = _option(80, "batches of responses to sample and train on", ">= 1")
    prompts_per_step: int = _option(32, "prompts (groups) in a batch", ">= 1")
    group_size: int = _option(8, "responses for each prompt", ">= 2")
    temperature: float = _option(0.7, "of sampling and of the loss", "> 0")
    max_new_tokens: int = _option(
        8, "longest response; one that is cut off here gets no reward", ">= 1", with_model=512
    )

    weighting: str = _option("covariance", "token weights of the policy loss; none: GRPO", choices=tuple(ALGORITHMS))
    loss_type: str = _option("grpo", "how token losses are added up", choices=LOSS_TYPES)
    beta: float = _option(0.0, "coefficient of the KL to the starting policy; 0: no reference model", ">= 0")
    entropy_coef: float = _option(0.0, "coefficient of the entropy bonus")
    grad_tol: float | None = _option(None, "certified error of the backward, 0: exact; default: auto", ">= 0, < 1")

    inner_steps: int = _option(2, "optimiser steps on each batch, each on an equal share of its groups", ">= 1")
    microbatch_prompts: int = _option(
        0, "groups in memory at once; 0: all those of an optimiser step", ">= 0", with_model=1
    )
    lr: float = _option(1.5e-4, "learning rate of AdamW after the warm-up", "> 0", with_model=1e-6)
    warmup_steps: int = _option(10, "batches over which the learning rate rises", ">= 0")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm", "> 0")

    seed: int = _option(0, "of everything random", ">= 0, <= 18446744073709551615")
    device: str = _option("auto", 'torch device; "auto": cuda where there is one, else cpu')
    dtype: str = _option(
        "float32", "of matrix products; auto: bfloat16 where the device has it. Parameters are always float32",
        choices=("auto", "float32", "bfloat16"), with_model="auto",
    )  # fmt: skip
    parallel: str = _option(
        "ddp", "under torchrun: the model whole on every process, or sharded over them (FSDP2)", choices=("ddp", "fsdp")
    )
    log_to: str = _option(
        "none", "where metrics go beside OUT/metrics.jsonl; wandb: Weights & Biases",
        choices=("none", "tensorboard", "wandb"),
    )  # fmt: skip
    checkpoint_every: int = _option(10, "steps between checkpoints", ">= 1")
    eval_every: int = _option(20, "steps between evaluations; 0: only before and after", ">= 0")
    eval_problems: int = _option(256, "held-out problems of an evaluation, at most; answered greedily", ">= 1")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value, about = getattr(self, option.name), option.metadata
            if value is None and about["with_model"] is not None:
                value = about["default"] if self.model is None else about["with_model"]
                object.__setattr__(self, option.name, value)
            check_option(option.name, value, about)
        if self.hidden_size % 64:
            raise ValueError(f"hidden_size must be a multiple of 64, got {self.hidden_size}")
        if self.inner_steps > self.prompts_per_step:
            raise ValueError(
                f"inner_steps must be at most prompts_per_step ({self.prompts_per_step}), got {self.inner_steps}"
            )

    @property
    def groups_per_microbatch(self) -> int:
        groups = math.ceil(self.prompts_per_step / self.inner_steps)
        return min(self.microbatch_prompts or groups, groups)

    @property
    def loss(self) -> CovGRPOConfig:
        """The options of the policy loss; everything not named here keeps its default."""
        from .. import CovGRPOConfig

        return CovGRPOConfig(
            weighting=self.weighting,  # type: ignore[arg-type]  # any string: CovGRPOConfig checks it
            loss_type=self.loss_type,  # type: ignore[arg-type]
            beta=self.beta,
            entropy_coef=self.entropy_coef,
            max_completion_length=self.max_new_tokens if self.loss_type == "dr_grpo" else None,
        )


def option_type(name: str) -> type:
    """int, float or str: the type of an option's value where it is not None."""
    hint = typing.get_type_hints(TrainConfig)[name]
    return next((t for t in typing.get_args(hint) if t is not type(None)), hint)


def usable_dtype(name: str, device: torch.device) -> torch.dtype:
    """What "auto" stands for: bfloat16 where the device multiplies in it."""
    import torch

    if name == "auto":
        on_gpu = device.type == "cuda"
        is_fast = torch.cuda.is_bf16_supported() if on_gpu else torch.cpu.get_capabilities().get("avx512_bf16", False)
        name = "bfloat16" if is_fast else "float32"
    return getattr(torch, name)


_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def check_option(name: str, value: Any, about: typing.Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError where a value, by itself, is none for the option."""
    if value is None and about["default"] is None:
        return
    kind = option_type(name)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
    if about["choices"] and value not in about["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(about['choices'])}, got {value!r}")
    number: Any = value
    if kind is float and not abs(number) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value!r}")
    for limit in filter(None, about["limits"].split(", ")):
        comparison, bound = limit.split()
        if not _COMPARE[comparison](number, kind(bound)):
            raise ValueError(f"{name} must be {limit}, got {value!r}")
