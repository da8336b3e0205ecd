"""Problems whose answers a program checks: generated arithmetic and Countdown, or your own from a file.

A `Task` gives the problem at an index, the same one every time, so a run that is killed and resumed sees the
same problems. Whether a problem is held out for evaluation is a function of its prompt alone: no prompt can
be in both halves.
"""

from __future__ import annotations

import ast
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

MODULI = (7, 11, 13, 17, 19, 23, 29, 31)  # by difficulty


@dataclass(frozen=True)
class Problem:
    prompt: str
    solution: str  # one correct response, for the warm start
    is_correct: Callable[[str], bool]  # the exact reward


@dataclass(frozen=True)
class Task:
    generate: Callable[[random.Random], Problem]
    is_held_out: Callable[[str], bool]  # of a prompt
    seed: int
    prompts: tuple[str, ...] = ()  # all of them, if they are of a file

    def training_problem(self, stream: str, index: int) -> Problem:
        """Problem `index` of a stream; streams ("train", "warm start") are independent of each other."""
        return self._draw(f"{self.seed}/{stream}/{index}", held_out=False)

    def held_out_problem(self, index: int) -> Problem:
        # Not of the seed: runs are compared on the same problems.
        return self._draw(f"held out/{index}", held_out=True)

    def _draw(self, key: str, *, held_out: bool) -> Problem:
        rng = random.Random(key)
        while True:
            problem = self.generate(rng)
            if self.is_held_out(problem.prompt) == held_out:
                return problem


def generated_task(name: str, difficulty: int, seed: int) -> Task:
    generate = {"arithmetic": modular_arithmetic, "countdown": countdown}[name]
    return Task(partial(generate, difficulty=difficulty), lambda prompt: zlib.crc32(prompt.encode()) % 10 == 0, seed)


# --- chained modular arithmetic ---------------------------------------------------------------------------


def modular_arithmetic(rng: random.Random, difficulty: int) -> Problem:
    """`difficulty` operations, one after another from the left, modulo a prime that grows with it.

    "5 *3 -9 mod 11 =" is worked as "4 6": a response gives whatever steps it likes, its last number counts.
    """
    modulus = MODULI[difficulty - 1]
    value = rng.randrange(modulus)
    prompt, steps = str(value), []
    for _ in range(difficulty):
        operator, operand = rng.choice("+-*"), rng.randrange(modulus)
        value = _apply(operator, value, operand) % modulus
        prompt += f" {operator}{operand}"
        steps.append(str(value))
    prompt += f" mod {modulus} ="
    return Problem(prompt, " ".join(steps), partial(_ends_with, answer=value))


def _ends_with(response: str, answer: int) -> bool:
    last = re.search(r"(?:^|\s)([0-9]+)\s*$", response)
    return last is not None and last[1] == str(answer)


# --- Countdown ---------------------------------------------------------------------------------------------


def countdown(rng: random.Random, difficulty: int) -> Problem:
    """Reach a target by + - * from `difficulty + 1` numbers from 1 to 20, each used at most once.

    "3 7 5=26:" is solved by "3*7+5", and as well by any other expression of that value.
    """
    while True:
        numbers = [rng.randint(1, 20) for _ in range(difficulty + 1)]
        # Join two parts at random until one is left: its value becomes the target.
        parts = [(str(n), n) for n in numbers]
        while len(parts) > 1:
            (a, x), (b, y) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
            operator = rng.choice("+-*")
            if operator == "*":
                a, b = (f"({e})" if "+" in e or "-" in e else e for e in (a, b))
            elif operator == "-" and ("+" in b or "-" in b):
                b = f"({b})"
            parts.append((a + operator + b, _apply(operator, x, y)))
        [(expression, target)] = parts
        if 0 < target < 1000:
            prompt = f"{' '.join(map(str, numbers))}={target}:"
            return Problem(prompt, expression, partial(_reaches, numbers=numbers, target=target))


def _reaches(response: str, numbers: list[int], target: int) -> bool:
    """Whether the response is an expression of the given numbers with the target's value. It is parsed and
    folded by hand, never run; anything but numbers, + - * and parentheses makes it wrong."""
    text = response.strip()
    if len(text) > 200 or not re.fullmatch(r"[0-9+\-*() ]+", text):
        return False
    used: list[int] = []

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _apply(_OPERATORS[type(node.op)], value(node.left), value(node.right))
        raise SyntaxError("not an expression of numbers, + - * and parentheses")

    try:
        result = value(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return False
    return result == target and Counter(used) <= Counter(numbers)


_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


def _apply(operator: str, a: int, b: int) -> int:
    return a + b if operator == "+" else a - b if operator == "-" else a * b


# --- your own ----------------------------------------------------------------------------------------------


def file_task(path: str, seed: int) -> Task:
    """Rows {"prompt": ..., "answer": ...}; a response is right if it is the answer, but for blanks around it.
    A tenth of the prompts, at least one, is held out. Raises ValueError naming the line."""
    problems = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, not UTF-8
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not an object with a prompt and an answer")
            for key in ("prompt", "answer"):
                if not (isinstance(row.get(key), str) and row[key].strip()):
                    raise ValueError(f"{path}, line {number}: {key!r} must be a non-empty string")
            answer = row["answer"].strip()
            problems.append(Problem(row["prompt"], answer, partial(_is_exactly, answer=answer)))
    prompts = sorted({p.prompt for p in problems}, key=lambda prompt: (zlib.crc32(prompt.encode()), prompt))
    if len(prompts) < 2:
        raise ValueError(f"{path}: at least two different prompts are needed, one of them to hold out")
    held_out = frozenset(prompts[: max(len(prompts) // 10, 1)])
    return Task(lambda rng: rng.choice(problems), held_out.__contains__, seed, tuple(prompts))


def _is_exactly(response: str, answer: str) -> bool:
    return response.strip() == answer
