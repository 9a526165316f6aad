"""YAML files as plain values, and dotted overrides of them.

Names and values mean what YAML 1.2 says: only true and false are booleans, only null and ~ are null, numbers
are decimal (or 0x...), and every key is text. `on`, `no`, `12:30`, `010` and dates stay text.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megafusion.errors import UserError
from megafusion.storage import expand_path

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$|"
    r"[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema, with merge keys (`<<`). Keys are text, and none occurs twice."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} twice", problem_mark=key.start_mark)
            seen.add(key.value)
        self.flatten_mapping(node)
        for key, _ in node.value:
            key.tag = f"{_TAG}str"
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    f"{_TAG}int", re.compile("[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile("<<$"), ["<"])
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str | bytes) -> Any:
    """The values of a YAML text. Raises YAMLError, ValueError or RecursionError."""
    return _Loader(text).get_single_data()


def dump_yaml(values: dict) -> str:
    """YAML of plain values, which `parse_yaml` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_values(path: Path | str, overrides: Sequence[str] = ()) -> dict:
    """Plain values of a YAML file with dotted overrides. Raises UserError if it cannot be read."""
    path = Path(expand_path(path))
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file; see the ones in configs/")
    values = _parse(path.read_bytes(), str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: not readable as YAML keys and values: found a {type(values).__name__}")
    return apply_overrides(values, overrides)


def apply_overrides(values: dict, overrides: Sequence[str]) -> dict:
    """Plain values with dotted overrides (`train.num_steps=50`). Raises UserError for one of another form."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(parts := key.split(".")):
            raise UserError(f"override {override!r} is not of the form key.path=value")
        value = _parse(text, f"override of {key}")
        for part in reversed(parts):
            value = {part: value}
        values = _merge(values, value)
    return values


def _parse(text: str | bytes, origin: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{origin}: not readable as YAML: {problem}{line}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not readable as YAML: {' '.join(str(error).split())}") from error


def _merge(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _merge(old.get(key), value) for key, value in new.items()}
    return new
