"""The model: sizes, attention, adapters, initialization, and the cost of importing it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megafusion.config import load_config
from megafusion.errors import UserError
from megafusion.model.adapters import adapter_module
from megafusion.model.attention import attention_backend
from megafusion.model.config import ModelConfig, RopeScaling
from megafusion.model.rope import rope_at
from megafusion.model.transformer import block_context, swiglu
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig
from megafusion.sequence.intervals import Intervals
from megafusion.train.config import RunConfig
from tests.support.weights import initialize

ROOT = Path(__file__).parents[2]
SMALL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "ffn_hidden_size": 48,
    "vocab_size": 40,
    "latent_channels": 2,
    "latent_downsampling": 1,
    "image_sizes": ((8, 8),),
    "patch_size": 4,
    "unet_channels": 4,
}


def small(**changes) -> Transfusion:
    model = Transfusion(ModelConfig(**SMALL | changes), ObjectiveConfig())
    initialize(model, model.config.num_layers, seed=0)
    return model


def adapter_pair(name: str, patch_size: int, size: tuple[int, int], **changes) -> tuple:
    """Both halves of an adapter for images of one size."""
    changes |= {"adapter": name, "patch_size": patch_size, "image_sizes": (size,)}
    config, module = ModelConfig(**SMALL | changes), adapter_module(name)
    return module.Down(config), module.Up(config)


@pytest.mark.parametrize(
    ("name", "billions", "layers", "hidden_size", "heads"),
    [
        ("0.16b", 0.16, 16, 768, 12),
        ("0.37b", 0.37, 24, 1024, 16),
        ("0.76b", 0.76, 24, 1536, 24),
        ("1.4b", 1.4, 24, 2048, 16),
        ("7b", 7.0, 32, 4096, 32),
    ],
)
def test_sizes_of_the_paper(name, billions, layers, hidden_size, heads):
    config = load_config(RunConfig, ROOT / f"configs/{name}.yaml")
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_heads) == (
        layers,
        hidden_size,
        heads,
    )
    with torch.device("meta"):
        model = Transfusion(config.model, config.objective)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.08)
    adapter = sum(p.numel() for part in (model.stem, model.tail) for p in part.adapter.parameters())
    assert adapter < 0.005 * billions * 1e9
    # 2M tokens per step, and the paper's 4,096 positions per row.
    assert config.train.global_batch_size * config.data.sequence_length in (2**21, 2**22)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_unet_adapter_of_the_paper_has_027b_parameters(patch_size):
    config = load_config(RunConfig, ROOT / f"configs/baselines/7b-unet-{patch_size}x{patch_size}.yaml").model
    assert config.patch_size == patch_size
    with torch.device("meta"):
        model = Transfusion(config.model_copy(update={"num_layers": 1}), ObjectiveConfig())
    adapter = sum(p.numel() for part in (model.stem, model.tail) for p in part.adapter.parameters())
    assert adapter == pytest.approx(0.27e9, rel=0.06)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("adapter", ["linear", "unet"])
def test_adapters_map_latents_to_patches_and_back(adapter, patch_size):
    down, up = adapter_pair(adapter, patch_size, (16, 8))
    grid = (16 // patch_size, 8 // patch_size)
    latents, timesteps = torch.randn(3, 2, 16, 8), torch.tensor([0, 10, 999])
    patches, skips = down.encode(latents, timesteps)
    assert patches.shape == (3, 16 * 8 // patch_size**2, 32)
    out = up.decode(patches, timesteps, skips, grid)
    assert out.shape == latents.shape
    # A prediction depends on the timestep and on its own image only.
    patches, skips = down.encode(latents, timesteps.flip(0))
    assert not torch.allclose(out[0], up.decode(patches, timesteps, skips, grid)[0])
    patches, skips = down.encode(latents[:1], timesteps[:1])
    alone = up.decode(patches, timesteps[:1], skips, grid)
    torch.testing.assert_close(out[:1], alone, rtol=1e-4, atol=1e-5)


def test_every_convolution_of_the_unet_reads_and_writes_channels_last():
    """A GPU's tensor cores compute them so; any other order would be copied before and after each."""
    down, up = adapter_pair("unet", 4, (16, 8), unet_channels=8)
    orders = []

    def record(module, inputs, output):
        orders.extend(x.is_contiguous(memory_format=torch.channels_last) for x in (inputs[0], output))

    for module in (*down.modules(), *up.modules()):
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm):
            module.register_forward_hook(record)
    timesteps = torch.tensor([3, 700, 12])
    patches, skips = down(torch.randn(3, 2, 16, 8), timesteps, torch.zeros(3, dtype=torch.int64))
    up(patches, timesteps, tuple(skip.contiguous() for skip in skips), torch.zeros(3, dtype=torch.int64))
    assert len(orders) > 60
    assert all(orders)


