"""`CovGRPOTrainer` beside TRL's own GRPOTrainer, both in short real runs on the CPU: a Qwen2 from a config, sampled by
transformers, rewarded by a function. What both see and make is recorded around TRL's methods, which run as they are."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

from datasets import Dataset  # noqa: E402
from processes import processes  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from covgrpo_kernels import (  # noqa: E402
    ClipCov,
    CovarianceWeighting,
    HighEntropy,
    Steer,
    entropy_weights,
    linear_logprob,
    reference,
    weighting_metrics,
)
from covgrpo_kernels.grpo.policy import byte_tokenizer  # noqa: E402
from covgrpo_kernels.integrations import transformers as patched  # noqa: E402
from covgrpo_kernels.integrations.trl import CovGRPOTrainer  # noqa: E402
from covgrpo_kernels.testing import check_draw, rms  # noqa: E402

GROUP = 4  # completions of a prompt
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
SCHEDULES: dict[str, dict[str, int]] = {
    "one loss": {},
    "accumulated": dict(gradient_accumulation_steps=2),  # no old log-probs; groups are shuffled over two micro-batches
    "old": dict(steps_per_generation=2),  # old log-probs; likewise
    "twice": dict(num_iterations=2),  # old log-probs of whole groups
    "twice accumulated": dict(gradient_accumulation_steps=2, steps_per_generation=1, num_iterations=2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": dict(model="tied"),
    "lora": dict(peft=True),
    "lora and reference": dict(peft=True, beta=0.1),
    "reference": dict(beta=0.1),
    "corrected reference": dict(beta=0.1, use_bias_correction_kl=True, model="tied"),
    "sequence": dict(importance_sampling_level="sequence"),
    "high entropy": dict(top_entropy_quantile=0.4),
    "entropy bonus": dict(entropy_coef=0.02),
    "truncated": dict(mask_truncated_completions=True, max_completion_length=24),
    "float32 head": dict(cast_lm_head_to_fp32=True),
    "cold": dict(temperature=0.6),
    "experts": dict(model="experts"),
    "scaled": dict(model="scaled"),
    # None of its kernels for layers, which need a GPU. In TRL 1.14 it is another way to log-probs.
    "liger": dict(use_liger_kernel=True, liger_kernel_config=dict(rope=False, rms_norm=False, swiglu=False)),
    "off-policy mask": dict(off_policy_mask_threshold=0.01, delta=1.5),
}


def save_models(folder: Path) -> None:
    size = dict(
        vocab_size=len(byte_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    configs = {
        "untied": transformers.Qwen2Config(**size, tie_word_embeddings=False),
        "tied": transformers.Qwen2Config(**size, tie_word_embeddings=True),
        "experts": transformers.Qwen3MoeConfig(**size, **experts, tie_word_embeddings=False),
        "scaled": transformers.GraniteConfig(**size, logits_scaling=3.0, tie_word_embeddings=False),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def reward(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def new_trainer(trainer_class: type, models: Path, options: dict[str, Any], **ours: Any) -> Any:
    """Everything that is not in ``options`` is fixed; only some twenty tokens are sampled, the end one of them."""
    options = dict(options)
    model, peft = options.pop("model", "untied"), options.pop("peft", False)
    more = {key: options.pop(key) for key in ("rollout_func",) if key in options}
    settings: dict[str, Any] = dict(
        per_device_train_batch_size=GROUP, per_device_eval_batch_size=GROUP, num_generations=GROUP,
        max_completion_length=10, max_steps=3, learning_rate=0.3, optim="sgd", max_grad_norm=0.0, bf16=False,
        generation_kwargs=dict(suppress_tokens=[0, *range(24, len(byte_tokenizer()))]),
        use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    tasks = Dataset.from_dict({"prompt": [f"{i}*{j}=" for i in range(3, 13) for j in range(8, 12)]})
    if peft:
        from peft import LoraConfig

        # The second matrix of an adapter begins as zeros, and so do the gradients of the first.
        more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = trainer_class(
        model=str(models / model) if isinstance(model, str) else model, reward_funcs=reward,
        train_dataset=tasks, eval_dataset=tasks.select(range(4)),
        args=trl.GRPOConfig(str(models / "run"), **(settings | options)), processing_class=byte_tokenizer(),
        **more, **ours,
    )  # fmt: skip
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


# ------------------------------------------------------------------------------------------- the same as GRPOTrainer


@dataclass
class Run(TrainerCallback):
    """What a trainer makes at each step; with ``start`` every step begins from those parameters."""

    start: Run | None = None
    losses: list[Tensor] = field(default_factory=list)  # of each micro-batch
    completions: list[Tensor] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)  # of each step
    parameters: list[dict[str, Tensor]] = field(default_factory=list)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.start is not None:
            model.load_state_dict(self.start.parameters[len(self.parameters)])
        self.parameters.append({name: value.clone() for name, value in model.state_dict().items()})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def exact_scores(
    model: nn.Module,
    input_ids: Tensor,  # [B, P + T]
    attention_mask: Tensor,
    logits_to_keep: int,  # T
    temperature: float,
    compute_aux_loss: bool = False,
    **ignored: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What TRL's scoring function returns, by the model's own forward and the reference."""
    more = {"output_router_logits": True} if compute_aux_loss else {}
    out = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False, **more)
    labels = input_ids.masked_fill(attention_mask == 0, -100)[:, -logits_to_keep:]
    logprobs, entropy = reference.linear_logprob(
        out.hidden_states[-1][:, -logits_to_keep - 1 : -1], model.get_output_embeddings().weight, labels,
        temperature=temperature, logit_scale=1 / getattr(model.config, "logits_scaling", 1.0),
    )  # fmt: skip
    return logprobs, entropy, getattr(out, "aux_loss", None)


