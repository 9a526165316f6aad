"""Parameters, FLOPs and stages by formula are those of the real model."""

import math
from dataclasses import replace
from itertools import chain, product

import pytest
import torch

from megafusion.config import load_config
from megafusion.model.lora import add_lora
from megafusion.model.transfusion import Transfusion
from megafusion.model.wrapper import canonical_name
from megafusion.parallel.balance import layer_flops
from megafusion.parallel.partition import virtual_stage_blocks
from megafusion.plan.adapters import adapter_layers, num_features, num_flops
from megafusion.plan.job import matrix_weights, token_flops, whole_weights
from megafusion.plan.rows import row_statistics
from megafusion.train.config import RunConfig
from tests.support.small import ROOT

CONFIGS = ["quickstart.yaml", "7b.yaml", "baselines/7b-unet-8x8.yaml"]
QUANTIZED = "baselines/quantized-quickstart.yaml"
OVERRIDES: list[tuple[str, ...]] = [
    (),
    ("model.modality_weights=feed_forward",),
    ("model.qk_norm=true", "model.attention_bias=true", "model.modality_weights=all"),
]


def configuration(name: str, *overrides: str) -> RunConfig:
    return load_config(RunConfig, ROOT / "configs" / name, overrides)


@pytest.mark.parametrize(("name", "overrides"), [*product(CONFIGS, OVERRIDES), (QUANTIZED, ())])
def test_parameters_are_those_of_the_model(name, overrides):
    config = configuration(name, "model.num_layers=2", *overrides)
    with torch.device("meta"):
        model = Transfusion(config.model, config.objective)
    by_part = dict.fromkeys(("blocks", "embedding", "head", "adapter"), 0)
    for parameter_name, parameter in model.named_parameters():
        parts = parameter_name.split(".")
        part = "blocks" if parts[0] == "blocks" else parts[1]
        by_part["head" if part == "norm" else part] += parameter.numel()
    assert whole_weights(config.model) == by_part
    job = config.job(1)
    assert job.num_weights(0) == sum(by_part.values())
    tensors = job.tensors(0)
    assert sorted(tensors.values()) == sorted(parameter.numel() for parameter in model.parameters())
    own = {name: numbers for name, numbers in tensors.items() if ".adapter." not in name}
    assert own == {
        name: parameter.numel() for name, parameter in model.named_parameters() if ".adapter." not in name
    }


def test_trained_parameters_are_those_that_are_not_frozen():
    given = "train.init_from=runs/before"
    frozen = configuration("1.4b.yaml", given, "train.freeze=[blocks.*, stem.*]").job(1)
    model = frozen.model
    up = sum(sum(layer.tensors) for layer in frozen.adapter.up)
    assert frozen.num_trained(0) == model.hidden_size * (model.vocab_size + 1) + up
    config = configuration("1.4b.yaml", given, "model.num_layers=2", "train.lora.rank=8")
    with torch.device("meta"):
        adapted = add_lora(Transfusion(config.model, config.objective), config.train.lora)
    sizes = {canonical_name(name): each.numel() for name, each in adapted.named_parameters()}
    lora = {name: numbers for name, numbers in sizes.items() if config.train.trains(name)}
    job = config.job(1)
    assert {name: job.tensors(0)[name] for name in lora} == lora
    assert job.num_trained(0) == sum(lora.values()) > 0
    assert job.num_weights(0) == sum(sizes.values())


CLEAN = ("data.clean_context=true", "data.image_first_max_t=1")
FLOPS = [*((name, ()) for name in [*CONFIGS, QUANTIZED]), ("baselines/7b-unet-8x8.yaml", CLEAN)]


@pytest.mark.parametrize(("name", "overrides"), FLOPS)
def test_flops_and_stages_are_those_that_pytorch_counts(name, overrides):
    config = configuration(name, *overrides)
    counted = layer_flops(config.model, config.sequence_shape)
    model, job = config.model, config.job(1)
    length, slots = job.sequence_length, job.images_per_row
    dense = 4 * length**2 * model.num_heads * model.head_size
    assert counted[1] == 2 * length * matrix_weights(model) + dense
    adapter = adapter_layers(model)
    head = 2 * length * model.vocab_size * model.hidden_size
    assert counted[0] == slots * num_flops(adapter.down) * (2 if overrides else 1)
    assert counted[-1] == head + slots * num_flops(adapter.up)
    for pipeline, virtual in ((1, 1), (2, 1), (4, 1), (2, 2)):
        parallel = config.parallel.model_copy(update={"pipeline": pipeline, "virtual_stages": virtual})
        staged = config.model_copy(update={"parallel": parallel}).job(4)
        assert staged.virtual_stages == virtual_stage_blocks(counted, pipeline, virtual)
        assert [list(chain(*stage)) for stage in staged.virtual_stages] == staged.stages


