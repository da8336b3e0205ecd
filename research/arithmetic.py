"""Chained modular arithmetic: the study's second task. Its answers are small numbers, so that a constant guess is right
now and then: with 11 for a modulus 0 is the answer of one problem in six or seven."""

from __future__ import annotations

import random
import re
from functools import partial

from covgrpo_kernels.grpo.tasks import Problem, Task, apply_operator, in_a_tenth

MODULI = (7, 11, 13, 17, 19, 23, 29, 31)  # by difficulty


def arithmetic_task(difficulty: int, seed: int) -> Task:
    return Task(partial(modular_arithmetic, difficulty=difficulty), in_a_tenth, seed)


def modular_arithmetic(rng: random.Random, difficulty: int) -> Problem:
    """`difficulty` operations, one after another from the left, modulo a prime that grows with it.

    "5 *3 -9 mod 11 =" is worked as "4 6": a response gives whatever steps it likes, its last number counts.
    """
    modulus = MODULI[difficulty - 1]
    value = rng.randrange(modulus)
    prompt, steps = str(value), []
    for _ in range(difficulty):
        operator, operand = rng.choice("+-*"), rng.randrange(modulus)
        value = apply_operator(operator, value, operand) % modulus
        prompt += f" {operator}{operand}"
        steps.append(str(value))
    prompt += f" mod {modulus} ="
    return Problem(prompt, " ".join(steps), partial(_ends_with, answer=value))


def _ends_with(response: str, answer: int) -> bool:
    last = re.search(r"(?:^|\s)([0-9]+)\s*$", response)
    return last is not None and last[1] == str(answer)
