"""Configuration classes of several kinds under one key, and keys of earlier versions."""

from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from megafusion.config import Config, keys_of, parse_config
from megafusion.errors import UserError


class Circle(Config):
    """One kind."""

    renamed_keys: ClassVar[dict[str, str]] = {"size": "radius"}

    kind: Literal["circle"] = "circle"
    """A circle."""
    radius: int = 1
    """Its radius."""


class Square(Config):
    """Another kind."""

    kind: Literal["square"] = "square"
    """A square."""
    side: int = 1
    """Its side."""


class Drawing(Config):
    """A configuration with a shape of either kind."""

    shape: Annotated[Circle | Square, Field(discriminator="kind")] = Circle()
    """The shape."""


def test_the_kind_selects_the_class():
    drawing = parse_config(Drawing, {"shape": {"kind": "square", "side": 3}}, "a.yaml")
    assert drawing.shape == Square(side=3)
    assert parse_config(Drawing, {}, "a.yaml").shape == Circle()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"kind": "square", "sidde": 2}, r"unknown key 'shape\.sidde'; did you mean 'shape\.side'\?"),
        ({"kind": "square", "radius": 2}, r"unknown key 'shape\.radius'; it is one of shape\.kind circle"),
        ({"kind": "circle", "radius": "x"}, r"key 'shape\.radius': Input should be a valid integer"),
        ({"kind": "circle", "size": 2}, r"key 'shape\.size' was renamed: it is 'shape\.radius' now"),
        ({"kind": "cube"}, r"key 'shape\.kind': 'cube' is unknown; the kinds are 'circle', 'square'"),
    ],
)
def test_messages_name_the_key_without_its_kind(shape, message):
    with pytest.raises(UserError, match=message):
        parse_config(Drawing, {"shape": shape}, "a.yaml")


def test_the_keys_of_every_kind_are_listed():
    paths = [key.path for key in keys_of(Drawing)]
    assert paths == ["shape.kind", "shape.radius", "shape.kind", "shape.side"]
