"""Problems for a real model, SmolLM2-135M-Instruct: examples, then a question, which it answers in a line.

It answers them right often enough at first to learn from: at temperature 0.7 some 30% of the sums (with other examples
9% to 27%), and over a third of the largest numbers, where a guess among the five is right in a fifth. Without
examples, or in its chat template, it answers few of them; sorting, sequences, days and reversed words it hardly answers
at all.
"""

from __future__ import annotations

import random
from functools import partial

import torch

from covgrpo_kernels.grpo.policy import load_policy
from covgrpo_kernels.grpo.tasks import Problem, Task, in_a_tenth

from .models import model_folder
from .prefix_tree import PrefixTreePolicy

SUMS = "42 + 48 = 90\n33 + 32 = 65\n26 + 12 = 38\n31 + 32 = 63\n"
LARGEST = "Largest of 45, 70, 59, 81, 34: 81\nLargest of 46, 58, 19, 21, 83: 83\nLargest of 63, 38, 36, 74, 55: 74\n"


def sums_task(seed: int) -> Task:
    """Of two numbers of two digits: 8,100 problems."""
    return Task(_sum, in_a_tenth, seed)


def largest_task(seed: int) -> Task:
    """Of five different numbers of two digits."""
    return Task(_largest, in_a_tenth, seed)


FEW_SHOT_TASKS = {"sums": sums_task, "largest": largest_task}


def _sum(rng: random.Random) -> Problem:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return _problem(f"{SUMS}{a} + {b} =", a + b)


def _largest(rng: random.Random) -> Problem:
    numbers = rng.sample(range(10, 100), 5)
    return _problem(f"{LARGEST}Largest of {', '.join(map(str, numbers))}:", max(numbers))


def _problem(prompt: str, answer: int) -> Problem:
    return Problem(prompt, str(answer), partial(_is, answer=str(answer)))


def _is(response: str, answer: str) -> bool:
    return response.strip() == answer


def few_shot_policy(model: str) -> PrefixTreePolicy:
    """One that `fetch-models` made. A response ends with its line, or as the model would end it. Raises
    ModelNotFetchedError."""
    policy = load_policy(str(model_folder(model)), torch.device("cpu"))
    policy = PrefixTreePolicy(policy.model, policy.tokenizer, policy.device)
    [newline] = policy.tokenizer("\n", add_special_tokens=False).input_ids
    policy.eos_ids = torch.cat([policy.eos_ids, torch.tensor([newline])])
    return policy
