"""Options of a run from a YAML file, as `covgrpo train --config` takes them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from typing import Any

from .grpo.config import TrainConfig, check_option, option_type

_YAML = "tag:yaml.org,2002:"  # what the tags of YAML's own types begin with
_STRING, _NULL = f"{_YAML}str", f"{_YAML}null"


def read_config(path: str) -> dict[str, Any]:
    """The options that a file names: `group_size: 8`, or `group-size: 8`, one a line. `null` stands for the default of
    an option that has none of its own. Raises OSError, or ValueError naming the file, the line and the option."""
    import yaml

    def wrong(line: int, what: object) -> ValueError:
        return ValueError(f"{path}, line {line}: {what}")

    with open(path, "rb") as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
        # Nodes, not values: they know their lines, and nothing is made of a tag that names a Python object.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise wrong(content.count(b"\n", 0, error.start) + 1, "not UTF-8") from None
    except yaml.reader.ReaderError as error:
        raise wrong(text.count("\n", 0, error.position) + 1, f"not YAML: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        mark, said = error.problem_mark or error.context_mark, filter(None, (error.context, error.problem))
        raise wrong(mark.line + 1 if mark else 1, f"not YAML: {', '.join(said)}") from None
    if not isinstance(root, yaml.MappingNode | None):
        raise wrong(root.start_mark.line + 1, "not options of the form name: value")
    fields = {field.name: field.metadata for field in dataclasses.fields(TrainConfig)}
    options: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value in root.value if root is not None else ():
        line, given = key.start_mark.line + 1, key.value if isinstance(key.value, str) else f"a {key.id}"
        if (name := given.replace("-", "_")) not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            raise wrong(line, f"no such option: {given}" + (f"; is {near[0]} meant?" if near else ""))
        if name in lines:
            raise wrong(line, f"{name} is there a second time, after line {lines[name]}")
        lines[name] = line
        if value.tag == _NULL and fields[name]["default"] is None:
            continue
        try:
            options[name] = _value(name, value)
            check_option(name, options[name], fields[name])
        except (TypeError, ValueError) as error:
            raise wrong(line, error) from None
    return options


def _value(name: str, node: Any) -> int | float | str:
    """Of a plain scalar as the command line reads it: YAML 1.1 takes 1e-4 for a string, and 010 for eight."""
    kind, is_scalar = option_type(name), isinstance(node.value, str)
    if is_scalar and kind is str and node.tag == _STRING:
        return node.value
    if is_scalar and kind is not str and node.style is None and node.tag.startswith(_YAML):
        with contextlib.suppress(ValueError):
            return kind(node.value)
    got = (repr(node.value) if node.style else node.value or "nothing") if is_scalar else f"a {node.id}"
    hint = "; in quotes it is one" if is_scalar and node.value and kind is str else ""
    raise TypeError(f"{name} must be of type {kind.__name__}, got {got}{hint}")
