"""The models of `python -m research fetch-models`: what the package computes on them. Skipped where they are not."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from test_trl import Exact  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402

from covgrpo_kernels import cli  # noqa: E402
from covgrpo_kernels.grpo.policy import load_policy  # noqa: E402
from covgrpo_kernels.integrations.transformers import patch_model  # noqa: E402
from covgrpo_kernels.integrations.trl import CovGRPOTrainer  # noqa: E402
from covgrpo_kernels.testing import ErrorBook, check_draw, rms  # noqa: E402
from research.models import SOURCES, ModelNotFetchedError, model_folder  # noqa: E402

pytestmark = pytest.mark.slow

TEXT = """The quick brown fox jumps over the lazy dog. 17 + 25 = 42, and 3 * 14 is the same number; so is 50 - 8.
def is_prime(n): return n > 1 and all(n % i for i in range(2, n))
La pluie est tombée toute la nuit sur les toits de la ville. El sol sale por el este y se pone por el oeste. """


def folder_of(name: str) -> Path:
    try:
        return model_folder(name)
    except ModelNotFetchedError as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------------------------------------------- patch_model


@pytest.mark.parametrize("name", SOURCES)
def test_a_patched_model_gives_the_log_probs_of_its_own_logits(name: str) -> None:
    """Over at least 1,000 tokens; both are judged by the float64 log-probs of the states that the head gets."""
    folder = folder_of(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(TEXT * 20).input_ids
    tokens = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)[:17]  # 63 of each row are predicted
    assert tokens.shape == (17, 64)
    own = [own_logprobs(model, row) for row in tokens]
    patch_model(model)
    with torch.no_grad():
        ours = [model(row.unsqueeze(0), labels=row.unsqueeze(0), return_logprobs=True).logprobs[0] for row in tokens]
    book = ErrorBook()
    book.add(*({"logprob": torch.cat(x)} for x in (ours, [x for x, _ in own], [x for _, x in own])))
    book.check(torch.float32)


@torch.no_grad()
def own_logprobs(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:  # [L] -> [L - 1], and in float64
    out = model(tokens.unsqueeze(0), output_hidden_states=True)
    labels = tokens[1:].unsqueeze(1)
    states, weight = out.hidden_states[-1][0, :-1], model.get_output_embeddings().weight
    maximum = torch.full((len(states), 1), -torch.inf, dtype=torch.float64)
    total = torch.zeros_like(maximum)
    for part in weight.split(16384):  # the whole head in float64 has a gigabyte
        z = states.double() @ part.double().T
        higher = torch.maximum(maximum, z.amax(1, keepdim=True))
        total = total * (maximum - higher).exp() + (z - higher).exp().sum(1, keepdim=True)
        maximum = higher
    target = (states.double() * weight[tokens[1:]].double()).sum(1)
    exact = target - (maximum + total.log()).squeeze(1)
    return out.logits[0, :-1].log_softmax(-1).gather(1, labels).squeeze(1), exact


# ------------------------------------------------------------------------------------------------------ the trainers


class Steps(TrainerCallback):
    """What a trainer makes at each step: its loss, the norm of its gradient, the completions. The parameters that a
    step begins from are written to files, or read from those of another run."""

    def __init__(self, files: Path, follow: bool) -> None:
        self.files, self.follow = files, follow
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.completions: list[Tensor] = []
        self.exact_losses: list[Tensor] = []
        self.exact_norms: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        file = self.files / f"{state.global_step}.pt"
        if self.follow:
            model.load_state_dict(torch.load(file, mmap=True))
        else:
            torch.save(model.state_dict(), file)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.norms.append(total_norm(p.grad for p in model.parameters() if p.grad is not None))


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    return torch.stack([gradient.double().norm() for gradient in gradients]).norm()


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def train(trainer_class: type, folder: Path, files: Path, follow: bool, bf16: bool, **ours: Any) -> Steps:
    """Ten steps, of which every second one is a further step on the same completions, so that ratios are not one. A run
    that does not follow another takes its losses and gradients in float64 too."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    trainer = trainer_class(
        model=str(folder), reward_funcs=reward, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [f"{i} + {j} =" for i in range(12, 22) for j in (17, 25)]}),
        args=trl.GRPOConfig(
            str(files / "run"), per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
            max_steps=10, num_iterations=2, learning_rate=1e-3, optim="sgd", max_grad_norm=0.0, bf16=bf16,
            model_init_kwargs=dict(dtype="float32"), use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, seed=1,
        ),
        **ours,
    )  # fmt: skip
    steps, exact = Steps(files, follow), Exact(trainer)
    trainer.add_callback(steps)
    compute_loss = trainer._compute_loss

    def recorded(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss = compute_loss(model, inputs)
        steps.losses.append(loss.detach())
        steps.completions.append(inputs["completion_ids"])
        if not follow:
            with torch.autocast("cpu", enabled=False):
                exact.add(compute_loss, model, inputs, is_first=True)
            steps.exact_losses.append(exact.losses.pop())
            steps.exact_norms.append(total_norm(exact.grads.pop().values()))
            gc.collect()  # the copies in float64, two gigabytes each
        return loss

    trainer._compute_loss = recorded
    trainer.train()
    assert len(steps.losses) == len(steps.norms) == 10
    return steps


@pytest.mark.parametrize("bf16", [False, True])
def test_trainers_agree_on_a_real_model(bf16: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GRPOTrainer, and CovGRPOTrainer without weights and with exact gradients: the same completions, and losses and
    norms of gradients equally far from TRL's in float64. Every step of the latter begins from the former's parameters,
    so that rounding in one step is not judged in another."""
    folder = folder_of("smollm2")
    theirs = train(trl.GRPOTrainer, folder, tmp_path, False, bf16)
    ours = train(CovGRPOTrainer, folder, tmp_path, True, bf16, weighting="none", grad_tol=0.0)
    assert all(a.equal(b) for a, b in zip(ours.completions, theirs.completions, strict=True))
    draws = [
        {"loss": torch.stack(losses).double(), "norm": torch.stack(norms)}
        for losses, norms in (
            (ours.losses, ours.norms), (theirs.losses, theirs.norms), (theirs.exact_losses, theirs.exact_norms),
        )
    ]  # fmt: skip
    assert draws[2]["loss"].any()
    with capsys.disabled():
        for name in ("loss", "norm"):
            off = [rms(x[name] - draws[2][name]) for x in draws[:2]]
            print(f"\n{name}, bf16={bf16}: size {rms(draws[2][name]):.3e}, off by {off[0]:.3e}, TRL {off[1]:.3e}")
    eps = torch.finfo(torch.bfloat16 if bf16 else torch.float32).eps
    bound = {"loss": 16 * eps * (1 + rms(draws[2]["loss"])), "norm": 4 * eps * rms(draws[2]["norm"])}
    check_draw(*draws, bound=bound)


# ------------------------------------------------------------------------------------------------------ covgrpo train


def test_covgrpo_train_in_the_chat_template(tmp_path: Path) -> None:
    """Two steps on sums of two small numbers: prompts are messages in the model's template, and what is written is a
    changed model that still has it."""
    folder = folder_of("smollm2")
    problems = [dict(prompt=f"What is {a} + {b}?", answer=str(a + b)) for a in range(1, 10) for b in range(1, 10)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    options = dict(model=folder, data=tmp_path / "sums.jsonl", out=tmp_path / "run", steps=2, prompts_per_step=4)
    options |= dict(group_size=4, max_new_tokens=24, eval_problems=4)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert cli.main(["train", *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    assert len(steps) == 2
    # In its template the model ends some answers itself within 24 tokens, and some of them are right.
    assert all(row["response/truncated"] < 1 for row in steps)
    assert any(row["reward/mean"] > 0 for row in steps)
    assert all(math.isfinite(row["loss/policy"]) for row in steps)
    made = load_policy(str(tmp_path / "run" / "model"), torch.device("cpu"), chat_template="auto")
    start = load_policy(str(folder), torch.device("cpu"), chat_template="auto")
    prompt = problems[0]["prompt"]
    assert made.encode([prompt]) == start.encode([prompt])
    assert "<|im_start|>assistant" in start.tokenizer.decode(start.encode([prompt])[0])
    assert any(not a.equal(b) for a, b in zip(made.model.parameters(), start.model.parameters(), strict=True))
