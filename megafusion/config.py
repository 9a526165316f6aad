"""Configuration: pydantic classes beside the components, read from YAML files and dotted overrides."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from megafusion.errors import UserError
from megafusion.storage import expand_path
from megafusion.suggestions import suggest
from megafusion.yaml_values import dump_yaml, load_values

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

REQUIRED, FROM_DATA = "required", "from the data"


class _RefusingConstructor(ModelMetaclass):
    """Constructors of configurations that raise UserError, as those from files do."""

    if not TYPE_CHECKING:  # which reads the constructor's parameters off the fields

        def __call__(cls, *args: Any, **values: Any) -> Any:
            with _refused(cls, cls.__name__):
                return super().__call__(*args, **values)


class Config(BaseModel, metaclass=_RefusingConstructor):
    """Base of every component's configuration: immutable, strict in types, closed to unknown keys.

    In paths, ~ and $NAME are expanded. The constructor raises UserError for what is not valid.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    renamed_keys: ClassVar[dict[str, str]] = {}
    """Keys of earlier versions with their names now, by which they are refused: a name within this class, or
    after a dot a path from the top (`.checkpoint.every`); a space between two names."""

    moved_values: ClassVar[dict[tuple[str, str], str]] = {}
    """(key, value) of earlier versions where the key has another meaning now: refused with what to write."""

    keys_from_data: ClassVar[tuple[str, ...]] = ()
    """Required keys that a configuration file may leave out, because `train` takes them from the data."""

    max_integer: ClassVar[int] = 2**63 - 1
    """Largest integer of a key without a limit of its own."""

    @field_validator("*")
    @classmethod
    def _checked(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(cls._checked(each, info) for each in value)
        if (
            isinstance(value, int)
            and abs(value) > cls.max_integer
            and "<" not in _limits(cls, info.field_name)
        ):
            raise ValueError(f"{value} is out of range; it must be at most {cls.max_integer}")
        return Path(expand_path(value)) if isinstance(value, Path) else value

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with changes, validated, as pydantic's is not. Raises UserError."""
        copied = super().model_copy(deep=deep)
        kept = {name: getattr(copied, name) for name in self.model_fields_set}
        with _refused(type(self), type(self).__name__):
            return type(self).model_validate(kept | dict(update or {}))

    copy = model_copy  # type: ignore[assignment, pydantic-field]  # its old name


C = TypeVar("C", bound=Config)


def load_config(cls: type[C], path: Path | str, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply dotted overrides (`train.num_steps=50`) and validate.

    Raises UserError naming the file and the key's path, with the nearest valid name for a typing slip.
    """
    return parse_config(cls, load_values(path, overrides), str(path))


def parse_config(cls: type[C], values: Any, origin: str) -> C:
    """Validate plain values into `cls`; `origin` names their source in the error."""
    if not isinstance(values, dict):
        raise UserError(f"{origin}: expected a mapping of keys, found {type(values).__name__}")
    try:
        text = json.dumps(values)
    except (TypeError, ValueError) as error:  # a date, a value that holds itself
        raise UserError(f"{origin}: {error}") from error
    with _refused(cls, origin):
        # JSON mode: strict about types, yet a path may be written as a string and a tuple as a list.
        return cls.model_validate_json(text)


def dump_config(config: Config, exclude: set[str] | None = None) -> str:
    """The configuration as YAML, every default written out: what a run folder freezes."""
    return dump_yaml(config.model_dump(mode="json", exclude=exclude))


def changed_keys(old: Config, new: Config) -> dict[str, list]:
    """The leaves in which two configurations differ: the old and the new value, by dotted path."""
    return dict(_differences(old.model_dump(mode="json"), new.model_dump(mode="json"), ""))


class Key(NamedTuple):
    """Of a configuration: its dotted path, its default (REQUIRED, FROM_DATA), its choices, its sentence."""

    path: str
    default: str
    choices: tuple
    about: str


def keys_of(cls: type[Config], parent: str = "") -> Iterator[Key]:
    """Every key of a configuration and of those within it; NAME stands for any name."""
    for name, field in cls.model_fields.items():
        path = parent + name
        if inner := _configs_in(field.annotation):
            prefix = f"{path}.NAME." if get_origin(field.annotation) is dict else f"{path}."
            for config in inner:
                of_kind = f"(kind: {config.model_fields['kind'].default}) " if len(inner) > 1 else ""
                for key in keys_of(config, prefix):
                    yield key._replace(about=of_kind + key.about)
            continue
        required = FROM_DATA if name in cls.keys_from_data else REQUIRED
        default = required if field.is_required() else json.dumps(field.default, default=str)
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        yield Key(path, default, choices, " ".join((field.description or "").split()))


def renamed_keys_of(cls: type[Config], parent: str = "") -> Iterator[tuple[str, list[str]]]:
    """Dotted paths of the keys of earlier versions, and of the keys that replace each."""
    for old, names in cls.renamed_keys.items():
        yield parent + old, [n[1:] if n.startswith(".") else parent + n for n in names.split()]
    for name, field in cls.model_fields.items():
        infix = ".NAME." if get_origin(field.annotation) is dict else "."
        for inner in _configs_in(field.annotation):
            yield from renamed_keys_of(inner, f"{parent}{name}{infix}")


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, list]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, [old, new]


@contextmanager
def _refused(cls: type[Config], origin: str) -> Iterator[None]:
    """Raise a ValidationError of the block as a UserError."""
    try:
        yield
    except ValidationError as error:
        raise _refusal(cls, error, origin) from error


def _refusal(cls: type[Config], error: ValidationError, origin: str) -> UserError:
    """A line for each value that is not valid."""
    details = error.errors()
    unknown = [detail["loc"] for detail in details if detail["type"] == "extra_forbidden"]
    new_names = {name for location in unknown for name in _new_names(cls, location)}
    # The new name of a renamed key is missing too, which is the same mistake.
    details = [d for d in details if d["type"] != "missing" or _path(cls, d["loc"]) not in new_names]
    return UserError("\n".join(f"{origin}: {_describe(cls, detail)}" for detail in details))


def _describe(cls: type[Config], detail: ErrorDetails) -> str:
    location = detail["loc"]
    path = _path(cls, location)
    value = detail["input"]
    if isinstance(value, str) and location:
        moved_to = _resolve(cls, location[:-1])[0].moved_values.get((str(location[-1]), value))
        if moved_to:
            return f"{path}: {value} has moved: write {moved_to}"
    match detail["type"]:
        case "extra_forbidden":
            if new_names := _new_names(cls, location):
                return f"key {path!r} was renamed: it is {' and '.join(map(repr, new_names))} now"
            path_of_kind, _, others = _other_kinds(cls, location)
            if kind := next((k for k, each in others.items() if location[-1] in each.model_fields), None):
                return f"unknown key {path!r}; it is one of {path_of_kind} {kind}: set that, or leave it out"
            owner, parents = _resolve(cls, location[:-1])
            section = [".".join([*map(str, parents), name]) for name in owner.model_fields]
            # Every key, and every section that holds one.
            known = {path for key in keys_of(cls) for path in accumulate(key.path.split("."), "{}.{}".format)}
            return f"unknown key {path!r}; {suggest(path, section, sorted(known))}"
        case "union_tag_invalid":
            tags = detail["ctx"]
            return f"key '{path}.kind': {tags['tag']!r} is unknown; the kinds are {tags['expected_tags']}"
        case "missing":
            return f"key {path!r} is required and missing"
        case "value_error":  # ours: the message names the values itself
            return f"{path + ': ' if path else ''}{detail['ctx']['error']}"
        case "tuple_type":
            return f"key {path!r} is a list: write [{detail['input']}]"
        case _:
            where = f"key {path!r}: " if path else ""
            if " and " in (limits := _exceeded_limits(cls, detail)):
                return f"{where}it must be {limits} (got {value!r})"
            return f"{where}{detail['msg']} (got {detail['input']!r}){_way_out(cls, detail)}"


def _way_out(cls: type[Config], detail: ErrorDetails) -> str:
    """Advice for a value that YAML read as another type, or that another kind has."""
    value, kind = detail["input"], detail["type"]
    if kind in ("string_type", "path_type") and isinstance(value, int | float):
        return "; put a text that looks like a number in quotes"
    if kind == "bool_type" and str(value).lower() in ("yes", "no", "on", "off", "y", "n"):
        return "; write true or false"
    if kind == "literal_error":
        path, own, others = _other_kinds(cls, detail["loc"])
        has_value = (k for k, each in others.items() if value in _choices(each, detail["loc"][-1]))
        if other := next(has_value, None):
            return f" with {path} {own}; {value} is one of {path} {other}"
    return ""


def _exceeded_limits(cls: type[Config], detail: ErrorDetails) -> str:
    """The limits of a number that is out of them; empty for another fault."""
    if not detail["type"].startswith(("greater_than", "less_than")):
        return ""
    return _limits(_resolve(cls, detail["loc"][:-1])[0], detail["loc"][-1])


def _other_kinds(
    cls: type[Config], location: Sequence[str | int]
) -> tuple[str, str | int, dict[str, type[Config]]]:
    """Of a key of one of several kinds: the path of `kind`, its value, and the classes of the other values.

    Without any for another key.
    """
    if len(location) >= 3:
        *parents, name, own, _ = location
        field = _resolve(cls, parents)[0].model_fields.get(str(name))
        configs = _configs_in(field.annotation) if field else []
        kinds = {c.model_fields["kind"].default: c for c in configs} if len(configs) > 1 else {}
        if kinds.pop(own, None):
            return f"{_path(cls, location[:-2])}.kind", own, kinds
    return "", "", {}


def _choices(cls: type[Config], key: str | int) -> tuple:
    field = cls.model_fields.get(str(key))
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()


def _limits(cls: type[Config], key: str | int | None) -> str:
    """Limits of a key that is a number, such as `>= 0 and < 1`; empty without any."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    field = cls.model_fields.get(str(key))
    return " and ".join(
        f"{sign} {getattr(limit, name)}"
        for limit in (field.metadata if field else ())
        for name, sign in signs.items()
        if hasattr(limit, name)
    )


def _path(cls: type[Config], location: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in _resolve(cls, location)[1])


def _new_names(cls: type[Config], location: Sequence[str | int]) -> list[str]:
    """The new dotted paths of a key of an earlier version; none for a key that never existed."""
    *parents, name = location
    names = _resolve(cls, parents)[0].renamed_keys.get(str(name), "").split()
    return [name[1:] if name.startswith(".") else _path(cls, [*parents, name]) for name in names]


def _resolve(cls: type[Config], location: Sequence[str | int]) -> tuple[type[Config], list[str | int]]:
    """The configuration class at a location, and the location without the kinds that pydantic inserts.

    In a union of classes with a `kind`, the kind stands behind the union's key.
    """
    keys: list[str | int] = []
    kinds: dict[str | int, type[Config]] = {}
    for part in location:
        if part in kinds:
            cls, kinds = kinds[part], {}
            continue
        keys.append(part)
        if part in cls.model_fields:  # not an index of a list or a key of a mapping
            configs = _configs_in(cls.model_fields[part].annotation)
            kinds = {c.model_fields["kind"].default: c for c in configs} if len(configs) > 1 else {}
            cls = configs[0] if configs else cls
    return cls, keys


def _configs_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Config) else []
    return [found for part in get_args(annotation) for found in _configs_in(part)]
