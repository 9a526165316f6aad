"""Copies of a configuration with changes: as valid as any other, or refused."""

import copy

import pytest

from megafusion.config import Config, changed_keys
from megafusion.errors import UserError
from megafusion.generate.events import ImageStep
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from tests.support.generation import make_pipeline

SAMPLING = SamplingConfig(sampler="dpm++", num_inference_steps=20)


@pytest.mark.parametrize("method", [SamplingConfig.model_copy, SamplingConfig.copy])
@pytest.mark.parametrize(
    ("update", "message"),
    [
        (
            {"sampler": "eular"},
            r"sampler: eular is unknown; did you mean 'euler' \(kind ddpm\)\? The samplers are ddim, ",
        ),
        ({"smapler": "ddim"}, r"unknown key 'smapler'; did you mean 'sampler'"),
        ({"num_steps": 5}, r"'num_steps' was renamed: it is 'num_inference_steps' now"),
        ({"num_inference_steps": 0}, r"num_inference_steps"),
        ({"num_inference_steps": "20"}, r"valid integer"),
        ({"max_new_tokens": 10**30}, r"max_new_tokens"),
        ({"guidance_scale": float("nan")}, r"finite number"),
    ],
)
def test_a_copy_with_a_value_that_is_not_valid_is_refused(method, update, message):
    with pytest.raises(UserError, match=message):
        method(SAMPLING, update=update)


def every_config() -> list[type[Config]]:
    def below(cls: type[Config]) -> list[type[Config]]:
        return [cls, *(each for child in cls.__subclasses__() for each in below(child))]

    return [each for each in below(Config) if each.__module__.startswith(("megafusion", "data_prep"))]


@pytest.mark.parametrize("cls", every_config(), ids=lambda cls: cls.__name__)
def test_every_constructor_refuses_as_a_file_is_refused(cls):
    with pytest.raises(UserError, match=rf"(?s)^{cls.__name__}: .*unknown key 'no_such_key'"):
        cls(no_such_key=1)


def test_a_constructor_names_the_key_and_keeps_what_is_within():
    with pytest.raises(
        UserError, match=r"^SamplingConfig: sampler: eular is unknown; did you mean 'euler' \(kind ddpm\)\?"
    ):
        SamplingConfig(sampler="eular")
    with pytest.raises(
        UserError, match=r"^ObjectiveConfig: key 'noise_process\.num_train_timesteps': it must"
    ):
        ObjectiveConfig(noise_process={"num_train_timesteps": 0})
    assert ObjectiveConfig(noise_process={"num_train_timesteps": 5}).noise_process.num_train_timesteps == 5


def test_a_copy_within_a_copy_is_validated_and_checked_as_a_whole(run_config):
    assert run_config.model_copy() == run_config
    assert run_config.model_copy(deep=True) == copy.deepcopy(run_config) == run_config
    changed = run_config.model_copy(update={"sampling": SAMPLING})
    assert set(changed_keys(run_config, changed)) == {
        f"sampling.{key}" for key in ("sampler", "num_inference_steps", "max_new_tokens")
    }
    with pytest.raises(UserError, match="sampling"):
        run_config.model_copy(update={"sampling": {"sampler": "eular"}})
    with pytest.raises(UserError, match=r"data\.sequence_length"):  # checked against the model's images
        run_config.model_copy(update={"data": run_config.data.model_copy(update={"sequence_length": 5})})
    process = ObjectiveConfig().noise_process
    with pytest.raises(UserError, match="beta_schedule linear"):
        process.model_copy(update={"beta_schedule": "linear", "num_train_timesteps": 10_000})


def test_a_changed_copy_draws_with_the_change(tokenizer, codec, run_config):
    pipeline = make_pipeline(run_config, tokenizer, codec, num_steps=2)
    asked = pipeline.config.sampling.model_copy(update={"sampler": "dpm++", "num_inference_steps": 3})
    done = []

    def note(event):
        if isinstance(event, ImageStep):
            done.append((event.state.step, event.state.num_steps))

    pipeline.draw(["x"], sampling=asked, callback=note)
    assert done == [(1, 3), (2, 3), (3, 3)]
