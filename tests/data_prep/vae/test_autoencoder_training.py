import io
import json
import math
import signal
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image, ImageDraw
from pyarrow import parquet

from data_prep.vae import dataset, train
from data_prep.vae.checkpoint import read_meta
from data_prep.vae.config import AutoencoderConfig, ImageDataConfig
from data_prep.vae.dataset import Position, find_images, held_out_images, is_held_out, training_batches
from data_prep.vae.evaluation import measure
from data_prep.vae.model import FILES, build_model
from data_prep.vae.train import learning_rate, train_autoencoder
from megafusion.config import load_config, parse_config
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec
from megafusion.images.processor import preprocess_images
from tests.support.raw import strange_images
from tests.support.tars import add_members

ROOT = Path(__file__).parents[3]


def disc(seed: int, size: int = 32) -> Image.Image:
    """A colored disc on white, which a few steps begin to learn."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), "white")
    x, y = rng.integers(0, size // 2, 2)
    ImageDraw.Draw(image).ellipse((x, y, x + 14, y + 14), fill=tuple(rng.integers(0, 200, 3).tolist()))
    return image


def write_shard(path: Path, images: dict[str, bytes], extension: str = "png") -> Path:
    with tarfile.open(path, "w") as tar:
        for key, content in images.items():
            add_members(tar, [(f"{key}.{extension}", content), (f"{key}.txt", key.encode())])
    return path


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "discs-000000.tar", {f"{i:04X}-flat": png(disc(i)) for i in range(48)})


@pytest.fixture
def config(tmp_path: Path, shard: Path):
    """A function from overrides to a tiny but complete configuration."""

    def make(**changes) -> AutoencoderConfig:
        values = {
            "out": str(tmp_path / "vae"),
            "data": {"images": [str(shard)], "image_size": 32, "held_out_fraction": 0.15},
            "network": {
                "unshuffle": 4,
                "channels": [16],
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "mid_block_attention": False,
            },
            "optimization": {
                "num_steps": 30,
                "batch_size": 4,
                "learning_rate": 5e-3,
                "warmup_steps": 3,
                "evaluate_every": 15,
                "checkpoint_every": 10,
            },
            "num_threads": 1,
        }
        for key, value in changes.items():
            if isinstance(value, dict):
                value = values.get(key, {}) | value
            values[key] = value
        return parse_config(AutoencoderConfig, values, "test")

    return make


def test_a_short_training_learns_and_writes_its_folder(config):
    report = train_autoencoder(config())
    out = config().out
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    assert [p.name for p in out.parent.iterdir() if "vae" in p.name] == ["vae"]  # nothing unfinished left
    assert json.loads((out / "report.json").read_text()) == report
    first, last = report["history"]
    assert last["step"] == 30
    assert last["reconstruction"] < first["reconstruction"]
    assert report["psnr"] > first["psnr"]
    assert report["num_latent_numbers"] == 4 * 8 * 8
    assert load_config(AutoencoderConfig, out / "recipe.yaml") == config()

    codec = ImageCodec.from_pretrained(out)
    assert codec.hash == report["codec_sha256"]
    keys, held_out = held_out_images(config().data, find_images(config().data).splits)
    assert len(keys) == report["num_held_out_images"]
    measured, reconstructions = measure(codec, held_out)
    assert measured == {key: report[key] for key in measured}
    squared = ((reconstructions - held_out) / 2).square().mean((1, 2, 3))
    assert measured["psnr"] == pytest.approx(float((10 * torch.log10(1 / squared)).mean()), abs=1e-3)
    assert measured["psnr_of_mean"] == pytest.approx(-10 * math.log10(squared.mean()), abs=1e-3)

    latents = codec.normalize(codec.encode(held_out)[0])
    assert abs(latents.mean()) < 0.5
    assert 0.5 < latents.std() < 1.5
    assert Image.open(out / "reconstructions.png").width > 32


def test_the_seed_determines_the_weights_bitwise(config, tmp_path):
    hashes = [
        train_autoencoder(config(out=str(tmp_path / name), seed=seed, optimization={"num_steps": 8}))[
            "codec_sha256"
        ]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_resumed_training_is_bitwise_identical(config, shard, tmp_path, monkeypatch):
    """From the last checkpoint after a crash, and from the step that a signal let end."""
    short = {
        "loss": {
            "adversarial_weight": 0.5,
            "adversarial_start_step": 3,
            "discriminator_layers": 1,
            "discriminator_channels": 4,
        },
        "optimization": {"num_steps": 12, "evaluate_every": 4, "checkpoint_every": 5},
    }
    uninterrupted = train_autoencoder(config(out=str(tmp_path / "uninterrupted"), **short))

    def stop_at_8(options, step):
        if step == 8:
            raise KeyboardInterrupt
        return learning_rate(options, step)

    monkeypatch.setattr(train, "learning_rate", stop_at_8)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(config(**short))
    monkeypatch.undo()
    assert not config().out.exists()
    with pytest.raises(UserError, match=r"unfinished training with another seed \(0\); restore"):
        train_autoencoder(config(**short, seed=1))
    with pytest.raises(UserError, match=r"with another data\.group_separator \(\"\"\)"):
        train_autoencoder(config(**short, data={"group_separator": "_"}))
    torch.manual_seed(99)
    moved = shard.rename(shard.with_name("moved.tar"))
    short["data"] = {"images": [str(moved)]}
    content = moved.read_bytes()
    moved.write_bytes(content + bytes(512))
    with pytest.raises(UserError, match=r"another data\.images \(by their hash\)"):
        train_autoencoder(config(**short))
    moved.write_bytes(content)

    def signal_at_8(options, step):
        if step == 8:
            signal.raise_signal(signal.SIGINT)
        return learning_rate(options, step)

    monkeypatch.setattr(train, "learning_rate", signal_at_8)
    folder = tmp_path / "vae.training"
    assert read_meta(folder)["step"] == 5
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(config(**short))
    assert read_meta(folder)["step"] == 8
    monkeypatch.undo()
    resumed = train_autoencoder(config(**short))
    assert resumed["codec_sha256"] == uninterrupted["codec_sha256"]
    assert resumed["history"] == uninterrupted["history"]


def test_bf16_learns_too(config):
    report = train_autoencoder(config(optimization={"precision": "bf16"}))
    first, last = report["history"]
    assert last["reconstruction"] < first["reconstruction"]


@pytest.mark.parametrize(("has_bf16", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_device_multiplies_it(config, tmp_path, monkeypatch, capsys, has_bf16, chosen):
    """The recipe and the checkpoints record which; bf16 without instructions for it is warned of."""
    monkeypatch.setattr(train, "multiplies_bf16", lambda device: has_bf16)
    reports = {
        precision: train_autoencoder(
            config(out=str(tmp_path / precision), optimization={"num_steps": 2, "precision": precision})
        )
        for precision in ("auto", "fp32", "bf16")
    }
    assert reports["auto"]["codec_sha256"] == reports[chosen]["codec_sha256"]
    assert reports["fp32"]["codec_sha256"] != reports["bf16"]["codec_sha256"]
    assert load_config(AutoencoderConfig, tmp_path / "auto/recipe.yaml").optimization.precision == chosen
    said = capsys.readouterr().err.count("optimization.precision bf16 is about 20 times as slow")
    assert said == (0 if has_bf16 else 1)


def test_both_styles_of_a_concept_are_held_out_together():
    for number in range(200):
        styles = ("3d", "flat", "200D-2642-3d")
        assert len({is_held_out(f"{number:04X}-{style}", of_concepts(0.3)) for style in styles}) == 1
    share = sum(is_held_out(f"{number:05X}-flat", of_concepts(0.1)) for number in range(5000)) / 5000
    assert share == pytest.approx(0.1, abs=0.02)


def test_images_of_one_group_are_refused_with_the_way_out(tmp_path):
    images = {f"img-{number:04}": png(disc(number)) for number in range(8)}
    paths = (write_shard(tmp_path / "own.tar", images),)
    for fraction, fault in ((0.05, "holds out no image"), (0.99, "no image left to train on")):
        config = ImageDataConfig(images=paths, held_out_fraction=fraction, group_separator="-")
        splits = find_images(config).splits
        held_out, batches = held_out_images, training_batches(config, splits, 4, 0)
        with pytest.raises(UserError, match=rf"{fault}.*set data\.group_separator: '' in place of '-'"):
            held_out(config, splits) if fraction < 0.5 else next(batches)


def of_concepts(fraction: float) -> ImageDataConfig:
    return ImageDataConfig(images=(Path(),), held_out_fraction=fraction, group_separator="-")


@pytest.mark.parametrize("name", ["img-{:04}", "DSC-{}", "{}", "large-red-ring-{}"])
def test_images_of_any_names_are_held_out_one_by_one(tmp_path, name):
    images = {name.format(number): png(disc(number)) for number in range(60)}
    config = ImageDataConfig(images=(write_shard(tmp_path / "own.tar", images),), image_size=32)
    splits = find_images(config).splits
    keys, _ = held_out_images(config, splits)
    assert 1 <= len(keys) < 15
    batch, _ = next(training_batches(config, splits, 60 - len(keys), 0))
    assert len(batch) == 60 - len(keys)


def test_an_epoch_has_every_training_image_once(shard):
    config = ImageDataConfig(images=(shard,), image_size=32, held_out_fraction=0.15, horizontal_flip=False)
    splits = find_images(config).splits
    _, held_out = held_out_images(config, splits)
    num_training = 48 - len(held_out)
    stream = training_batches(config, splits, num_training, seed=0)
    (first, _), (second, position) = next(stream), next(stream)
    assert not torch.equal(first, second)
    seen = [sorted(image.numpy().tobytes() for image in batch) for batch in (first, second)]
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == num_training
    assert not set(seen[0]) & {image.numpy().tobytes() for image in held_out}
    assert position == (1, num_training)


def test_a_resumed_training_reads_no_earlier_epoch(shard, monkeypatch):
    config = ImageDataConfig(images=(shard,), image_size=32, held_out_fraction=0.15)
    splits = find_images(config).splits
    stream = training_batches(config, splits, 32, 0)
    whole = [next(stream) for _ in range(8)]
    epochs, samples = [], dataset._samples
    monkeypatch.setattr(dataset, "_samples", lambda *arguments: epochs.append(1) or samples(*arguments))
    for number, (_, position) in enumerate(whole[:-1]):
        epochs.clear()
        batch, after = next(training_batches(config, splits, 32, 0, position))
        assert torch.equal(batch, whole[number + 1][0])
        assert after == whole[number + 1][1]
        assert len(epochs) == 1 + after.epoch - position.epoch
    # As checkpoints of earlier versions have it: all in epoch 0.
    assert torch.equal(next(training_batches(config, splits, 32, 0, Position(0, 7 * 32)))[0], whole[7][0])


def test_about_half_of_the_images_are_flipped(shard):
    options = {"images": (shard,), "image_size": 32, "held_out_fraction": 0.15}
    splits = find_images(ImageDataConfig(**options)).splits
    flipped, _ = next(training_batches(ImageDataConfig(**options), splits, 40, 0))
    images = [disc(i) for i in range(48)]
    plain = held_out_images(ImageDataConfig(**options | {"held_out_fraction": 0.999999}), splits)[1]
    assert len(plain) == len(images)
    upright = sum(any(torch.equal(x, p) for p in plain) for x in flipped)
    mirrored = sum(any(torch.equal(x.flip(-1), p) for p in plain) for x in flipped)
    assert 8 < mirrored < 32
    assert upright + mirrored >= 40


def test_learning_rate_rises_linearly_and_falls_to_zero(config):
    options = config(optimization={"num_steps": 110, "warmup_steps": 10}).optimization
    rates = [learning_rate(options, step) for step in range(1, 111)]
    assert rates[4] == pytest.approx(0.5 * options.learning_rate)
    assert max(rates) == rates[9] == options.learning_rate
    assert rates[59] == pytest.approx(0.5 * options.learning_rate)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_bad_shards_are_named(config, tmp_path, shard):
    with pytest.raises(UserError, match=r"nowhere-\*\.tar: no such file"):
        train_autoencoder(config(data={"images": [str(tmp_path / "nowhere-*.tar")]}))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2 + 700])
    with pytest.raises(UserError, match=r"cut\.tar: not readable as a tar"):
        train_autoencoder(config(data={"images": [str(cut)]}))
    junk = write_shard(tmp_path / "junk.tar", {f"{i:04X}-flat": b"no image" for i in range(40)})
    with pytest.raises(UserError, match=r"junk\.tar, key '.*-flat': image does not decode"):
        train_autoencoder(config(data={"images": [str(junk)]}))
    lone = write_shard(tmp_path / "lone.tar", {"0001-flat": png(disc(1))})
    with pytest.raises(UserError, match=r"held_out_fraction.*holds out no image of .*lone\.tar"):
        train_autoencoder(config(data={"images": [str(lone)], "held_out_fraction": 1e-9}))
    with pytest.raises(UserError, match="no image left to train on"):
        train_autoencoder(config(data={"images": [str(lone)], "held_out_fraction": 0.999999}))


@pytest.mark.parametrize("form", ["tar", "parquet", "folder", "pattern"])
def test_images_are_read_in_every_form_that_preprocessing_reads(config, tmp_path, form):
    images = {f"{i:04X}-flat": png(disc(i)) for i in range(20)}
    folder = tmp_path / "images"
    folder.mkdir()
    if form == "tar":
        write_shard(folder / "a.tar", images)
    elif form == "parquet":
        table = pyarrow.table({"img": [None, *images.values()]})
        parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    else:
        for key, content in images.items():
            (folder / f"{key}.png").write_bytes(content)
    (folder / "README.md").write_text("x")
    paths = [Path(f"{folder}/*.png" if form == "pattern" else folder)]
    data = ImageDataConfig(images=tuple(paths), image_size=32, held_out_fraction=0.2, image_column="img")
    inputs = find_images(data)
    assert inputs.ignored == ({} if form == "pattern" else {".md": 1})
    held_out = held_out_images(data, inputs.splits)[1]
    assert 0 < len(held_out) < 20
    batch, _ = next(training_batches(data, inputs.splits, 20 - len(held_out), 0))
    found = {image.numpy().tobytes() for image in torch.cat([batch, batch.flip(-1), held_out])}
    assert all(
        image.numpy().tobytes() in found for image in preprocess_images([disc(i) for i in range(20)], 32, 32)
    )


def test_a_training_reads_no_output_of_its_own_and_replaces_none_unasked(config, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:04X}.png").write_bytes(png(disc(number)))
    values = {"out": str(folder / "vae"), "data": {"images": [str(folder)]}, "optimization": {"num_steps": 2}}
    report = train_autoencoder(config(**values))
    with pytest.raises(UserError, match=r"images/vae: holds an autoencoder; .* set overwrite=true"):
        train_autoencoder(config(**values))
    again = train_autoencoder(config(**values, overwrite=True))
    assert again | {"seconds": 0} == report | {"seconds": 0, "ignored": {"folder of outputs": 1}}


def test_strange_images_are_read_as_in_preprocessing(tmp_path):
    images = strange_images()
    shard = write_shard(
        tmp_path / "strange.tar", {str(i): content for i, content in enumerate(images.values())}
    )
    config = ImageDataConfig(images=(shard,), image_size=8, held_out_fraction=0.999999)
    keys, pixels = held_out_images(config, find_images(config).splits)
    assert len(keys) == len(images)
    green = pixels[:, :, 4, 4]
    expected = torch.tensor([[-1, 1, -1]] * 3 + [[0, 0, 0], [1, 1, 1]])
    torch.testing.assert_close(green, expected.float(), atol=0.01, rtol=0)


def test_other_bad_input_is_refused(config):
    with pytest.raises(UserError, match=r"network\.channels 18: not divisible"):
        train_autoencoder(config(network={"channels": [18]}))
    with pytest.raises(UserError, match=r"30 x 30.*multiples of 4"):
        train_autoencoder(config(data={"image_size": 30}))
    with pytest.raises(UserError, match="device 'tpu'"):
        train_autoencoder(config(device="tpu"))
    with pytest.raises(UserError, match=r"step 10: the gradient is not finite"):
        train_autoencoder(config(loss={"kl_weight": 1e308}))
    config().out.mkdir()
    (config().out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files \['thesis\.tex'\]"):
        train_autoencoder(config())


@pytest.mark.parametrize("name", ["emoji", "paper"])
def test_shipped_configurations_are_valid(name):
    config = load_config(AutoencoderConfig, ROOT / f"configs/vae/{name}.yaml")
    with torch.device("meta"):
        model = build_model(config.network)
    channels, height, width = ImageCodec(model).latent_shape(*[config.data.image_size] * 2)
    assert (channels, height, width) == {"emoji": (3, 16, 16), "paper": (8, 32, 32)}[name]


def test_the_committed_autoencoder_matches_its_report():
    folder = ROOT / "data_prep/vae"
    report = json.loads((folder / "report.json").read_text())
    recipe = load_config(AutoencoderConfig, folder / "recipe.yaml")
    on_bf16 = ["optimization.precision=bf16"]  # what `auto` was on the CPU that trained it
    assert recipe == load_config(AutoencoderConfig, ROOT / "configs/vae/emoji.yaml", on_bf16)
    codec = ImageCodec.from_pretrained(folder)
    assert codec.hash == report["codec_sha256"]
    images = find_images(ImageDataConfig(images=(ROOT / "data_prep/emoji/emoji-000000.tar",)))
    _, held_out = held_out_images(recipe.data, images.splits)
    assert len(held_out) == report["num_held_out_images"]
    measured, _ = measure(codec, held_out)
    assert measured["psnr"] == pytest.approx(report["psnr"], abs=0.02)
    assert measured["psnr"] >= 29.0
    assert math.prod(codec.latent_shape(64, 64)) <= 1024

    latents = codec.normalize(codec.encode(held_out)[0])
    assert latents.mean().item() == pytest.approx(0, abs=0.1)
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noised = codec.decode(codec.denormalize(latents + 0.1 * noise))
    squared = ((noised - held_out) / 2).square().mean((1, 2, 3))
    assert float(-10 * squared.log10().mean()) >= 27.0


def test_augmented_images_are_others_each_epoch_and_the_same_after_a_resume(config):
    data = config(
        data={"augmentation": {"max_shift": 0.2, "scale": [0.5, 0.9]}, "horizontal_flip": False}
    ).data
    splits = find_images(data).splits
    plain = data.model_copy(update={"augmentation": None})
    batches = training_batches(data, splits, 8, seed=0)
    first = [next(batches) for _ in range(12)]
    resumed = training_batches(data, splits, 8, 0, first[4][1])
    for pixels, position in first[5:]:
        again, position_again = next(resumed)
        assert torch.equal(again, pixels)
        assert position_again == position
    every = torch.cat([pixels for pixels, _ in first]).flatten(1)
    assert len(torch.unique(every, dim=0)) == len(every)
    held_out = held_out_images(data, splits)[1]
    assert torch.equal(held_out, held_out_images(plain, splits)[1])