def saved_numbers(function, *arguments):
    """The result of an adapter's half, and the numbers that it saves for backward beside its weights."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*arguments)
    weights = {parameter.untyped_storage()._cdata for parameter in function.parameters()}
    return result, sum(s.untyped_storage().nbytes() // 4 for key, s in saved.items() if key not in weights)


def test_the_unet_saves_and_sends_what_is_counted():
    config = configuration("baselines/7b-unet-8x8.yaml", "model.num_layers=1", "model.hidden_size=64",
                           "model.num_heads=4", "model.unet_channels=32")  # fmt: skip
    model, adapter = Transfusion(config.model, config.objective), adapter_layers(config.model)
    latents, zeros = torch.randn(2, 8, 32, 32), torch.zeros(2, dtype=torch.int64)
    (patches, skips), down = saved_numbers(model.stem.adapter, latents, zeros, zeros)
    _, up = saved_numbers(model.tail.adapter, patches.detach(), zeros, skips, zeros)
    assert num_features(adapter.down) == pytest.approx(down / 2, rel=0.01)
    assert num_features(adapter.up) == pytest.approx(up / 2, rel=0.01)
    assert adapter.skips == sum(skip.numel() for skip in skips) / 2
    assert [skip.numel() for skip in skips] == list(map(math.prod, model.tail.adapter.skip_shapes(2)))
    sizes = configuration("baselines/7b-unet-8x8.yaml", "model.image_sizes=[[256,256],[128,384]]").model
    with torch.device("meta"):
        shapes = Transfusion(sizes, config.objective).tail.adapter.skip_shapes(1)
    assert adapter_layers(sizes).skips == sum(map(math.prod, shapes))


@pytest.mark.parametrize("kind", ["mixed", "pairs"])
def test_clean_context_counts_the_pairs_of_packed_rows(kind, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from synthetic import SyntheticRows

    config = configuration("quickstart.yaml", *CLEAN, "data.sequence_length=2048", "data.images_per_row=12")
    rows, length = SyntheticRows(config, kind), config.data.sequence_length
    packed = [rows.next() for _ in range(64)]
    statistics = config.job(1, kind).statistics
    visible = sum(int(row.work()[1]) for row in packed) / (64 * length)
    images = sum(int(row.has_loss.sum()) for row in packed) / 64
    assert statistics.visible_keys == pytest.approx(visible, rel=0.1)
    assert statistics.images == pytest.approx(images, rel=0.1)
    plain = config.job(1, kind)
    assert statistics.images <= replace(plain, clean_context=False).statistics.images


def test_a_token_costs_what_benchmarks_train_counts():
    job = configuration("7b.yaml").job(1, "whole")
    model = job.model
    matrices = model.num_layers * matrix_weights(model) + model.vocab_size * model.hidden_size
    pairs = 12 * model.hidden_size * model.num_layers * (job.sequence_length + 1) / 2
    assert sum(token_flops(job).values()) == pytest.approx(6 * matrices + pairs)


def test_rows_without_images_see_their_documents_alone():
    text = row_statistics("text", 4096, 256, 15)
    pairs = row_statistics("pairs", 4096, 256, 15)
    assert row_statistics("whole", 4096, 256, 15).visible_keys == 2048.5
    assert text.images == 0
    assert 400 < text.visible_keys < 1200
    assert 10 < pairs.images <= 15
    assert 200 < pairs.visible_keys < 320


def test_codes_see_those_before_them_and_are_predicted():
    latents = row_statistics("pairs", 4096, 256, 15)
    codes = row_statistics("pairs", 4096, 256, 15, has_codes=True)
    causal = row_statistics("pairs", 4096, 256, 15, is_causal=True)
    unseen = latents.visible_keys - codes.visible_keys
    assert (causal.visible_keys, causal.targets) == (codes.visible_keys, latents.targets)
    assert unseen == pytest.approx(latents.images * 256 * 255 / 2 / 4096)
    assert codes.targets - latents.targets == pytest.approx(codes.images * 257 / 4096)