def test_the_norm_of_the_unet_is_that_of_one_group():
    norm = adapter_module("unet").ImageNorm(6)
    reference = torch.nn.GroupNorm(1, 6)
    x = torch.randn(2, 6, 4, 8)
    with torch.no_grad():
        for own, other in zip(norm.parameters(), reference.parameters(), strict=True):
            other.copy_(own.normal_())
    torch.testing.assert_close(norm(x), reference(x), rtol=1e-5, atol=1e-5)


def test_unet_reads_every_skip_and_the_timestep_of_both_halves():
    torch.manual_seed(0)
    down, up = adapter_pair("unet", 4, (16, 8))
    latents, timesteps, others = torch.randn(1, 2, 16, 8), torch.tensor([10]), torch.tensor([900])

    def predict(patches, timesteps, skips):
        return up.decode(patches, timesteps, skips, (4, 2))

    patches, skips = down.encode(latents, timesteps)
    out = predict(patches, timesteps, skips)
    for changed, skip in enumerate(skips):
        assert skip.std() > 0
        moved = [s + (i == changed) * torch.randn_like(s) for i, s in enumerate(skips)]
        assert not torch.allclose(predict(patches, timesteps, tuple(moved)), out, rtol=1e-2)
    assert not torch.allclose(predict(patches, others, skips), out, rtol=1e-3)
    other_patches, other_skips = down.encode(latents, others)
    assert not torch.allclose(other_patches, patches, rtol=1e-3)
    assert not torch.allclose(predict(patches, timesteps, other_skips), out, rtol=1e-3)
    # Skips depend on the image, with its detail at full resolution.
    _, other_skips = down.encode(-latents, timesteps)
    assert not torch.allclose(predict(patches, timesteps, other_skips), out, rtol=1e-2)


def test_linear_adapter_orders_patches_in_raster():
    down, up = adapter_pair("linear", 2, (4, 4), latent_channels=1, hidden_size=4, num_heads=1)
    with torch.no_grad():
        down.linear.weight.copy_(torch.eye(4))
        down.linear.bias.zero_()
        up.linear.weight.copy_(torch.eye(4))
        up.linear.bias.zero_()
        for parameter in down.timestep.parameters():
            parameter.zero_()
    latents = torch.arange(16.0).view(1, 1, 4, 4)
    patches, _ = down.encode(latents, torch.tensor([3]))
    assert patches[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(up.decode(patches, torch.tensor([3]), (), (2, 2)), latents)


def test_sdpa_equals_the_definition_with_grouped_queries_and_fully_masked_rows():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    end = torch.tensor([[1, 4, 4, 0, 6], [0, 1, 6, 6, 6]], dtype=torch.int32)
    last = torch.tensor([[3, 5, 2, 5, 5, 5], [2, 5, 5, 5, 4, 5]], dtype=torch.int32)
    sdpa = attention_backend("sdpa")
    mask = sdpa.prepare(Intervals(end, last, 6, may_be_empty=True), torch.float32, 8)
    out = sdpa.attend(q, k, v, mask)
    for b in range(2):
        for i in range(5):
            for h in range(4):
                seen = [j for j in range(6) if j < end[b, i] and i < last[b, j]]
                if not seen:
                    assert (out[b, i, h] == 0).all()
                    continue
                scores = k[b, seen, h // 2] @ q[b, i, h] / 8**0.5
                expected = scores.softmax(0) @ v[b, seen, h // 2]
                torch.testing.assert_close(out[b, i, h], expected, rtol=1e-5, atol=1e-5)


def test_rope_depends_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i: int, j: int) -> torch.Tensor:
        rotated_q = rope_at(torch.tensor([[i]]), 16, 10_000.0).rotate(q)
        return (rotated_q * rope_at(torch.tensor([[j]]), 16, 10_000.0).rotate(k)).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(7, 3), score(7, 4))


def test_rotation_turns_each_pair_by_its_angle_bit_for_bit():
    positions, x = torch.arange(50)[None], torch.randn(1, 50, 2, 16)
    angles = (positions[..., None].float() * 100.0 ** -(torch.arange(0, 16, 2) / 16))[:, :, None]
    first, second = x.chunk(2, -1)
    expected = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    assert torch.equal(rope_at(positions, 16, 100.0).rotate(x), torch.cat(expected, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (15,)])
def test_swiglu_is_silu_of_the_gate_times_up_bit_for_bit_and_keeps_its_input_alone(dtype, shape):
    """Positions in rows, or sorted; more numbers than a processor's vector has, and some of another."""
    gate_up = torch.randn(*shape, 2 * 171, dtype=dtype, requires_grad=True)
    gate, up = gate_up.chunk(2, -1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = swiglu(gate_up)
    assert [x.data_ptr() for x in kept] == [gate_up.data_ptr()]
    expected, gradient = F.silu(gate) * up, torch.randn(*shape, 171, dtype=dtype)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y, gate_up, gradient)[0] for y in (found, expected)))
    with torch.no_grad():
        assert torch.equal(swiglu(gate_up), expected)


