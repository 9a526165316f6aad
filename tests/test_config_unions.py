"""A key that takes one of several configurations, as objective.noise_process does."""

from typing import Annotated, Literal

import pytest
from pydantic import Discriminator, Tag

from megafusion.config import Config, keys_of, parse_config
from megafusion.errors import UserError
from megafusion.objective.ddpm import DDPMConfig


class OtherConfig(Config):
    """Another kind."""

    kind: Literal["other"] = "other"
    """Kind."""
    shift: float = 1.0
    """Shift."""


def _kind(value):
    return value.get("kind", "ddpm") if isinstance(value, dict) else value.kind


class Owner(Config):
    """Owner of either kind."""

    process: Annotated[
        Annotated[DDPMConfig, Tag("ddpm")] | Annotated[OtherConfig, Tag("other")], Discriminator(_kind)
    ] = DDPMConfig()


def test_the_kind_may_be_omitted():
    assert parse_config(Owner, {"process": {"num_train_timesteps": 7}}, "f").process.num_train_timesteps == 7
    assert parse_config(Owner, {"process": {"kind": "other"}}, "f").process == OtherConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "other", "shfit": 2}, r"unknown key 'process.shfit'; did you mean 'process.shift'\?"),
        ({"shift": 2.0}, r"unknown key 'process.shift'; it is one of process.kind other: set that, or leave"),
        (
            {"kind": "other", "prediction_type": "epsilon"},
            r"unknown key 'process.prediction_type'; it is one of process.kind ddpm: set that",
        ),
        ({"kind": "edm"}, r"key 'process.kind': 'edm' is unknown; the kinds are 'ddpm', 'other'"),
        ({"num_steps": 7}, r"key 'process.num_steps' was renamed: it is 'process.num_train_timesteps' now"),
    ],
)
def test_messages_name_the_key_of_the_kind(values, message):
    with pytest.raises(UserError, match=message):
        parse_config(Owner, {"process": values}, "f")


def test_the_keys_of_every_kind_are_listed():
    assert {"process.num_train_timesteps", "process.shift"} <= {key.path for key in keys_of(Owner)}
