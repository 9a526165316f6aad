"""Learning rates by pattern: a group each, scaled alike by the schedule."""

import pytest
import torch

from megafusion.checkpoint.folder import complete_checkpoints
from megafusion.errors import UserError
from megafusion.model.transfusion import Transfusion
from megafusion.resilience.attempts import read_attempts
from megafusion.train.open_model import open_checkpoint
from megafusion.train.parts import check_parts
from tests.support.runs import assert_resumes, losses, parsed, start
from tests.support.weights import initialize


def first_updates(values: dict) -> dict[str, torch.Tensor]:
    """How far each weight goes at the first step, which AdamW makes as long as the rate."""
    values["optimizer"] |= {"weight_decay": 0.0, "num_warmup_steps": 0, "gradient_clip": 0.0}
    values["train"] |= {"num_steps": 2}
    run = start(values, stop_after=1)
    model = open_checkpoint(complete_checkpoints(run / "checkpoints")[-1], "model").model
    config = parsed(values)
    before = Transfusion(config.model, config.objective)
    initialize(before, config.model.num_layers, config.seed)
    return {name: (weight - before.weights()[name]).abs().max() for name, weight in model.weights().items()}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_step_is_as_long_as_the_rate_of_its_weight(run_values, stage):
    run_values["optimizer"] |= {"learning_rates": {"*.adapter.*": 6e-3, "blocks.1.*": 3e-4}}
    run_values["parallel"] = {"zero_stage": stage}
    for name, length in first_updates(run_values).items():
        rate = 6e-3 if ".adapter." in name else 3e-4 if name.startswith("blocks.1.") else 3e-3
        assert length == pytest.approx(rate, rel=0.01), name


def test_the_rate_of_all_weights_by_pattern_is_a_run_with_that_rate(run_values, tmp_path):
    run = start(run_values)
    again = run_values | {"out": str(tmp_path / "again")}
    again["optimizer"] = run_values["optimizer"] | {
        "learning_rate": 1.5e-3,
        "final_learning_rate": 7.5e-6,
        "learning_rates": {"*": 3e-3},
    }
    found, expected = losses(start(again)), losses(run)
    assert [line[:4] for line in found] == [line[:4] for line in expected]
    assert [2 * line[4] for line in found] == [line[4] for line in expected]


def test_a_resumed_run_may_change_them(run_values, tmp_path, capsys):
    whole = start(run_values)
    again = run_values | {"out": str(tmp_path / "again")}
    start(again, stop_after=3)
    again["optimizer"] = run_values["optimizer"] | {"learning_rates": {"tail.*": 1e-3}}
    run = start(again)
    assert "resumes with optimizer.learning_rates.tail.* 0.001 instead of None" in capsys.readouterr().err
    assert read_attempts(run)[-1]["changed"] == {"optimizer.learning_rates.tail.*": [None, 1e-3]}
    assert losses(run)[:4] == losses(whole)[:4]
    assert losses(run)[4] != losses(whole)[4]


@pytest.mark.full
def test_they_resume_bit_for_bit(run_values, tmp_path):
    run_values["optimizer"] |= {"learning_rates": {"tail.*": 1e-3}}
    assert_resumes(run_values, tmp_path / "again")


@pytest.mark.parametrize(
    ("rates", "freeze", "message"),
    [
        ({"*.adpter.*": 1e-3}, [], r"learning_rates '\*\.adpter\.\*': no trained weight .*\.adapter\."),
        ({"stem.*": 1e-3}, ["stem.*"], r"'stem\.\*': no trained weight has such a name"),
        (
            {"stem.*": 1e-3, "*.adapter.*": 1e-3},
            [],
            r"'stem\.\*' and '\*\.adapter\.\*' match stem\.",
        ),
    ],
)
def test_patterns_that_are_not_clear_are_refused(run_values, rates, freeze, message):
    run_values["optimizer"] |= {"learning_rates": rates}
    run_values["train"] |= {"freeze": freeze}
    with pytest.raises(UserError, match=message):
        check_parts(parsed(run_values))