@pytest.mark.parametrize("theta", [100.0, 500_000.0])
def test_rope_uses_the_theta_of_the_configuration(theta):
    positions = torch.tensor([[0, 1, 7]], dtype=torch.int32)
    config = ModelConfig(**SMALL, rope_theta=theta)
    rope = block_context(
        config, Intervals(positions + 1, None, 8), positions, torch.float32, positions < 0
    ).rope
    frequencies = torch.tensor([1.0, theta**-0.25, theta**-0.5, theta**-0.75])  # heads of 8
    angles = positions[0, :, None] * frequencies
    torch.testing.assert_close(rope.cos[0, :, 0], angles.cos().repeat(1, 2))
    torch.testing.assert_close(rope.sin[0, :, 0], torch.cat([-angles.sin(), angles.sin()], -1))


def test_rope_scaling_leaves_fast_frequencies_and_divides_slow_ones():
    """Of heads of 8 and 64 original positions, frequency 1 turns 10 times, 0.1 once, and the others less."""
    scaling = RopeScaling(factor=4.0, low_freq_factor=0.5, original_max_position_embeddings=64)
    angles = torch.tensor([1.0, 0.1, 0.01, 0.001])
    kept = (6.4 / (2 * torch.pi) - 0.5) / 3.5
    angles *= torch.tensor([1.0, kept + (1 - kept) / 4, 0.25, 0.25])
    rope = rope_at(torch.tensor([[1]]), 8, 10_000.0, scaling)
    torch.testing.assert_close(rope.sin[0, 0, 0, 4:], angles.sin())
    with pytest.raises(UserError, match=r"low_freq_factor 4\.0 must be less than high_freq_factor 4\.0"):
        RopeScaling(low_freq_factor=4.0)


def test_tied_embeddings_are_one_weight_with_the_embeddings_start():
    tied, untied = small(tie_embeddings=True), small()
    names = [name for name, _ in tied.named_parameters()]
    assert names == [name for name, _ in untied.named_parameters() if name != "tail.head.weight"]
    assert tied.tail.head.weight is tied.stem.embedding.weight
    assert torch.equal(tied.stem.embedding.weight, untied.stem.embedding.weight)


@pytest.mark.parametrize("num_layers", [2, 8])
def test_residual_outputs_are_initialized_smaller_by_the_root_of_twice_the_layers(num_layers):
    model = small(num_layers=num_layers, hidden_size=64, ffn_hidden_size=128)
    for block in model.blocks:
        for layer in (block.attention.out, block.feed_forward.down):
            assert layer.weight.std().item() == pytest.approx(0.02 / (2 * num_layers) ** 0.5, rel=0.06)
        for layer in (block.attention.qkv, block.feed_forward.gate_up):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.06)
    assert model.tail.head.weight.std().item() == pytest.approx(0.02, rel=0.06)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "head_dim"),
        ({"head_dim": 7}, "multiple of 2"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"image_sizes": ((6, 8),)}, "6x8 is not a multiple of"),
        ({"patch_size": 3}, "Input should be 1, 2, 4 or 8"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**SMALL | changes)


def test_importing_the_model_imports_no_kernels_compiler_or_diffusers():
    heavy = ("torch._dynamo", "triton", "interval_attention", "diffusers", "scipy")
    code = f"import sys, megafusion.model.transfusion; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_model_folder_stays_short():
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "megafusion/model").rglob("*.py"))
    assert lines < 1500
