"""The codec over AutoencoderKL folders."""

import hashlib
import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec


def tiny(in_channels: int = 48, levels: int = 1, **options) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=in_channels,
        out_channels=in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        **options,
    )


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_saved_codec_loads_equal(tmp_path, images):
    codec = ImageCodec(tiny(scaling_factor=2.0, shift_factor=0.5))
    codec.model.save_pretrained(tmp_path)
    loaded = ImageCodec.from_pretrained(tmp_path)
    assert loaded.hash == codec.hash
    mean, log_variance = loaded.encode(images)
    assert mean.shape == log_variance.shape == (2, *loaded.latent_shape(16, 24)) == (2, 4, 4, 6)
    torch.testing.assert_close(mean, codec.encode(images)[0])
    decoded = loaded.decode(mean)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1


def test_hash_depends_on_weights_and_listed_keys_alone(tmp_path):
    codec = ImageCodec(tiny())
    renamed = tiny()
    renamed.register_to_config(_name_or_path="elsewhere")
    assert ImageCodec(renamed).hash == codec.hash
    changed = tiny()
    with torch.no_grad():
        changed.decoder.conv_out.bias[0] += 1e-6
    assert ImageCodec(changed).hash != codec.hash
    assert ImageCodec(tiny(scaling_factor=0.5)).hash != codec.hash
    assert ImageCodec(tiny(act_fn="relu")).hash != codec.hash


@pytest.mark.parametrize("change", ["nothing", "half precision", "missing keys", "old names"])
def test_the_hash_of_a_folder_equals_the_hash_of_its_model(tmp_path, change):
    """Shards record the hash of a loaded model; it equals the hash of the files."""
    tiny(shift_factor=0.5 if change != "missing keys" else None).save_pretrained(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    if change == "half precision":
        save_file({name: weight.half() for name, weight in load_file(weights).items()}, weights)
    elif change == "old names":
        new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        renamed = {}
        for name, weight in load_file(weights).items():
            for of_today, old in new.items():
                name = name.replace(of_today, old)
            renamed[name] = weight
        assert any(".proj_attn." in name for name in renamed)
        save_file(renamed, weights)
    elif change == "missing keys":
        values = json.loads(config.read_text())
        kept = values.keys() - {"scaling_factor", "act_fn", "shift_factor"}
        config.write_text(json.dumps({key: values[key] for key in kept}))
    codec = ImageCodec.from_pretrained(tmp_path)
    assert codec.hash == ImageCodec(codec.model).hash


def test_pixel_unshuffle_reads_blocks_of_pixels(images):
    model = tiny()
    blocks = images.reshape(2, 3, 4, 4, 6, 4).permute(0, 1, 3, 5, 2, 4).reshape(2, 48, 4, 6)
    with torch.no_grad():
        posterior = model.encode(blocks).latent_dist
        out = model.decode(posterior.mean).sample
    expected = out.reshape(2, 3, 4, 4, 4, 6).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 24)
    codec = ImageCodec(model)
    mean, log_variance = codec.encode(images)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(log_variance, posterior.logvar)
    torch.testing.assert_close(codec.decode(mean), expected.clamp(-1, 1))


def test_an_autoencoder_without_pixel_unshuffle(images):
    codec = ImageCodec(tiny(in_channels=3, levels=3))
    assert codec.latent_shape(16, 24) == (4, 4, 6)
    mean, _ = codec.encode(images)
    assert mean.shape == (2, 4, 4, 6)
    torch.testing.assert_close(mean, codec.model.encode(images).latent_dist.mean)
    assert codec.decode(mean).shape == images.shape


def test_normalize_and_denormalize():
    codec = ImageCodec(tiny(scaling_factor=0.25, shift_factor=3.0))
    latents = 3 + 4 * torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    normal = codec.normalize(latents)
    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 1) < 0.05
    torch.testing.assert_close(codec.denormalize(normal), latents)
    # Most published autoencoders have no shift.
    assert ImageCodec(tiny()).normalize(torch.ones(1)).item() == pytest.approx(0.18215)


def test_invalid_sizes_and_channels_are_refused():
    with pytest.raises(UserError, match=r"18 x 16.*multiples of 4"):
        ImageCodec(tiny()).encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(UserError, match="in_channels 4"):
        ImageCodec(tiny(in_channels=4))


REFUSED_KEYS = {
    "scaling_factor": [0, 0.0, -1.0, None, "0.18", float("nan"), float("inf"), True, [1.0]],
    "shift_factor": ["0", float("nan"), [0.0] * 4],
    "latents_mean": [[0.0] * 4],
    "latents_std": [[1.0] * 4],
    "latent_channels": [0, None, "4"],
    "block_out_channels": [[], None, 8],
    "in_channels": [0, None, 4, 12.0],
}


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_keys_that_matter_are_refused_by_name(tmp_path, key):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for value in REFUSED_KEYS[key]:
        path.write_text(json.dumps(values | {key: value}))
        with pytest.raises(UserError, match=rf"config\.json: (key )?'?{key}'?"):
            ImageCodec.from_pretrained(tmp_path)
    model = tiny()
    model.register_to_config(**{key: REFUSED_KEYS[key][0]})
    with pytest.raises(UserError, match=rf"autoencoder: (key )?'?{key}'?"):
        ImageCodec(model)


def test_the_hash_of_an_autoencoder_is_that_of_earlier_versions(tmp_path):
    """Shards name their autoencoder by it. Keys that say nothing do not change it."""
    tiny(scaling_factor=2.0, shift_factor=0.5).save_pretrained(tmp_path)
    described = {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"],
        "norm_num_groups": 4,
        "scaling_factor": 2.0,
        "shift_factor": 0.5,
        "up_block_types": ["UpDecoderBlock2D"],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, weight in sorted(load_file(tmp_path / "diffusion_pytorch_model.safetensors").items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + weight.numpy().tobytes())
    assert ImageCodec.from_pretrained(tmp_path).hash == digest.hexdigest()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latents_mean": None, "another_key": 1}))
    assert ImageCodec.from_pretrained(tmp_path).hash == digest.hexdigest()


def test_invalid_autoencoder_folders_are_refused(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(UserError, match=str(missing)):
        ImageCodec.from_pretrained(missing)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(UserError, match="AutoencoderTiny, not an AutoencoderKL or VQModel"):
        ImageCodec.from_pretrained(other)
    tiny().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(UserError, match="pickled ones are not read"):
        ImageCodec.from_pretrained(tmp_path / "pickled")
    tiny().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut: not loadable"):
        ImageCodec.from_pretrained(tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_quant_conv": False}, "have quant_conv.bias"),
        ({"layers_per_block": 2}, r"lack decoder\.up_blocks\.0\.resnets\.2"),
        ({"layers_per_block": 0}, r"have .*resnets"),
        ({"mid_block_add_attention": False}, r"have .*attentions"),
        ({"block_out_channels": [8, 8]}, "lack .*"),
        ("weight", "lack encoder.conv_in.bias"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path, change, message):
    """diffusers starts those that are missing at random, and ignores the others."""
    tiny().save_pretrained(tmp_path)
    if change == "weight":
        weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
        del weights["encoder.conv_in.bias"]
        save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    else:
        config = json.loads((tmp_path / "config.json").read_text()) | change
        (tmp_path / "config.json").write_text(json.dumps(config))
    codec = ImageCodec.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"its weights {message}"):
        codec.encode(torch.zeros(1, 3, 8, 8))
