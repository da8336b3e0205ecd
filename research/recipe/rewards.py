"""Rewards of a response to a problem with a known answer, as TRL calls them."""

from __future__ import annotations

from typing import Any

from trl.rewards import accuracy_reward


def format_reward(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """1 where the response thinks in one block that ``</think>`` ends and says something after it, else 0.

    `trl.rewards.think_format_reward` demands the opening tag as well, so that a model whose chat template has it in
    the prompt would never be rewarded.
    """
    return [float(_thinks_then_answers(completion[0]["content"])) for completion in completions]


def _thinks_then_answers(text: str) -> bool:
    thought, end, answer = text.strip().removeprefix("<think>").partition("</think>")
    return bool(end and answer) and not any(tag in thought + answer for tag in ("<think>", "</think>"))


def as_solution(answer: object) -> str:
    """The answer in the form in which `accuracy_reward` reads it without doubt: of a worked solution the last box,
    else LaTeX between dollars."""
    text = str(answer).strip()
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if text[end] == "}" and depth == 0:
                return text[start : end + 1]
    return text if "$" in text else f"${text}$"


REWARDS = {"accuracy": accuracy_reward, "format": format_reward}
