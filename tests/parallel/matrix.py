"""The same run at every topology, against one device; `make test-parallel` runs all cases.

    python -m tests.parallel.matrix [NAME ...]

Ends with a table, and writes runs/parallel.json.
"""

import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.parallel.cases import (
    Outcome,
    loss_error,
    norm_error,
    parallel_steps,
    parameter_error,
    plain_steps,
)
from tests.support.cases import chosen_cases
from tests.support.quantized import QUANTIZED_MODEL, make_vq
from tests.support.small import make_shards, make_vae, small_run
from tests.support.workers import WorkersFailed, run_workers

NUM_STEPS = 20
MAX_LOSS_ERROR, MAX_NORM_ERROR, MAX_PARAMETER_ERROR = 1e-5, 1e-4, 1e-4
MAX_BF16_LOSS_ERROR = 1e-2


Inputs = tuple[Path, Path]


@dataclass(frozen=True)
class Case:
    """A topology, with options that must not change a run's numbers."""

    name: str
    world: int
    parallel: dict
    adapter: str = "linear"
    train: dict = field(default_factory=dict)
    recipe: dict[str, dict] = field(default_factory=dict)
    """Options by section that one device has, too."""
    quantized: bool = False
    """Images are codes of a VQModel, predicted as text is."""

    @property
    def is_exact(self) -> bool:
        """Whether the case is in float32."""
        return self.train.get("precision", "fp32") == "fp32"

    def values(self, shards: Path, vae: Path, out: Path) -> dict:
        """Plain values of the run."""
        values = small_run(shards, vae, out)
        values["data"]["num_streams"] = 8
        # Fewer key-value heads than heads, and image slots that four ranks do not divide.
        values["data"]["images_per_row"] = 3
        values["model"] |= {"num_layers": 4, "num_heads": 8, "num_kv_heads": 4}
        values["model"] |= {"adapter": self.adapter, "unet_channels": 8}
        values["model"] |= QUANTIZED_MODEL if self.quantized else {}
        # Half the micro-batches with a U-Net: each all-reduces about a hundred small gradients.
        rows = 4 if self.adapter == "unet" else 8
        values["train"] |= {"num_steps": NUM_STEPS, "global_batch_size": rows, "micro_batch_size": 2}
        values["train"] |= self.train
        for section, options in self.recipe.items():
            values[section] = values.get(section, {}) | options
        return values | {"parallel": self.parallel}


TEXT_MODEL = {
    "head_dim": 8,
    "attention_bias": True,
    "qk_norm": True,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64},
}
"""Keys that the text models of hub/ need and that are not defaults: in all cases with a linear adapter."""

