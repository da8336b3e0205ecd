"""What a recipe file may say. Every key is checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from trl import GRPOConfig

from covgrpo_kernels.config import CovarianceWeighting

from .rewards import REWARDS

# Keywords of GRPOConfig that other sections give, and which.
ELSEWHERE = {"model_init_kwargs": "model", "reward_weights": "rewards"}


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str  # on the hub, or a folder
    revision: str | None = None
    dtype: str = "float32"  # of the parameters that are trained
    attn_implementation: str | None = None


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Problems and their answers: two columns of a data set."""

    name: str  # on the hub, a folder written by Dataset.save_to_disk, or a file of JSON lines, NAME.jsonl
    config: str | None = None
    split: str = "train"  # of a data set on the hub
    problem: str = "problem"
    answer: str = "answer"


@dataclass(frozen=True, kw_only=True)
class TrainingData(Problems):
    system_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Benchmark(Problems):
    samples: int = 1  # responses to each problem; pass@1 is their mean
    paper: dict[str, float] = dataclasses.field(default_factory=dict)  # published pass@1 in percent, by row

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be >= 1, got {self.samples}")


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """The keywords that CovGRPOTrainer adds to GRPOTrainer's."""

    weighting: str | dict[str, Any] = "covariance"  # or the fields of a CovarianceWeighting
    fused_head: bool = True
    grad_tol: float | str = "auto"

    def __post_init__(self) -> None:
        self.keywords()

    def keywords(self) -> dict[str, Any]:
        given = self.weighting
        try:
            kind = CovarianceWeighting(**given) if isinstance(given, dict) else given
        except TypeError as error:
            raise ValueError(f"weighting: {error}") from None
        return {"weighting": kind, "fused_head": self.fused_head, "grad_tol": self.grad_tol}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    prompt: str  # the user's message; {problem} stands for the problem
    temperature: float
    max_new_tokens: int
    benchmarks: dict[str, Benchmark]
    top_p: float = 1.0
    engine: str = "transformers"  # or "vllm", in a single process
    dtype: str = "bfloat16"
    batch_size: int = 16  # responses at a time; vLLM has its own
    seed: int = 0

    def __post_init__(self) -> None:
        if "{problem}" not in self.prompt:
            raise ValueError("prompt must contain {problem}, which stands for the problem")
        if self.engine not in ("transformers", "vllm"):
            raise ValueError(f"engine must be transformers or vllm, got {self.engine!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    model: Model
    data: TrainingData
    rewards: dict[str, float]  # name to weight
    trainer: dict[str, Any]  # fields of GRPOConfig
    evaluation: Evaluation
    weighting: Weighting = Weighting()

    def __post_init__(self) -> None:
        unknown = self.rewards.keys() - REWARDS.keys()
        if unknown or not self.rewards:
            got = ", ".join(sorted(unknown)) or "none"
            raise ValueError(f"rewards must be some of {', '.join(sorted(REWARDS))}, got {got}")
        for key in self.trainer.keys() & ELSEWHERE.keys():
            raise ValueError(f"trainer.{key} follows from the section {ELSEWHERE[key]}")
        hints = typing.get_type_hints(GRPOConfig)
        _known("trainer", self.trainer, {field.name for field in dataclasses.fields(GRPOConfig) if field.init})
        for key, value in self.trainer.items():
            _check(f"trainer.{key}", value, hints[key])
        if not self.trainer.get("output_dir"):
            raise ValueError("trainer.output_dir is missing: the folder of the run")

    def arguments(self, out: Path) -> GRPOConfig:
        """Raises ValueError where GRPOConfig does: its fields contradict each other, or the device."""
        given = {"revision": self.model.revision, "attn_implementation": self.model.attn_implementation}
        return GRPOConfig(
            **self.trainer | {"output_dir": str(out)},
            reward_weights=list(self.rewards.values()),
            model_init_kwargs={"dtype": self.model.dtype} | {k: v for k, v in given.items() if v is not None},
        )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Args:
        path: a YAML file with the sections of `Recipe`.
        overrides: "section.key=value", the value in YAML, which replace what the file says or add to it.

    Raises:
        OSError: the file cannot be read.
        TypeError, ValueError: it is no recipe, with the key that is wrong.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
        for override in overrides:
            key, equals, value = override.partition("=")
            *sections, last = key.split(".")
            target = content
            for section in sections:
                target = target.get(section) if isinstance(target, dict) else None
            if not equals or not isinstance(target, dict):
                raise ValueError(f"{override!r} is no SECTION.KEY=VALUE for a section of {path}")
            target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    return _build("", content, Recipe)


def _build(where: str, content: object, kind: type[Any]) -> Any:
    name = where or "a recipe"
    if not isinstance(content, dict):
        raise TypeError(f"{name} must be a mapping, got {content!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    _known(name, content, fields)
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        inner = f"{where}.{key}" if where else key
        of = typing.get_args(hints[key])[-1:]
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(inner, value, hints[key])
        elif of and dataclasses.is_dataclass(of[0]) and isinstance(value, dict):
            values[key] = {item: _build(f"{inner}.{item}", value[item], typing.cast(type, of[0])) for item in value}
        else:
            _check(inner, value, hints[key])
            values[key] = value
    for key, field in fields.items():
        if key not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name}: {key} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}.{error}" if where else str(error)) from None


def _known(where: str, content: Mapping[str, Any], known: typing.Collection[str]) -> None:
    unknown = [key for key in content if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(map(repr, unknown))}")


def _check(where: str, value: object, hint: Any) -> None:
    if not _fits(value, hint):
        kind = hint.__name__ if isinstance(hint, type) else str(hint)
        hint_for_floats = "; YAML takes 1e-6 for text, write 1.0e-6" if isinstance(value, str) else ""
        raise TypeError(f"{where} must be {kind}, got {value!r}{hint_for_floats}")


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)
