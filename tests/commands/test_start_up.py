"""Commands that only read files start without importing torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.small import ROOT

HEAVY = {
    "diffusers.models",
    "tensorboard",
    "torch",
    "torch._inductor.compile_fx",
    "deepspeed",
    "diffusers",
    "gradio",
    "scipy",
    "pyarrow",
    "tokenizers",
    "webdataset",
}
RUN_COMMAND = """
import sys
from megafusion.cli import main
try:
    main()
except SystemExit as end:
    status = end.code or 0
print("imported:", *sorted(set(sys.modules) & set(sys.argv[0].split(","))))
sys.exit(status)
"""


def heavy_imports(*arguments: str, status: int = 0) -> set[str]:
    """The heavy packages that a command imports in a process of its own."""
    script = f"import sys; sys.argv = {[','.join(HEAVY), *arguments]!r}\n{RUN_COMMAND}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return set(done.stdout.splitlines()[-1].removeprefix("imported:").split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["keys", "train"],
        ["keys", "preprocess"],
        ["keys", "train-tokenizer"],
        ["keys", "train-vae"],
        ["keys", "evaluate"],
        ["keys", "sweep"],
        *[
            [command, "--help"]
            for command in (
                "train",
                "preprocess",
                "train-tokenizer",
                "train-vae",
                "generate",
                "evaluate",
                "launch",
                "plan",
                "serve",
                "sweep",
            )
        ],
        ["import", "--help"],
        ["export", "--help"],
    ],
    ids=" ".join,
)
def test_help_and_keys_import_nothing_heavy(arguments):
    assert heavy_imports(*arguments) == set()


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("train", "quickstart.yaml"),
        ("preprocess", "preprocess/quickstart.yaml"),
        ("train-tokenizer", "tokenizer/emoji.yaml"),
        ("train-vae", "vae/emoji.yaml"),
        ("launch", "quickstart.yaml"),
    ],
)
def test_an_invalid_configuration_is_refused_before_anything_heavy_is_imported(command, config):
    site = ["--site", "local-test"] if command == "launch" else []
    assert heavy_imports(command, f"configs/{config}", "zzz=1", *site, status=2) == set()


def test_an_evaluation_with_an_unknown_key_or_no_suite_is_refused_before_anything_heavy_is_imported():
    assert heavy_imports("evaluate", "no-run", "--suite", "captions", "zzz=1", status=2) == set()
    assert heavy_imports("evaluate", "no-run", status=2) == set()


@pytest.mark.parametrize(
    "given",
    [["--image", "no.png"], ["--interleave", "@no.png"], ["--prompt", " "], ["--prompt=x", "--size=6"]],
)
def test_what_cannot_be_generated_is_refused_before_anything_heavy_is_imported(given):
    assert heavy_imports("generate", "no-run", *given, status=2) == set()


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "no-run", "--prompt", "x"],
        ["evaluate", "no-run", "--suite", "captions"],
        ["export", "no-run", "no-out", "--to", "hf"],
        ["export", "no-run", "no-out", "--to", "pipeline", "--dtype", "float16"],
        ["serve", "no-run"],
    ],
    ids=" ".join,
)
def test_a_path_without_a_model_is_refused_before_anything_heavy_is_imported(command):
    assert heavy_imports(*command, status=2) == set()


def test_a_sweep_is_checked_before_anything_heavy_is_imported(tmp_path):
    path = tmp_path / "sweep.yaml"
    values = {"base": "configs/quickstart.yaml", "out": str(tmp_path / "out"), "grid": {"seed": [0, 1]}}
    path.write_text(yaml.safe_dump(values))
    assert heavy_imports("sweep", str(path), "runs.a=[zzz=1]", status=2) == set()
    model = "overrides=['model={vocab_size: 2048, image_sizes: [[64, 64]]}']"
    assert heavy_imports("sweep", str(path), model, "--dry-run") == set()


def test_a_plan_imports_nothing_heavy():
    assert heavy_imports("plan", "configs/7b.yaml", "--gpus", "8", "--gpu", "h200") == set()


def test_status_and_a_dry_run_of_launch_import_nothing_heavy(run_values, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_values))
    run = Path(run_values["out"])
    assert heavy_imports("launch", str(config), "--site", "local-test", "--gpu", "h100", "--dry-run") == set()
    run.mkdir()
    (run / "config.yaml").write_text(config.read_text())
    assert heavy_imports("status", str(run)) == set()


def test_training_imports_only_what_it_uses(run_values, tmp_path):
    """Neither diffusers' models, nor what they import, nor a tracker that is not asked for, nor Inductor, for
    which DeepSpeed's Muon asks."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_values | {"telemetry": {"trackers": []}}))
    found = heavy_imports("train", str(config), "--stop-after", "1")
    assert found == {"torch", "deepspeed", "diffusers"}


def test_a_list_of_checkpoints_imports_nothing_heavy(run_values, tmp_path):
    run = Path(run_values["out"])
    (run / "checkpoints/step-00000001").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(run_values))
    assert heavy_imports("checkpoint", "show", str(run)) == set()
