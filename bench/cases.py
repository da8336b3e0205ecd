"""What is measured: inputs, sizes, and which gradients are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from covgrpo_kernels import testing
from covgrpo_kernels.benchmark import Problem

Size = tuple[int, int, int]  # N, D, V

# The smallest head that people train, on a CPU; a common one, on a GPU.
HEADLINE: dict[str, Size] = {"cpu": (1024, 896, 151936), "cuda": (8192, 4096, 128256)}
SMOKE: Size = (96, 48, 2500)

# Where a step is short and its launches count, and where the head is shallow, so that the softmax counts beside the
# products.
SMALL: dict[str, Size] = {"cpu": (64, 896, 151936), "cuda": (2048, 2048, 151936)}
SHALLOW: dict[str, Size] = {"cpu": (512, 256, 151936), "cuda": (16384, 896, 151936)}

# Hidden size, vocabulary, softcap.
HEADS: dict[str, tuple[int, int, float | None]] = {
    "Qwen2.5-0.5B": (896, 151936, None),
    "Qwen2.5-1.5B": (1536, 151936, None),
    "Qwen2.5-7B": (3584, 152064, None),
    "Llama-3-8B": (4096, 128256, None),
    "Gemma-2-2B": (2304, 256000, 30.0),
}
HEAD_TOKENS = {"cpu": 512, "cuda": 8192}

# Curves: one size grows, the others stay.
BASE: dict[str, Size] = {"cpu": (1024, 512, 32768), "cuda": (8192, 2048, 65536)}
GROWTH = {"cpu": [(1, 4), (1, 1), (4, 1), (16, 1)], "cuda": [(1, 8), (1, 2), (1, 1), (2, 1), (4, 1)]}


@dataclass(frozen=True)
class Point:
    label: str
    size: Size
    head: Callable[..., dict[str, Any]] = testing.rl_head
    inputs: dict[str, Any] = field(default_factory=dict)  # of the generator
    options: dict[str, Any] = field(default_factory=dict)  # of the problem

    @property
    def needed_bytes(self) -> int:
        """The head, its gradient and one block's share of it in float64, and the logits that eager code keeps."""
        n, d, v = self.size
        return 3 * 8 * v * d + 5 * 4 * n * v

    def problem(self, dtype: torch.dtype, device: torch.device) -> Problem:
        return Problem.of(self.head(0, *self.size, **self.inputs, device=device), dtype, device, **self.options)


@dataclass(frozen=True)
class Case:
    name: str
    what: str
    points: list[Point]
    both_dtypes: bool = False  # else bfloat16 alone, unless asked for
    memory: bool = False  # measured on a CPU too, where each costs a process


def _scaled(factor: float) -> Callable[..., dict[str, Any]]:
    """All logits nearly equal, or far apart."""

    def head(*arguments: Any, **options: Any) -> dict[str, Any]:
        like_rl = testing.rl_head(*arguments, **options)
        return like_rl | dict(hidden=like_rl["hidden"] * factor)

    return head


def policy_points(size: Size, policies: Sequence[str]) -> list[Point]:
    """The same size, for policies of `covgrpo_kernels.testing`."""
    return [Point(f"RL-like, {name} policy", size, inputs=dict(policy=name)) for name in policies]


def all_cases(kind: str, smoke: bool = False, policies: Sequence[str] | None = None) -> list[Case]:
    """For a kind of device, in the order in which they are run and shown. ``policies``: of the headline, by default all
    of `testing.POLICIES`, in a smoke run the first."""
    headline = SMOKE if smoke else HEADLINE[kind]
    policies = policies or list(testing.POLICIES)[: 1 if smoke else None]

    def one(label: str, head: Callable[..., dict[str, Any]] = testing.rl_head, **inputs: Any) -> Point:
        return Point(label, headline, head, inputs)

    def curve(which: int) -> list[Point]:
        points = []
        for times, over in GROWTH[kind]:
            size = [SMOKE[which] if smoke and i == which else x for i, x in enumerate(SMOKE if smoke else BASE[kind])]
            size[which] = size[which] * times // over
            points.append(Point(str(size[which]), (size[0], size[1], size[2])))
        return points[:1] if smoke else points

    def head_point(name: str) -> Point:
        depth, vocab, softcap = HEADS[name]
        return Point(name, SMOKE if smoke else (HEAD_TOKENS[kind], depth, vocab), options=dict(softcap=softcap))

    dense: dict[str, Any] = dict(mean_entropy=1.5, zero_advantage=0.0, padding=0.0)
    return [
        Case(
            "headline", "forward and backward on RL-like inputs", policy_points(headline, policies),
            both_dtypes=True, memory=True,
        ),
        Case("forward", "log-probs alone", [Point("no gradient", headline, options=dict(backward=False))]),
        Case("frozen", "no gradient for the head", [Point("frozen head", headline, options=dict(frozen=True))]),
        Case("small", "few tokens", [Point("RL-like", SMOKE if smoke else SMALL[kind])]),
        Case("shallow", "a small hidden size", [Point("RL-like", SMOKE if smoke else SHALLOW[kind])]),
        Case("entropy", "with a gradient for entropies", [Point("entropy", headline, options=dict(entropy=True))]),
        Case(
            "advantage", "as more groups have no advantage",
            [one(f"{share:.0%}", zero_advantage=share) for share in (0.0, 0.3, 0.6)],
        ),
        Case("dense", "every token live and undecided", [one("all live", **dense)]),
        Case(
            "hard", "where kernels break",
            [one("uniform logits", _scaled(1e-3)), one("extreme logits", _scaled(10.0))],
        ),
        Case("heads", "heads of real models", [head_point(name) for name in HEADS]),
        Case("growth-tokens", "as N grows", curve(0), memory=True),
        Case("growth-vocab", "as V grows", curve(2), memory=True),
        Case("growth-depth", "as D grows", curve(1)),
    ]  # fmt: skip