TOPOLOGIES = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "ulysses2": (2, {"ulysses": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-dp2": (4, {"tensor": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "pp2-dp2": (4, {"pipeline": 2}),
    "tp2-pp2-dp2": (8, {"tensor": 2, "pipeline": 2}),
}
"""World size and degrees by name. `make test` runs each with one ZeRO stage and one adapter."""

MIXED = {
    "ulysses2-tp2": (4, {"ulysses": 2, "tensor": 2}),
    "ulysses2-tp2-sp": (4, {"ulysses": 2, "tensor": 2, "sequence": True}),
    "ulysses2-pp2": (4, {"ulysses": 2, "pipeline": 2}),
    "tp2-sp-pp2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "tp4": (4, {"tensor": 4}),
    "pp4": (4, {"pipeline": 4}),
}

VIRTUAL = {
    "pp2-v2": (2, {"pipeline": 2, "virtual_stages": 2}),
    "pp2-v2-dp2": (4, {"pipeline": 2, "virtual_stages": 2}),
    "tp2-pp2-v2": (4, {"tensor": 2, "pipeline": 2, "virtual_stages": 2}),
    "tp2-sp-pp2-v2": (4, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_stages": 2}),
    "ulysses2-pp2-v2": (4, {"ulysses": 2, "pipeline": 2, "virtual_stages": 2}),
}
"""Topologies of interleaved stages."""

RECIPES = {
    "tp2-sp": TOPOLOGIES["tp2-sp"],
    "pp2": TOPOLOGIES["pp2"],
    "ulysses2": TOPOLOGIES["ulysses2"],
    "dp2-zero1": (2, {"zero_stage": 1}),
    "dp2-zero3": (2, {"zero_stage": 3}),
    "tp2-pp2": TOPOLOGIES["tp2-pp2"],
    "pp2-v2": VIRTUAL["pp2-v2"],
}
"""Topologies of every recipe that is not the paper's."""

FLOW = {"velocity": ["pp2"], "epsilon": ["ulysses2", "tp2-pp2"], "sample": list(RECIPES)}
"""Topologies by prediction of rectified flow; sample has a weight of its own for every image's loss."""

MODALITY_WEIGHTS = {"feed_forward": ["tp2-sp"], "all": list(RECIPES)}
"""Topologies by which weights image patches have of their own."""

IMAGE_ROPE = {"": list(RECIPES), "-unet": ["tp2-sp", "pp2"]}
"""Topologies of rotary positions by row and column, by adapter."""

CLEAN_CONTEXT = {"": list(RECIPES), "-unet": ["tp2-sp", "pp2", "ulysses2", "dp2-zero3"]}
"""Topologies of clean context, by adapter; of flow matching and weights for patches with it, all recipes'."""

ALIGNED = {"tp2": TOPOLOGIES["tp2"], **{n: t for n, t in RECIPES.items() if "pipeline" not in t[1]}}
"""Topologies of alignment with features, which a pipeline does not serve."""

FROZEN = ["stem.*", "blocks.[12].*", "*.out.weight"]
"""Patterns that freeze the beginning of the model, all of two blocks and a part of the others."""

FROZEN_TOPOLOGIES = {
    "one": (1, {}),
    "dp2-zero0": (2, {"zero_stage": 0}),
    "dp2-zero2": (2, {"zero_stage": 2}),
    "dp2-zero1-offload": (2, {"zero_stage": 1, "offload_optimizer": True}),
    "dp2-zero3": (2, {"zero_stage": 3}),
    "tp2": TOPOLOGIES["tp2"],
    "tp2-sp": TOPOLOGIES["tp2-sp"],
    "ulysses2": TOPOLOGIES["ulysses2"],
    "pp2": TOPOLOGIES["pp2"],
    "pp2-v2": VIRTUAL["pp2-v2"],
}


TEXT_PATH = ["stem.embedding.*", "blocks.*", "tail.[nh]*"]
"""Patterns that freeze all but the image adapters: no tensor rank but the first counts a trained weight."""

ADAPTER_TOPOLOGIES = {
    "tp2-zero0": (2, {"tensor": 2, "zero_stage": 0}),
    "tp2": (2, {"tensor": 2}),
    "tp2-zero3": (2, {"tensor": 2, "zero_stage": 3}),
    "tp2-pp2": TOPOLOGIES["tp2-pp2"],
}

LORA = {"rank": 3, "alpha": 12.0}
LORA_TOPOLOGIES = FROZEN_TOPOLOGIES | {
    "dp2-zero1": (2, {"zero_stage": 1}),
    "tp2-pp2": TOPOLOGIES["tp2-pp2"],
    "tp2-sp-zero3": (4, {"tensor": 2, "sequence": True, "zero_stage": 3}),
    "ulysses2-tp2-sp": MIXED["ulysses2-tp2-sp"],
}


QUANTIZED = {"tp2": TOPOLOGIES["tp2"], **RECIPES}
"""Topologies of the quantized baseline, with norms of queries and keys and behind sublayers."""


def make_cases() -> list[Case]:
    """All cases."""
    cases = [Case("one", 1, {}), Case("one-unet", 1, {}, "unet")]
    for name, (world, degrees) in TOPOLOGIES.items():
        for adapter in ("linear", "unet"):
            for stage in (0, 1) if "pipeline" in degrees else (0, 1, 2, 3):
                cases.append(
                    Case(f"{name}-zero{stage}-{adapter}", world, {**degrees, "zero_stage": stage}, adapter)
                )
    cases += [Case(f"{name}-unet", world, degrees, "unet") for name, (world, degrees) in MIXED.items()]
    for name, (world, degrees) in VIRTUAL.items():
        for adapter in ("linear", "unet"):
            # As many micro-batches of each rank as stages, which a U-Net's fewer rows are not with two ranks.
            rows = {"train": {"global_batch_size": 8}} if (name, adapter) == ("pp2-v2-dp2", "unet") else {}
            cases.append(Case(f"{name}-{adapter}", world, degrees, adapter, recipe=rows))
    degrees = VIRTUAL["pp2-v2"][1]
    cases.append(Case("pp2-v2-zero0", 2, degrees | {"zero_stage": 0}))
    cases.append(Case("pp2-v2-bf16", 2, degrees, train={"precision": "bf16"}))
    cases.append(Case("pp2-v2-unet-bf16", 2, degrees, "unet", {"precision": "bf16"}))
    cases.append(Case("pp2-v2-recompute-full", 2, degrees, "unet", {"recompute": "full"}))
    deeper = {"model": {"num_layers": 8}}
    cases.append(Case("pp4-v2", 4, {"pipeline": 4, "virtual_stages": 2}, recipe=deeper))
    # All of the model's first virtual stage.
    frozen = {"train": {"freeze": ["stem.*", "blocks.0.*"]}}
    cases.append(Case("pp2-v2-frozen-start", 2, degrees, recipe=frozen))
    cases.append(Case("dp4", 4, {}))
    for what in ("selective", "full"):
        cases.append(Case(f"tp2-sp-recompute-{what}", 2, TOPOLOGIES["tp2-sp"][1], train={"recompute": what}))
        cases.append(Case(f"pp2-recompute-{what}", 2, {"pipeline": 2}, "unet", {"recompute": what}))
        cases.append(Case(f"ulysses2-recompute-{what}", 2, {"ulysses": 2}, train={"recompute": what}))
        cases.append(Case(f"dp2-zero3-recompute-{what}", 2, {"zero_stage": 3}, train={"recompute": what}))
    if shutil.which("g++"):
        cases.append(Case("one-compile", 1, {}, train={"compile": True}))
        compiled = {"compile": True, "recompute": "selective"}
        cases.append(Case("tp2-sp-compile-selective", 2, TOPOLOGIES["tp2-sp"][1], train=compiled))
        cases.append(Case("dp2-zero3-compile-selective", 2, {"zero_stage": 3}, train=compiled))
        frozen = {"train": {"freeze": FROZEN}}
        cases.append(Case("dp2-zero3-compile-frozen", 2, {"zero_stage": 3}, train=compiled, recipe=frozen))
    for stage in (1, 2, 3):
        degrees = {"zero_stage": stage, "offload_optimizer": True}
        cases.append(Case(f"dp2-zero{stage}-offload", 2, degrees))
    bf16 = {"precision": "bf16"}
    for name in ("tp2-sp", "ulysses2", "pp2", "tp2-pp2", "dp2"):
        world, degrees = TOPOLOGIES[name]
        cases.append(Case(f"{name}-bf16", world, degrees, train=bf16))
    cases += [Case(f"dp2-zero{stage}-bf16", 2, {"zero_stage": stage}, train=bf16) for stage in (2, 3)]
    cases += [Case("one-bf16", 1, {}, train=bf16), Case("pp2-unet-bf16", 2, {"pipeline": 2}, "unet", bf16)]
    for prediction, names in FLOW.items():
        # Rounding decides the sign of a gradient near 0, and so a whole step of AdamW with a small epsilon.
        recipe = {"objective": {"noise_process": {"kind": "flow", "prediction_type": prediction}}}
        recipe |= {"optimizer": {"epsilon": 1e-6}}
        cases += [Case(f"{name}-flow-{prediction}", *RECIPES[name], recipe=recipe) for name in names]
    for weights, names in MODALITY_WEIGHTS.items():
        recipe = {"model": {"modality_weights": weights}}
        cases += [Case(f"{name}-modality-{weights}", *RECIPES[name], recipe=recipe) for name in names]
    causal = {"model": {"image_attention": "causal"}}
    cases += [Case(f"{name}-causal", *RECIPES[name], recipe=causal) for name in ("tp2-sp", "pp2")]
    for adapter, names in IMAGE_ROPE.items():
        recipe = {"model": {"image_rope": "2d"}}
        kind = adapter.removeprefix("-") or "linear"
        cases += [Case(f"{name}-rope-2d{adapter}", *RECIPES[name], kind, recipe=recipe) for name in names]
    clean = {"data": {"clean_context": True, "sequence_length": 128}}  # three images twice, as three once
    for adapter, names in CLEAN_CONTEXT.items():
        kind = adapter.removeprefix("-") or "linear"
        cases += [Case(f"{name}-clean{adapter}", *RECIPES[name], kind, recipe=clean) for name in names]
    recipe = {"objective": {"noise_process": {"kind": "flow"}}, "model": {"modality_weights": "all"}}
    cases += [Case(f"{name}-clean-flow-modality", *RECIPES[name], recipe=clean | recipe) for name in RECIPES]
    alignment = {"model": "none", "feature_size": 16, "layer": 2, "weight": 3.0}
    recipe = {"objective": {"alignment": alignment}}
    cases += [Case(f"{name}-aligned", *t, recipe=recipe) for name, t in ALIGNED.items()]
    for name, (world, degrees) in FROZEN_TOPOLOGIES.items():
        cases.append(Case(f"{name}-frozen", world, degrees, recipe={"train": {"freeze": FROZEN}}))
    for stage in (1, 2, 3):
        degrees = {"zero_stage": stage}
        frozen = {"train": {"freeze": FROZEN}}
        cases.append(Case(f"dp2-zero{stage}-frozen-bf16", 2, degrees, train=bf16, recipe=frozen))
    adapters = {"train": {"freeze": TEXT_PATH}}
    for name, (world, degrees) in ADAPTER_TOPOLOGIES.items():
        cases.append(Case(f"{name}-adapters", world, degrees, recipe=adapters))
    cases.append(Case("tp2-adapters-bf16", 2, {"tensor": 2}, train=bf16, recipe=adapters))
    for name, (world, degrees) in LORA_TOPOLOGIES.items():
        cases.append(Case(f"{name}-lora", world, degrees, recipe={"train": {"lora": LORA}}))
    recipe = {"objective": {"z_loss": 0.01}}  # a thousand times Chameleon's, so that it is seen
    cases += [Case(f"{name}-quantized", *t, recipe=recipe, quantized=True) for name, t in QUANTIZED.items()]
    return [
        case
        if case.adapter == "unet"
        else replace(case, recipe=case.recipe | {"model": case.recipe.get("model", {}) | model})
        for case in cases
        for model in [TEXT_MODEL | {"tie_embeddings": "pipeline" not in case.parallel}]
    ]


CASES = {case.name: case for case in make_cases()}


@dataclass
class Result:
    """A line of runs/parallel.json."""

    name: str
    world: int
    max_loss_error: float
    max_norm_error: float
    max_parameter_error: float
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the errors are within the limits; NaN is not."""
        if not CASES[self.name].is_exact:
            return self.max_loss_error < MAX_BF16_LOSS_ERROR
        return (
            self.max_loss_error < MAX_LOSS_ERROR
            and self.max_norm_error < MAX_NORM_ERROR
            and self.max_parameter_error < MAX_PARAMETER_ERROR
        )


class OneDevice:
    """The plain model's steps, computed once for each adapter and recipe.

    inputs: shards and the autoencoder that made them; quantized: the same of a VQModel, for cases of codes.
    """

    def __init__(self, inputs: Inputs, quantized: Inputs, out: Path, num_steps: int = NUM_STEPS):
        self.inputs, self.out, self.num_steps, self.outcomes = (inputs, quantized), out, num_steps, {}

    def of(self, case: Case) -> Outcome:
        """The outcome that every topology must reproduce."""
        key = (case.adapter, json.dumps(case.recipe), case.quantized)
        if key not in self.outcomes:
            values = self._values(replace(case, parallel={}, train={}))
            (self.outcomes[key],) = run_workers(plain_steps, 1, values, self.num_steps)
        return self.outcomes[key]

    def compare(self, case: Case) -> Result:
        """Run a case and measure its errors against one device."""
        plain, begin = self.of(case), time.monotonic()
        values = self._values(case)
        outcomes = run_workers(parallel_steps, case.world, values, self.num_steps, timeout=240)
        seconds = time.monotonic() - begin
        loss = max(loss_error(outcome, plain) for outcome in outcomes)
        norm = max(norm_error(outcome, plain) for outcome in outcomes)
        return Result(case.name, case.world, loss, norm, parameter_error(outcomes, plain), seconds)

    def _values(self, case: Case) -> dict:
        return case.values(*self.inputs[case.quantized], self.out)


def main(names: list[str]) -> int:
    """Run these cases; returns the number of failures."""
    results, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        vae, vq = make_vae(Path(folder) / "vae"), make_vq(Path(folder) / "vq")
        inputs = make_shards(Path(folder) / "shards", vae), vae
        one = OneDevice(inputs, (make_shards(Path(folder) / "codes", vq), vq), Path(folder) / "run")
        for name in track(names, description="topologies", console=Console(stderr=True)):
            try:
                results.append(one.compare(CASES[name]))
            except WorkersFailed as error:
                failed.append(f"{name}: {error}")
            _write([asdict(result) for result in results], failed)
    table = Table("case", "ranks", "loss error", "norm error", "weight error", "seconds", "")
    for r in results:
        errors = (f"{e:.1e}" for e in (r.max_loss_error, r.max_norm_error, r.max_parameter_error))
        table.add_row(r.name, str(r.world), *errors, f"{r.seconds:.1f}", "" if r.holds else "TOO FAR")
    Console().print(table, *failed, sep="\n")
    return len(failed) + sum(not r.holds for r in results)


def _write(cases: list[dict], failed: list[str]) -> None:
    """The results so far."""
    Path("runs").mkdir(exist_ok=True)
    Path("runs/parallel.json").write_text(json.dumps({"cases": cases, "failed": failed}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(min(1, main(chosen_cases(__doc__, CASES))))