def exact_copy(model: nn.Module) -> nn.Module:
    """In float64, with its own forwards in place of those that trainers put in."""
    exact = copy.deepcopy(model).double()
    base = exact.get_base_model() if hasattr(exact, "get_base_model") else exact
    for module in (base, base.lm_head):
        vars(module).pop("forward", None)
    base.get_input_embeddings()._forward_hooks.clear()  # to float32, of cast_lm_head_to_fp32
    base.set_experts_implementation("eager")  # others know no float64
    return exact


class Exact:
    """TRL's losses of a run in float64: its `_compute_loss` on exact log-probs, old and reference ones too."""

    def __init__(self, trainer: Any) -> None:
        self.losses: list[Tensor] = []
        self.grads: list[dict[str, Tensor]] = []
        self.trainer, self.generate = trainer, trainer._generate_and_score_completions
        trainer._generate_and_score_completions = self.with_exact_scores

    @torch.no_grad()
    def with_exact_scores(self, inputs: Any) -> dict[str, Any]:
        batch = self.generate(inputs)
        tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        for key in {"old_per_token_logps", "ref_per_token_logps"} & batch.keys():
            is_own = key.startswith("old") or self.trainer.ref_model is None
            model = exact_copy(self.trainer.model if is_own else self.trainer.ref_model)
            without = nullcontext() if key.startswith("old") or not is_own else model.disable_adapter()
            with without:
                scores = exact_scores(model, tokens, mask, batch["completion_ids"].size(1), self.trainer.temperature)
            batch[f"exact_{key}"] = scores[0]
        return batch

    def add(self, loss: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Any], is_first: bool) -> None:
        """Of a micro-batch; its gradients are added to those of the step."""
        exact, trainer = exact_copy(trainer_model(model)), self.trainer
        inputs = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
        inputs |= {n.removeprefix("exact_"): x for n, x in inputs.items() if n.startswith("exact_")}

        def scores(*args: Any, **kwargs: Any) -> Any:
            return exact_scores(*args, temperature=trainer.temperature, **kwargs)

        with mock.patch.object(trainer, "_get_per_token_logps_and_entropies", scores):
            value = loss(exact, inputs)
        value.backward()
        self.losses.append(value.detach())
        if is_first:
            self.grads.append({})
        for name, p in exact.named_parameters():
            if p.grad is not None:
                self.grads[-1][name] = p.grad + self.grads[-1].get(name, 0)


