"""Saves the hidden states, targets and coefficients that a real model's head sees on sampled responses, for
`python -m bench --inputs FILE`; the model may be the one that `covgrpo train` made."""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covgrpo_kernels import covariance_weights
from covgrpo_kernels.config import IGNORE_INDEX

# Mathematics with answers, code, and prose in English, French and Spanish.
PROMPTS = Path(__file__).with_name("prompts.jsonl")
ROWS = 64  # responses that are sampled together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="Hugging Face causal LM, a folder or a name; or OUT/model of a run"
    )
    parser.add_argument("--out", type=Path, required=True, help="file that is written")
    parser.add_argument(
        "--data", type=Path, default=PROMPTS,
        help='JSON lines {"prompt": ...}, some with an "answer"; default: 100 on mathematics, code and prose',
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, help="the first of them only")
    parser.add_argument("--group-size", type=int, default=4, help="responses for each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from covgrpo_kernels.grpo.policy import load_policy

    try:
        policy = load_policy(arguments.model, torch.device(arguments.device))
        recording = record(
            policy, read_problems(arguments.data)[: arguments.prompts], group_size=arguments.group_size,
            max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, seed=arguments.seed,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    save(recording, arguments.out)
    n, d, v = len(recording["hidden"]), recording["hidden"].shape[1], len(recording["weight"])
    live = (recording["logprob_grad"] != 0).double().mean().item()
    print(f"{arguments.out}: N={n}, D={d}, V={v}, {live:.0%} of the tokens have a gradient")


def read_problems(path: Path) -> list[dict[str, str]]:
    """Raises ValueError naming the line that is no problem."""
    problems = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            problem = json.loads(line)
            if not (isinstance(problem, dict) and isinstance(problem.get("prompt"), str)):
                raise ValueError(f'{path}, line {number}: not an object with a "prompt"')
            problems.append(problem)
    return problems


@torch.no_grad()
def record(
    policy: Any,  # of `covgrpo_kernels.grpo`
    problems: list[dict[str, str]],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Responses sampled at a temperature, and the coefficients of CW-GRPO's first step on them: ratios are one.

    A prompt is put into the tokenizer's chat template where it has one. The reward of a problem with an answer is 1 if
    the answer is in the response as a word, else 0. That of the others is made up: 1 with a probability drawn for each
    prompt from the uniform distribution, so that 2 / (group_size + 1) of their groups have equal rewards, and no
    gradient, on average.

    Returns hidden [N, D], divided by the temperature: their products with the weight are the logits of the policy that
    sampled; weight [V, D], softcap, targets [N] with -100 on padding, logprob_grad [N]; and what `covgrpo_loss` makes
    these of: advantages, old_logprobs, group_ids, sequence_ids [N].

    Raises ValueError for a head with a bias, which the peers don't have, and for a softcap at another temperature than
    1, since the peers divide before it.
    """
    from covgrpo_kernels import linear_logprob
    from covgrpo_kernels.grpo.rollout import Batch, group_advantages

    if getattr(policy.model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError("the head has a bias: it can't be replayed beside peers that know none")
    rng = random.Random(seed)
    hidden, targets, mask, rewards = [], [], [], []
    softcap, weight = None, None

    def take(states: Tensor, head: Tensor, *, bias: None, logit_scale: float, softcap: float | None) -> Any:
        return states * (logit_scale / temperature), head, softcap

    torch.manual_seed(seed)
    prompts_at_once = max(ROWS // group_size, 1)
    for first in range(0, len(problems), prompts_at_once):
        part = problems[first : first + prompts_at_once]
        tokens, attention, valid = _sample(policy, part, group_size, max_new_tokens, temperature)
        for i, problem in enumerate(part):
            rows = slice(i * group_size, (i + 1) * group_size)
            batch = Batch(tokens[rows], attention[rows], valid[rows])
            states, weight, softcap = batch.apply_head(policy, take)
            if softcap is not None and temperature != 1:
                raise ValueError(f"the head has a softcap of {softcap}: it can only be recorded at temperature 1")
            hidden.append(states)
            targets.append(batch.responses)
            mask.append(batch.mask)
            texts = policy.tokenizer.batch_decode(batch.responses, skip_special_tokens=True)
            rewards += _rewards(problem, texts, rng)
    h, y, valid = (torch.cat(x) for x in (hidden, targets, mask))
    advantages = group_advantages(torch.tensor(rewards, device=h.device), group_size)
    if not advantages.any():
        raise ValueError("all responses to a prompt got equal rewards: no token has a coefficient. Other --data?")
    assert weight is not None
    old = [linear_logprob(x, weight, t, softcap=softcap).logprob for x, t in zip(h, y, strict=True)]
    old_logprobs = torch.stack(old).where(valid, 0)
    weights = covariance_weights(old_logprobs, advantages, valid, group_size=group_size)
    gradient = -weights * advantages.unsqueeze(1) / valid.sum()
    sequences = torch.arange(len(y), device=h.device).unsqueeze(1).expand_as(y)
    return dict(
        hidden=h.flatten(0, 1).to(policy.dtype),
        weight=weight.to(policy.dtype),
        targets=y.where(valid, IGNORE_INDEX).flatten(),
        logprob_grad=gradient.flatten(),
        softcap=softcap,
        advantages=advantages.unsqueeze(1).expand_as(y).flatten(),
        old_logprobs=old_logprobs.flatten(),
        group_ids=(sequences // group_size).flatten(),
        sequence_ids=sequences.flatten(),
    )


def _sample(
    policy: Any, problems: list[dict[str, str]], group_size: int, max_new_tokens: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:  # tokens, attention [B, P + T]; mask [B, T]
    """From the whole distribution: neither top-k nor top-p."""
    from transformers import GenerationConfig

    tokenizer = policy.tokenizer
    if tokenizer.chat_template:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": p["prompt"]}], add_generation_prompt=True, return_dict=True
            ).input_ids
            for p in problems
        ]
    else:
        prompts = [tokenizer(p["prompt"]).input_ids for p in problems]
    longest = max(map(len, prompts))
    padded = torch.tensor([[policy.pad_id] * (longest - len(ids)) + ids for ids in prompts])
    prompt_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    padded, prompt_mask = (x.repeat_interleave(group_size, 0).to(policy.device) for x in (padded, prompt_mask))
    how = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=policy.eos_ids.tolist(), pad_token_id=policy.pad_id,
    )  # fmt: skip
    tokens = policy.model.generate(padded, attention_mask=prompt_mask, generation_config=how)
    ended = torch.isin(tokens[:, longest:], policy.eos_ids)
    mask = ended.cumsum(1) - ended.long() == 0  # up to the first end of a sequence, and with it
    return tokens, torch.cat([prompt_mask, mask.long()], 1), mask


def _rewards(problem: dict[str, str], texts: list[str], rng: random.Random) -> list[float]:
    if "answer" in problem:
        word = re.compile(rf"(?<!\w){re.escape(problem['answer'])}(?!\w)")
        return [float(word.search(text) is not None) for text in texts]
    probability = rng.random()
    return [float(rng.random() < probability) for _ in texts]


def save(recording: dict[str, Any], path: Path) -> None:
    """All of it or nothing."""
    from covgrpo_kernels.grpo.checkpoint import write_atomically

    # Copies: a view would bring all of its storage.
    whole = {n: x.detach().cpu().clone() if isinstance(x, Tensor) else x for n, x in recording.items()}
    write_atomically(path, lambda file: torch.save(whole, file))


def load(path: Path, *_: Any, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A recording, in the form of the generators of `covgrpo_kernels.testing`, whose sizes it ignores."""
    return torch.load(path, weights_only=True, map_location=device)
