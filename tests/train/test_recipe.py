"""Choices of the recipe that do not go together are refused with both keys, by a process without torch."""

import subprocess
import sys

import pytest

from megafusion.errors import UserError
from tests.support.quantized import QUANTIZED_MODEL
from tests.support.runs import parsed
from tests.support.small import ROOT

PROCESS = "objective.noise_process"


@pytest.mark.parametrize(
    ("process", "sampling", "message"),
    [
        ({"kind": "flow"}, {"sampler": "ddim"}, f"sampling.sampler ddim does not sample {PROCESS}.kind flow"),
        ({}, {"sampler": "heun"}, f"sampling.sampler heun does not sample {PROCESS}.kind ddpm; use one of"),
        (
            {"kind": "flow", "prediction_type": "v_prediction"},
            {},
            f"with {PROCESS}.kind flow; v_prediction is one of {PROCESS}.kind ddpm",
        ),
        (
            {"prediction_type": "sample"},
            {},
            f"with {PROCESS}.kind ddpm; sample is one of {PROCESS}.kind flow",
        ),
        ({"t_distribution": "uniform"}, {}, f"t_distribution'; it is one of {PROCESS}.kind flow: set that"),
    ],
)
def test_what_another_noise_process_has_is_refused(run_values, process, sampling, message):
    run_values["sampling"] = sampling
    with pytest.raises(UserError, match=message):
        parsed(run_values | {"objective": {"noise_process": process}})


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("data", {"t_per": "document"}, r"data.t_per document with model.codebook_size \d+: .* leave one of"),
        (
            "model",
            {"modality_weights": "all"},
            "modality_weights all: is for images that are latents; with co",
        ),
        ("model", {"image_rope": "2d"}, "image_rope 2d: is for images that are latents; with codebook_size"),
    ],
)
def test_what_is_for_latents_is_refused_with_a_codebook(run_values, section, changes, message):
    run_values["model"] |= QUANTIZED_MODEL
    parsed(run_values)
    run_values[section] |= changes
    with pytest.raises(UserError, match=message):
        parsed(run_values)


def test_the_sweep_of_choices_has_runs_that_are_valid():
    code = (
        "import sys, pathlib\n"
        "from megafusion.sweep.config import load_sweep\n"
        "from megafusion.config import load_config\n"
        "from megafusion.train.config import RunConfig\n"
        "sweep = load_sweep(pathlib.Path('configs/sweeps/recipes.yaml'))\n"
        "configs = [load_config(RunConfig, sweep.base, [*sweep.overrides, *arm.overrides])"
        " for arm in sweep.runs.values()]\n"
        "assert len({each.model_dump_json() for each in configs}) == len(configs) > 5\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