def trainer_model(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def train(
    trainer_class: type, models: Path, options: dict[str, Any], start: Run | None = None, **ours: Any
) -> tuple[Run, Exact]:
    """With ``start`` every step begins from that run's parameters; else its losses are taken in float64 as well."""
    trainer = new_trainer(trainer_class, models, options, **ours)
    run, exact = Run(start), Exact(trainer)
    trainer.add_callback(run)
    compute_loss = trainer._compute_loss

    def recorded(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss = compute_loss(model, inputs)
        if start is None:
            is_first = len(run.losses) % trainer.args.gradient_accumulation_steps == 0
            exact.add(compute_loss, model, inputs, is_first)
        run.losses.append(loss.detach())
        run.completions.append(inputs["completion_ids"])
        return loss

    trainer._compute_loss = recorded
    trainer.train()
    assert len(run.grads) == trainer.args.max_steps
    return run, exact


def over_ranks(grads: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """As DDP does it."""
    if dist.is_initialized():
        for grad in (grad for step in grads for grad in step.values()):
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return grads


def check_same(models: Path, loss_type: str, schedule: str, name: str) -> None:
    """GRPOTrainer, and CovGRPOTrainer without weights and with exact gradients, sample the same tokens and are equally
    far from TRL's losses and gradients in float64. Every step of the latter begins from the former's parameters, so
    that rounding in one step is not judged in another."""
    if name == "liger":
        pytest.importorskip("liger_kernel")
    rate = {"luspo": 0.03, "vespo": 0.1}.get(loss_type, 0.3)  # enough to clip, but ratios of whole sequences stay small
    options = dict(loss_type=loss_type, learning_rate=rate, **SCHEDULES[schedule], **OPTIONS[name])
    theirs, exact = train(trl.GRPOTrainer, models, options)
    ours, _ = train(CovGRPOTrainer, models, options, start=theirs, weighting="none", grad_tol=0.0)

    assert all(a.equal(b) for a, b in zip(ours.completions, theirs.completions, strict=True))
    # VESPO's weights are e to the third of the sum of a sequence's log-ratios, whose errors add up.
    eps = torch.finfo(torch.float32).eps * (30 if loss_type == "vespo" else 1)
    losses = [{"loss": torch.stack(run.losses)} for run in (ours, theirs, exact)]
    assert losses[2]["loss"].any()
    check_draw(*losses, bound={"loss": 16 * eps * (1 + rms(losses[2]["loss"]))})  # advantages cancel in it
    for got, want, true in zip(ours.grads, theirs.grads, over_ranks(exact.grads), strict=True):
        assert got.keys() == want.keys() == true.keys()
        size = rms(torch.cat([grad.flatten() for grad in true.values()]))
        check_draw(got, want, true, {name: 4 * eps * size for name in true})


# Every loss with one schedule, and every schedule with two losses more; `test_all_of_it` has all of them.
LOSSES_AND_SCHEDULES = sorted(
    {(loss, list(SCHEDULES)[i % 3]) for i, loss in enumerate(LOSSES)}
    | {(loss, schedule) for loss in ("grpo", "dapo") for schedule in list(SCHEDULES)[:3]}
)


@pytest.mark.parametrize(("loss_type", "schedule"), LOSSES_AND_SCHEDULES)
def test_every_loss_is_that_of_trl(models: Path, loss_type: str, schedule: str) -> None:
    check_same(models, loss_type, schedule, "plain")


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "plain"])
def test_every_option_means_what_it_does_in_trl(models: Path, name: str) -> None:
    check_same(models, "dapo", "twice", name)


@pytest.mark.deep
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_all_of_it(models: Path, loss_type: str, schedule: str, name: str) -> None:
    check_same(models, loss_type, schedule, name)


# --------------------------------------------------------------------------------------------------- the advantages


@dataclass
class Generation:
    """A rank's rows of a generation as TRL hands them over, before it shuffles them, and what became of them."""

    mask: Tensor  # [B, T]
    advantages: Tensor  # [B]
    logprobs: Tensor  # [B, T] float64
    eager: Tensor  # [B, T] the same in float32
    weighted: Tensor  # [B, T] the advantages that TRL's loss saw
    metrics: dict[str, float] = field(default_factory=dict)  # as logged


def record_weighting(trainer: Any, run: Callable[[], Any]) -> list[Generation]:
    """Runs the trainer. TRL's own methods are watched from below, where they return to ours."""
    generations: list[Generation] = []
    generate, compute_loss = trl.GRPOTrainer._generate_and_score_completions, trl.GRPOTrainer._compute_loss

    def watched_generate(self: Any, inputs: Any) -> dict[str, Any]:
        batch = generate(self, inputs)
        tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        model = exact_copy(self.model)
        with torch.no_grad():
            length = batch["completion_ids"].size(1)
            logprobs, eager = (
                exact_scores(model.to(dtype), tokens, attention, length, self.temperature)[0]
                for dtype in (torch.float64, torch.float32)
            )
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        unknown = torch.full_like(logprobs, torch.nan)
        generations.append(Generation(mask, batch["advantages"], logprobs, eager, unknown))
        return batch | {"row": torch.arange(len(tokens))}

    def watched_loss(self: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss = compute_loss(self, model, inputs)
        generation = generations[-1]
        generation.weighted[inputs["row"]] = inputs["advantages"].double()
        metrics = self._metrics["train" if self.model.training else "eval"]
        generation.metrics |= {n: x[-1] for n, x in metrics.items() if n.startswith(("weight/", "covariance/"))}
        return loss

    with (
        mock.patch.object(trl.GRPOTrainer, "_generate_and_score_completions", watched_generate),
        mock.patch.object(trl.GRPOTrainer, "_compute_loss", watched_loss),
    ):
        run()
    return generations


def check_weighting(
    generations: list[list[Generation]],  # of each generation its ranks
    group: int = GROUP,
    weighting: CovarianceWeighting | None = None,
) -> None:
    """The rows of all ranks in one batch, by the reference on exact log-probs; and eagerly on those of float32."""
    varied = False
    for ranks in generations:
        length = max(rank.weighted.shape[1] for rank in ranks)
        advantages = torch.cat([rank.advantages for rank in ranks])
        mask, logprobs, eager_logprobs, weighted = (
            torch.cat([nn.functional.pad(getattr(rank, name), (0, length - rank.weighted.shape[1])) for rank in ranks])
            for name in ("mask", "logprobs", "eager", "weighted")
        )
        results = []
        for x in (eager_logprobs, logprobs):
            a = advantages.to(x.dtype)
            weights = reference.covariance_weights(x, a, mask, group_size=group, weighting=weighting)
            results.append({"weighted": weights * a.unsqueeze(1)})
        varied |= bool(results[1]["weighted"].std() > 0.1)
        # A covariance is a product of differences of log-probs and of advantages, which lose their last digits.
        eps = torch.finfo(torch.float32).eps
        steep = eps * (1 + advantages.abs().max().item() * logprobs.abs().max().item())
        check_draw({"weighted": weighted}, *results, bound={"weighted": steep})
    assert varied


def run_training(models: Path, options: dict[str, Any], **ours: Any) -> list[Generation]:
    trainer = new_trainer(CovGRPOTrainer, models, dict(max_steps=4) | options, **ours)
    return record_weighting(trainer, trainer.train)


@pytest.mark.parametrize("fused_head", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_sees_advantages_weighted_by_whole_groups(models: Path, schedule: str, fused_head: bool) -> None:
    check_weighting([[generation] for generation in run_training(models, SCHEDULES[schedule], fused_head=fused_head)])


@pytest.mark.parametrize("name", ["lora", "truncated", "cold", "experts", "float32 head"])
def test_weighting_with_options(models: Path, name: str) -> None:
    for schedule in ("one loss", "accumulated"):
        check_weighting([[generation] for generation in run_training(models, SCHEDULES[schedule] | OPTIONS[name])])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_readings_of_the_paper(models: Path, schedule: str) -> None:
    weighting = CovarianceWeighting(scope="batch", centering="sequence", advantage_centering="response")
    generations = run_training(models, SCHEDULES[schedule], weighting=weighting)
    check_weighting([[generation] for generation in generations], weighting=weighting)


def some_rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Two turns of the model with a tool's answer between them."""
    tokenizer, seed = trainer.processing_class, trainer.state.global_step
    draw = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 7, (3,), generator=draw).tolist() for _ in prompts]
    return {
        "prompt_ids": tokenizer(prompts).input_ids,
        "completion_ids": [torch.randint(2, 60, (sum(n),), generator=draw).tolist() for n in lengths],
        "env_mask": [[1] * a + [0] * b + [1] * c for a, b, c in lengths],
        "logprobs": None,
    }


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tool_output_has_no_say(models: Path, schedule: str) -> None:
    generations = run_training(models, SCHEDULES[schedule] | dict(rollout_func=some_rollouts))
    check_weighting([[generation] for generation in generations])


def test_evaluation_is_weighted_by_its_own_groups(models: Path) -> None:
    for schedule in ("one loss", "accumulated", "old"):
        options = SCHEDULES[schedule] | dict(num_generations_eval=2)
        trainer = new_trainer(CovGRPOTrainer, models, options)
        generations = record_weighting(trainer, trainer.evaluate)
        assert len(generations) == 2
        check_weighting([[generation] for generation in generations], group=2)
        logged = trainer.state.log_history[-1]
        assert logged["eval_weight/max"] == pytest.approx(sum(g.metrics["weight/max"] for g in generations) / 2)


# A group of 4 stands across the ranks' 6 rows each. In the order of SCHEDULES' routes: in the loss, scored, old.
SPLIT = [
    dict(per_device_train_batch_size=6),
    dict(per_device_train_batch_size=3, gradient_accumulation_steps=2),
    dict(per_device_train_batch_size=3, steps_per_generation=2),
]


def test_over_ranks(models: Path) -> None:
    for case in (("grpo", "old", "tied"), ("dapo", "accumulated", "lora")):
        processes(2).run(check_same, models, *case)
    for options in SPLIT:
        ranks = processes(2).run(run_training, models, options)
        generations = [list(parts) for parts in zip(*ranks, strict=True)]
        assert not any(a.logprobs.equal(b.logprobs) or a.metrics != b.metrics for a, b in generations)
        check_weighting(generations)
    (count, lengths), (same, other) = processes(2).run(ranks_not_finite, models)
    assert count == same == [sum(length > 1 for length in lengths[::2] + other[::2])]


# ------------------------------------------------------------------------------------------------ weights by entropy


@dataclass
class Loss:
    """A rank's rows of one loss, and the advantages that TRL's loss saw; scores of the policy as it was then."""

    advantages: Tensor  # [B]
    mask: Tensor  # [B, T]
    old: Tensor | None  # [B, T]
    eager: tuple[Tensor, Tensor]  # [B, T] log-probs and entropies in float32
    exact: tuple[Tensor, Tensor]  # [B, T] and in float64
    weighted: Tensor  # [B, T]


BY_ENTROPY = {"steer": Steer(), "high_entropy": HighEntropy()}


def losses_by_entropy(models: Path, options: dict[str, Any], name: str) -> tuple[list[Loss], list[dict[str, float]]]:
    """Of every loss of a run, and what was logged for it."""
    trainer = new_trainer(CovGRPOTrainer, models, dict(max_steps=4) | options, weighting=name)
    losses: list[Loss] = []
    compute_loss = trl.GRPOTrainer._compute_loss

    def watched(self: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        advantages = inputs.get("unweighted_advantages", inputs["advantages"])
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        copied, length = exact_copy(trainer_model(model)), inputs["completion_ids"].size(1)
        with torch.no_grad():
            exact, eager = (
                exact_scores(copied.to(dtype), tokens, attention, length, self.temperature)[:2]
                for dtype in (torch.float64, torch.float32)
            )
        loss = compute_loss(self, model, inputs)
        old, mask = inputs.get("old_per_token_logps"), inputs["completion_mask"]
        losses.append(Loss(advantages, mask, old, eager, exact, inputs["advantages"]))
        return loss

    with mock.patch.object(trl.GRPOTrainer, "_compute_loss", watched):
        trainer.train()
    return losses, [log for log in trainer.state.log_history if "loss" in log]


def check_by_entropy(ranks: list[Loss], name: str) -> Tensor:
    """All ranks' rows in one batch. Gives their weighted advantages, flat and with the mask's length."""
    flat = {
        field: torch.cat([getattr(rank, field).flatten() for rank in ranks]) for field in ("mask", "weighted")
    }  # fmt: skip
    results = []
    for scores in ("eager", "exact"):
        x, h = (torch.cat([getattr(rank, scores)[i].flatten() for rank in ranks]) for i in (0, 1))
        a = torch.cat([rank.advantages.unsqueeze(1).expand_as(rank.mask).flatten() for rank in ranks]).to(x.dtype)
        old = None if ranks[0].old is None else torch.cat([rank.old.flatten() for rank in ranks]).to(x.dtype)  # type: ignore[union-attr]
        weights = entropy_weights(x, h, a, flat["mask"], old_logprobs=old, weighting=BY_ENTROPY[name])
        results.append({"weighted": weights * a})
    eps = torch.finfo(torch.float32).eps
    assert results[1]["weighted"].any()
    check_draw({"weighted": flat["weighted"]}, *results, bound={"weighted": 64 * eps * rms(results[1]["weighted"])})
    return flat["weighted"][flat["mask"] != 0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", BY_ENTROPY)
def test_every_loss_is_weighted_by_its_entropies(models: Path, name: str, schedule: str) -> None:
    """From advantages without weights, also where TRL comes back to the same inputs after a step; and a token that is
    left out is not live."""
    losses, logs = losses_by_entropy(models, SCHEDULES[schedule], name)
    weighted = [check_by_entropy([loss], name) for loss in losses]
    accumulated = len(weighted) // len(logs)
    for i, log in enumerate(logs):
        parts = weighted[i * accumulated : (i + 1) * accumulated]
        live = sum((part != 0).double().mean().item() for part in parts) / accumulated
        assert (live < 0.5) == (log["weight/max"] > 2) == (name == "high_entropy")
        if i == 0:
            assert log["rows/live_fraction"] == pytest.approx(live)
        else:  # what PPO clips is not live either
            assert log["rows/live_fraction"] <= live + 1e-6


@pytest.mark.parametrize("name", BY_ENTROPY)
def test_entropies_of_all_ranks(models: Path, name: str) -> None:
    ranks = processes(2).run(losses_by_entropy, models, SPLIT[2], name)
    for parts in zip(*(losses for losses, _ in ranks), strict=True):
        check_by_entropy(list(parts), name)
    for one, other in zip(*(logs for _, logs in ranks), strict=True):
        names = [n for n in one if n.startswith(("weight/", "rows/"))]
        assert len(names) == 5
        assert [one[n] for n in names] == [other[n] for n in names]


# ---------------------------------------------------------------------------------------------------------- the rest


def documented_metrics() -> dict[str, str]:
    """The names of the table in docs/integrations.md, and with which weightings each is logged."""
    page = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    table = page.split("| metric | unit | logged | meaning |\n")[1].split("\n\n")[0].splitlines()[1:]
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table]
    return {name: logged for names, _, logged, _ in rows for name in re.findall(r"`([^`]+)`", names)}


@pytest.mark.parametrize("weighting", ["covariance", "steer", "high_entropy", "none"])
def test_the_log_has_the_metrics_that_are_documented(models: Path, weighting: str) -> None:
    """And beside these what GRPOTrainer logs, in training and in evaluation."""
    logged = []
    for kind, ours in ((trl.GRPOTrainer, {}), (CovGRPOTrainer, dict(weighting=weighting))):
        trainer = new_trainer(kind, models, dict(max_steps=1), **ours)
        trainer.train()
        trainer.evaluate()
        logged.append({name for log in trainer.state.log_history for name in log})
    expected = set()
    for name, when in documented_metrics().items():
        if f'`"{weighting}"`' in when or when.startswith("always"):
            expected |= {name} if "training" in when else {name, f"eval_{name}"}
    assert logged[1] - logged[0] == expected
    assert logged[0] <= logged[1]


def test_live_rows(models: Path) -> None:
    """Tokens whose log-prob has a gradient; with an entropy bonus all have one of their entropy."""
    options = dict(max_steps=1)
    for more, everything in (({}, False), (dict(entropy_coef=0.02), True)):
        trainer = new_trainer(CovGRPOTrainer, models, options | more, weighting="none")
        generation = train_without_one_advantage(trainer)
        valid = generation["completion_mask"] != 0
        live = valid & (generation["advantages"].unsqueeze(1) != 0)
        assert 0 < live.sum() < valid.sum()
        [log] = [log for log in trainer.state.log_history if "loss" in log]
        expected = 1.0 if everything else (live.sum() / valid.sum()).item()
        assert log["rows/live_fraction"] == pytest.approx(expected)


def train_without_one_advantage(trainer: Any) -> dict[str, Any]:
    """Trains on completions of which one has no advantage, and gives the inputs of the last loss."""
    compute_loss, seen = trl.GRPOTrainer._compute_loss, {}

    def watched(self: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        inputs["advantages"][0] = 0
        seen.update(inputs)
        return compute_loss(self, model, inputs)

    with mock.patch.object(trl.GRPOTrainer, "_compute_loss", watched):
        trainer.train()
    return seen


def test_metrics_are_in_the_log(models: Path) -> None:
    """Of all the tokens of a generation, averaged over micro-batches as TRL's own are."""
    options = dict(max_steps=4, logging_steps=2)
    trainer = new_trainer(CovGRPOTrainer, models, options)
    generations = record_weighting(trainer, trainer.train)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log, pair in zip(logs, zip(generations[::2], generations[1::2], strict=True), strict=True):
        for name in pair[0].metrics:
            assert log[name] == pytest.approx(sum(generation.metrics[name] for generation in pair) / 2)
    for generation in generations:
        valid, a = generation.mask.flatten() != 0, generation.advantages.double().unsqueeze(1)
        weights = reference.covariance_weights(generation.logprobs, a.squeeze(1), generation.mask, group_size=GROUP)
        x = generation.logprobs.flatten()[valid]
        a = a.expand_as(generation.logprobs).flatten()[valid]
        want = weighting_metrics(weights.flatten()[valid], (x - x.mean()) * (a - a.mean()), valid[valid])
        assert generation.metrics == pytest.approx({n: v.item() for n, v in want.items()}, rel=1e-4, abs=1e-4)


def test_no_weighting_logs_none(models: Path) -> None:
    trainer = new_trainer(CovGRPOTrainer, models, dict(max_steps=1), weighting=None)
    trainer.train()
    assert not any(name.startswith(("weight/", "covariance/")) for log in trainer.state.log_history for name in log)


def not_finite(models: Path, level: str, shift: float, **ours: Any) -> tuple[list[float], list[int]]:
    """What the log of a step says, and the lengths of the completions of one rank, where in every second of these the
    second token's old log-prob is moved."""
    options = dict(num_iterations=2, max_steps=1, importance_sampling_level=level)
    trainer, lengths = new_trainer(CovGRPOTrainer, models, options, **ours), []
    generate = trainer._generate_and_score_completions

    def moved(inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = generate(inputs)
        batch["old_per_token_logps"][::2, 1] += shift
        lengths.extend(batch["completion_mask"].sum(1).tolist())
        return batch

    trainer._generate_and_score_completions = moved
    trainer.train()
    return [log["ratio/non_finite"] for log in trainer.state.log_history if "loss" in log], lengths


@pytest.mark.parametrize("ours", [{}, dict(fused_head=False), dict(weighting="none")])
def test_ratios_that_are_not_finite_are_counted(models: Path, ours: dict[str, Any]) -> None:
    assert not_finite(models, "token", -80.0, **ours)[0] == [0]  # e^80 is a float32
    for shift in (-1e3, torch.nan, -torch.inf):
        count, lengths = not_finite(models, "token", shift, **ours)
        assert count == [sum(length > 1 for length in lengths[::2])] != [0]
        assert lengths[::2] != lengths[1::2]


def test_ratios_of_sequences_are_counted(models: Path) -> None:
    """All tokens of a sequence have its ratio, from the mean of its log-probs."""
    assert not_finite(models, "sequence", -80.0)[0] == [0]
    count, lengths = not_finite(models, "sequence", -1e5)
    assert count == [sum(length for length in lengths[::2] if length > 1)]


def ranks_not_finite(models: Path) -> tuple[list[float], list[int]]:
    return not_finite(models, "token", -1e3)


def test_compiled(models: Path) -> None:
    """One graph for all lengths but the first. Without gradient checkpointing: transformers registers its hooks on the
    embedding anew after each generation, and each makes torch.compile begin again, in GRPOTrainer too."""
    options = dict(torch_compile=True, torch_compile_backend="eager", gradient_checkpointing=False)
    trainer = new_trainer(CovGRPOTrainer, models, dict(max_steps=3) | options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer.train()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("fused_head", [True, False])
@pytest.mark.parametrize(
    ("schedule", "training", "evaluation"),
    # Passes of a generation and of an evaluation batch: old log-probs or scores, and losses.
    [("one loss", 1, 1), ("accumulated", 4, 1), ("old", 4, 2), ("twice", 3, 2), ("twice accumulated", 2, 1)],
)
def test_passes_through_the_head(models: Path, schedule: str, training: int, evaluation: int, fused_head: bool) -> None:
    tolerances: list[float] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        tolerances.append(kwargs["grad_tol"])
        return linear_logprob(*args, **kwargs)

    options = SCHEDULES[schedule] | dict(max_steps=2 if schedule in ("old", "twice") else 1)
    trainer = new_trainer(CovGRPOTrainer, models, options, fused_head=fused_head, grad_tol=1e-3)
    for run, passes in ((trainer.train, training), (trainer.evaluate, 4 * evaluation)):
        with mock.patch.object(patched, "linear_logprob", watched):
            run()
        assert tolerances == [1e-3] * (passes * fused_head)
        tolerances.clear()


def test_the_reference_goes_through_it_too(models: Path) -> None:
    trainer = new_trainer(CovGRPOTrainer, models, dict(max_steps=2, beta=0.1))
    with mock.patch.object(patched, "linear_logprob", side_effect=linear_logprob) as head:
        trainer.train()
    assert head.call_count == 4


def test_a_head_that_is_not_known(models: Path) -> None:
    class Other(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden).tanh()

    model = transformers.AutoModelForCausalLM.from_pretrained(models / "untied")
    model.lm_head.__class__ = Other
    with pytest.raises(ValueError, match="output embedding"):
        new_trainer(CovGRPOTrainer, models, dict(model=model))
    new_trainer(CovGRPOTrainer, models, dict(model=model), fused_head=False)


def test_the_head_in_float32_under_autocast(models: Path) -> None:
    """With ``cast_lm_head_to_fp32`` hidden states and head are multiplied in float32, whatever the backbone's dtype."""
    trainer = new_trainer(CovGRPOTrainer, models, dict(cast_lm_head_to_fp32=True, bf16=True))
    model = trainer.accelerator.prepare_model(trainer.model)
    ids = torch.randint(2, 200, (GROUP, 20), generator=torch.Generator().manual_seed(0))
    states: list[Tensor] = []
    hook = trainer.model.lm_head.register_forward_pre_hook(lambda head, args: states.append(args[0]))
    with torch.no_grad():
        logprobs, *_ = trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), 10)
    hook.remove()
    weight, hidden, targets = trainer.model.lm_head.weight, states[0][:, 9:-1], ids[:, 10:]
    exact, _ = reference.linear_logprob(hidden.double(), weight.double(), targets)
    eager, _ = reference.linear_logprob(hidden.float(), weight, targets)
    eps = torch.finfo(torch.float32).eps
    check_draw({"x": logprobs}, {"x": eager}, {"x": exact}, {"x": eps * exact.abs().max().item()})


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (dict(weighting=ClipCov()), "weighting must be 'covariance', 'steer', "),
        (dict(weighting="kl_cov"), "weighting must be 'covariance', 'steer', "),
        (dict(weighting=CovarianceWeighting(differentiate_weights=True)), "weighting must be 'covariance', 'steer', "),
        (dict(weighting="gaussian"), "weighting must be one of"),
        (dict(weighting=3), "weighting must be a str"),
        (dict(fused_head="yes"), "fused_head must be a bool"),
        (dict(grad_tol="low"), "grad_tol must be"),
        (dict(grad_tol=-1.0), "grad_tol must be"),
    ],
)
def test_wrong_arguments(ours: dict[str, Any], message: str) -> None:
    """Before any work: there is no model."""
    with pytest.raises((TypeError, ValueError), match=message):
        CovGRPOTrainer(**ours)


def test_weights_by_entropy_need_ratios_of_tokens(models: Path) -> None:
    with pytest.raises(ValueError, match="importance_sampling_level must be 'token'"):
        new_trainer(CovGRPOTrainer, models, dict(importance_sampling_level="sequence"), weighting="steer")
