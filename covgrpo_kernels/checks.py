"""Checks of arguments. Each raises TypeError or ValueError that names the argument, what it was and what it should
be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST = torch.finfo(torch.float64).max
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _got(value: object) -> str:
    return type(value).__name__


def check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, got {_got(value)}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {_got(value)}")


def check_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {_got(value)}")
    return value


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above_low: bool = False
) -> float:
    """A finite number in [low, high], or in (low, high] with ``above_low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_got(value)}")
    # Not math.isfinite, which torch.compile does not trace.
    if not (abs(value) <= _LARGEST and (low < value if above_low else low <= value) and value <= high):
        interval = "" if low == -math.inf else f" and {'>' if above_low else '>='} {low:g}"
        interval += "" if high == math.inf else f" and <= {high:g}"
        raise ValueError(f"{name} must be finite{interval}, got {value!r}")
    return float(value)


def check_positive(name: str, value: object) -> float:
    return check_number(name, value, 0.0, above_low=True)


def check_one_of(name: str, value: object, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def check_tensor(name: str, value: object, like: Tensor | None = None) -> Tensor:
    """A dense tensor, on the device of ``like`` where that is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_got(value)}")
    if value.is_nested or value.layout is not torch.strided:
        kind = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")
    return value


def check_floating(name: str, value: object, like: Tensor | None = None) -> Tensor:
    tensor = check_tensor(name, value, like)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    return tensor


def check_integer(name: str, value: object, like: Tensor | None = None) -> Tensor:
    tensor = check_tensor(name, value, like)
    if tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must be of an integer dtype, got {tensor.dtype}")
    return tensor


def check_shape(name: str, value: Tensor, *shapes: Sequence[int]) -> None:
    if all(tuple(value.shape) != tuple(shape) for shape in shapes):
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {expected}, got {list(value.shape)}")


def check_generator(name: str, value: object, device: torch.device) -> None:
    if value is None:
        return
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator, got {_got(value)}")
    if value.device.type != device.type:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def check_process_group(name: str, value: object) -> dist.ProcessGroup | None:
    if value is None or (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        return value
    raise TypeError(f"{name} must be a torch.distributed.ProcessGroup that this rank belongs to, got {_got(value)}")
