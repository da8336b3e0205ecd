"""Problems whose answers a program checks: generated ones of Countdown, or your own from a file.

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
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

INSTRUCTION = (
    "Use each of the numbers before = at most once, with + - * and parentheses, to reach the number after it. "
    "End with a line that is the expression alone.\n\n"
)


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
    prompts: dict[str, str] = field(default_factory=dict)  # all those of a file, and where: "mine.jsonl, line 3"

    def training_problem(self, stream: str, index: int) -> Problem:
        """Problem `index` of a stream; streams ("train", "warm start") are independent of each other."""
        return self._draw(f"{self.seed}/{stream}/{index}", held_out=False)

    def training_problems(self, step: int, count: int) -> list[Problem]:
        return [self.training_problem("train", (step - 1) * count + i) for i in range(count)]

    def held_out_problem(self, index: int) -> Problem:
        # Not of the seed: runs are compared on the same problems.
        return self._draw(f"held out/{index}", held_out=True)

    def held_out_problems(self, count: int) -> list[Problem]:
        """As many different ones, or fewer where a long search finds no more."""
        found: dict[str, Problem] = {}
        for problem in map(self.held_out_problem, range(20 * count)):
            found.setdefault(problem.prompt, problem)
            if len(found) == count:
                break
        return list(found.values())

    def _draw(self, key: str, *, held_out: bool) -> Problem:
        rng = random.Random(key)
        while True:
            problem = self.generate(rng)
            if self.is_held_out(problem.prompt) == held_out:
                return problem


def countdown_task(difficulty: int, seed: int, *, instruct: bool = False) -> Task:
    """`instruct`: for models that do not know these problems. The last line of a response is then the answer."""

    def generate(rng: random.Random) -> Problem:
        problem = countdown(rng, difficulty)
        if not instruct:
            return problem
        return Problem(INSTRUCTION + problem.prompt, problem.solution, lambda r: problem.is_correct(last_line(r)))

    return Task(generate, in_a_tenth, seed)


def in_a_tenth(prompt: str) -> bool:
    return zlib.crc32(prompt.encode()) % 10 == 0


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
            parts.append((a + operator + b, apply_operator(operator, x, y)))
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
            return apply_operator(_OPERATORS[type(node.op)], value(node.left), value(node.right))
        raise SyntaxError("not an expression of numbers, + - * and parentheses")

    try:
        result = value(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return False
    return result == target and Counter(used) <= Counter(numbers)


_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


def apply_operator(operator: str, a: int, b: int) -> int:
    return a + b if operator == "+" else a - b if operator == "-" else a * b


def file_task(path: str, seed: int) -> Task:
    """Rows {"prompt": ..., "answer": ...}; a response is right that ends in the answer. A tenth of the prompts, at
    least one, is held out. Raises ValueError naming the line."""
    problems, places = [], dict[str, str]()
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.rstrip())
                if not all(isinstance(row[key], str) and row[key].strip() for key in ("prompt", "answer")):
                    raise TypeError("a prompt and an answer must be strings, and not empty")
                (row["prompt"] + row["answer"]).encode()  # JSON can spell half a character
            except (ValueError, TypeError, KeyError) as error:  # not JSON, not UTF-8, no object
                at = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(
                    f'{place}: not JSON of the form {{"prompt": ..., "answer": ...}} ({type(error).__name__}: {at})'
                ) from None
            answer = row["answer"].strip()
            problems.append(Problem(row["prompt"], answer, partial(ends_in, answer=answer)))
            places.setdefault(row["prompt"], place)
    prompts = sorted(places, key=lambda prompt: (zlib.crc32(prompt.encode()), prompt))
    if len(prompts) < 2:
        raise ValueError(f"{path}: at least two different prompts are needed, one of them to hold out")
    held_out = frozenset(prompts[: max(len(prompts) // 10, 1)])
    return Task(lambda rng: rng.choice(problems), held_out.__contains__, seed, places)


NUMBER = r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"


def ends_in(response: str, answer: str) -> bool:
    r"""Whether what the response comes to is the answer: the last \boxed{}, or else the last number of all where the
    answer is one, or else the end of the last line. Never an answer in passing: a list of all numbers would be right.
    """
    boxed = re.findall(r"\\boxed\s*\{([^{}]*)\}", response)
    given = boxed[-1].strip() if boxed else response
    if re.fullmatch(NUMBER, answer):
        value, *last = (Fraction(n.replace(",", "")) for n in (answer, *re.findall(NUMBER, given)[-1:]))
        return last == [value]
    return re.search(rf"(?<!\w){re.escape(answer.lower())}\W*$", last_line(given).lower()) is not None


def last_line(response: str) -> str:
    return (response.strip().splitlines() or [""])[-1]
