"""Configuration: pydantic classes beside the components, YAML files, dotted overrides."""

import difflib
import json
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml import YAMLError

from megafusion.errors import UserError


class Config(BaseModel):
    """Base of every component's configuration: immutable, strict in types, closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    renamed_keys: ClassVar[dict[str, str]] = {}
    """Keys of earlier versions with their names now, by which they are refused: a name within this class, or
    after a dot a path from the top (`.checkpoint.every`); a space between two names."""

    moved_values: ClassVar[dict[tuple[str, str], str]] = {}
    """(key, value) of earlier versions where the key has another meaning now: refused with what to write."""


C = TypeVar("C", bound=Config)


def load_config(cls: type[C], path: Path | str, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply dotted overrides (`train.num_steps=50`) and validate.

    Raises UserError naming the file and the key's path, with the nearest valid name for a typing slip.
    """
    return parse_config(cls, load_values(path, overrides), str(path))


def load_values(path: Path | str, overrides: Sequence[str] = ()) -> Any:
    """Plain values of a YAML file with dotted overrides. Raises UserError if it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file; see the ones in configs/")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} is not of the form key.path=value")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path}: not readable as YAML keys and values: {error}") from error


def parse_config(cls: type[C], values: Any, origin: str) -> C:
    """Validate plain values into `cls`; `origin` names their source in the error."""
    if not isinstance(values, dict):
        raise UserError(f"{origin}: expected a mapping of keys, found {type(values).__name__}")
    try:
        # JSON mode: strict about types, yet a path may be written as a string and a tuple as a list.
        return cls.model_validate_json(json.dumps(values))
    except ValidationError as error:
        details = error.errors()
        unknown = [detail["loc"] for detail in details if detail["type"] == "extra_forbidden"]
        new_names = {name for location in unknown for name in _new_names(cls, location)}
        # The new name of a renamed key is missing too, which is the same mistake.
        details = [d for d in details if d["type"] != "missing" or _walk(cls, d["loc"])[1] not in new_names]
        lines = [f"{origin}: {_describe(cls, detail)}" for detail in details]
        raise UserError("\n".join(lines)) from error
    except TypeError as error:
        raise UserError(f"{origin}: {error}") from error


def dump_config(config: Config, exclude: Set[str] = frozenset()) -> str:
    """The configuration as YAML, every default written out: what a run folder freezes."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json", exclude=exclude)))


def changed_keys(old: Config, new: Config) -> list[str]:
    """Dotted paths of the leaves in which two configurations differ."""
    return _differences(old.model_dump(mode="json"), new.model_dump(mode="json"), "")


class Key(NamedTuple):
    """Of a configuration: its dotted path, its default (or "required"), its choices if any, its sentence."""

    path: str
    default: str
    choices: tuple
    about: str


def keys_of(cls: type[Config]) -> Iterator[Key]:
    """Every key of a configuration and of those within it; NAME stands for any name."""
    for parent, inner in _classes_with_paths(cls):
        for name, field in inner.model_fields.items():
            if any(_configs_in(field.annotation)):
                continue
            default = "required" if field.is_required() else json.dumps(field.default, default=str)
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            yield Key(parent + name, default, choices, " ".join((field.description or "").split()))


def renamed_keys_of(cls: type[Config]) -> Iterator[tuple[str, list[str]]]:
    """Dotted paths of the keys of earlier versions, and of the keys that replace each."""
    for parent, inner in _classes_with_paths(cls):
        for old, names in inner.renamed_keys.items():
            yield parent + old, [n[1:] if n.startswith(".") else parent + n for n in names.split()]


def _classes_with_paths(cls: type[Config], parent: str = "") -> Iterator[tuple[str, type[Config]]]:
    """A configuration class and those within it, each with the prefix of its keys."""
    yield parent, cls
    for name, field in cls.model_fields.items():
        infix = ".NAME." if get_origin(field.annotation) is dict else "."
        for inner in _configs_in(field.annotation):
            yield from _classes_with_paths(inner, f"{parent}{name}{infix}")


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [path]


def _describe(cls: type[Config], detail: dict) -> str:
    location = detail["loc"]
    owner, parent = _walk(cls, location[:-1])
    _, path = _walk(cls, location)
    value = detail["input"]
    if isinstance(value, str) and location:
        moved_to = owner.moved_values.get((str(location[-1]), value))
        if moved_to:
            return f"{path}: {value} has moved: write {moved_to}"
    match detail["type"]:
        case "extra_forbidden":
            if new_names := _new_names(cls, location):
                return f"key {path!r} was renamed: it is {' and '.join(map(repr, new_names))} now"
            fields = list(owner.model_fields)
            nearest = difflib.get_close_matches(str(location[-1]), fields, n=1, cutoff=0.5)
            hint = (
                f"did you mean {f'{parent}.{nearest[0]}'.lstrip('.')!r}?"
                if nearest
                else f"valid keys: {', '.join(sorted(fields))}"
            )
            return f"unknown key {path!r}; {hint}"
        case "missing":
            return f"key {path!r} is required and missing"
        case "value_error":  # ours: the message names the values itself
            return f"{path + ': ' if path else ''}{detail['ctx']['error']}"
        case "tuple_type":
            return f"key {path!r} is a list: write [{detail['input']}]"
        case _:
            where = f"key {path!r}: " if path else ""
            return f"{where}{detail['msg']} (got {detail['input']!r})"


def _walk(cls: type[Config], location: Sequence[str | int]) -> tuple[type[Config], str]:
    """The configuration class at a location, and its dotted path without pydantic's tags of union members."""
    path, tags = [], {}
    for part in location:
        if part in tags:
            cls, tags = tags[part], {}
            continue
        path.append(str(part))
        if part in cls.model_fields:  # else an index of a list or a key of a mapping
            inner = _configs_in(cls.model_fields[part].annotation)
            tags = {c.model_fields["kind"].default: c for c in inner} if len(inner) > 1 else {}
            cls = next(iter(inner), cls)
    return cls, ".".join(path)


def _new_names(cls: type[Config], location: Sequence[str | int]) -> list[str]:
    """The new dotted paths of a key of an earlier version; none for a key that never existed."""
    *parents, name = location
    owner, path = _walk(cls, parents)
    names = owner.renamed_keys.get(str(name), "").split()
    return [name[1:] if name.startswith(".") else f"{path}.{name}".lstrip(".") for name in names]


def _configs_in(annotation: Any) -> list[type[Config]]:
    """Configuration classes that an annotation names, each kind of a union."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Config) else []
    return [found for part in get_args(annotation) for found in _configs_in(part)]
