"""The components of a run, opened and checked before anything is written."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from megafusion.device import default_device, multiplies_bf16

import torch
import torch.distributed as dist

from megafusion.checkpoint.folder import newest_step
from megafusion.data.config import DataConfig, ValidationConfig
from megafusion.data.latent_statistics import latent_statistics, spread_documents
from megafusion.data.loader import DataLoader
from megafusion.data.manifest import Manifest
from megafusion.data.remote import is_remote
from megafusion.data.source import Source, open_sources
from megafusion.engine.engine import Engine, make_engine, rows_of_rank
from megafusion.errors import UserError
from megafusion.generate.folder import PipelineConfig, build_model, check_components
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.codec import ImageCodec
from megafusion.images.sizes import format_sizes
from megafusion.model.attention import check_backend
from megafusion.parallel.fp8 import check_fp8
from megafusion.parallel.mesh import Mesh
from megafusion.plan.fit import does_not_fit
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.telemetry.trackers import check_trackers
from megafusion.train.config import RunConfig
from megafusion.train.init_from import check_origin, open_origin
from megafusion.train.parts import check_parts
from megafusion.train.vision_features import VisionFeatures


@dataclass
class Components:
    """Tokenizer, autoencoder, data sources and loader of a run."""

    tokenizer: Tokenizer
    codec: ImageCodec
    sources: dict[str, Source]
    loader: DataLoader
    validation_loader: DataLoader | None
    started_from: dict | None
    """The record of `train.init_from` in a new run's folder."""
    vision: VisionFeatures | None = None

    def warnings(self, config: RunConfig) -> list[str]:
        """Values of the configuration that cannot do what they say with these inputs."""
        found = []
        has_pixels = any(s.folder.manifest.image_kind == "pixels" for s in self.sources.values())
        if not has_pixels and (config.data.crop < 1 or config.data.flip):
            found.append("data.flip and data.crop change no image, because every source holds latents")
        for name, source in self.sources.items():
            shards = source.folder
            if is_remote(config.data.sources[name].path):
                continue  # its shards are fetched when they are due
            with suppress(UserError):  # a corrupt document, for which data.on_error is
                statistics = latent_statistics(spread_documents(shards), shards.manifest)
                if statistics and statistics.warning:
                    found.append(f"data.sources.{name}: {statistics.warning}")
        text_config = (self.started_from or {}).get("text_config") or {}
        limit, length = text_config.get("max_position_embeddings"), config.data.sequence_length
        if limit and limit < length and not config.model.rope_scaling:
            found.append(
                f"data.sequence_length {length} is more than the {limit} positions that the model of "
                "train.init_from was trained with (max_position_embeddings), so longer documents are new to "
                "it; lower it, or set model.rope_scaling"
            )
        if torch.cuda.is_available():
            found += idle_gpu(config)
            gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
            found += does_not_fit(config.job(dist.get_world_size()), gpu.total_memory, gpu.name)
        elif config.train.precision == "bf16" and not multiplies_bf16(default_device()):
            found.append(
                "train.precision bf16 is about 20 times as slow as fp32 on this CPU, which has no "
                "instructions for it; set it to fp32"
            )
        return [f"warning: {sentence}" for sentence in found]


def idle_gpu(config: RunConfig) -> list[str]:
    """Values that leave most of a GPU's speed unused."""
    found = []
    if config.train.precision == "fp32":
        found.append("train.precision fp32 does not use the GPU's tensor cores; set it to bf16")
    if config.model.attention == "sdpa":
        length = config.data.sequence_length
        found.append(
            f"model.attention sdpa computes all {length} x {length} pairs of positions and keeps a mask "
            "of them in every block; set it to auto"
        )
    if config.data.num_workers == 0:
        found.append("data.num_workers 0 lets the GPU wait while rows are read and packed; set it to 4")
    return found


def build_components(config: RunConfig, mesh: Mesh) -> Components:
    """Open and check everything that a run needs, before anything is written."""
    config.check_degrees(dist.get_world_size())
    check_trackers(config.telemetry)
    if config.train.precision == "fp8":
        check_fp8()
    if config.train.compile:
        _check_compiler()
    if config.parallel.async_tensor and not torch.cuda.is_available():
        raise UserError(
            "parallel.async_tensor needs GPUs that read each other's memory (NVLink); set it to false"
        )
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    check_backend(config.model.attention, config.model.head_size, dtype, training=True)
    tokenizer = Tokenizer.from_pretrained(config.data.tokenizer)
    codec = ImageCodec.from_pretrained(config.data.vae)
    check_components(config.model, tokenizer, codec)
    check_parts(config)
    codes = codec.codebook_size
    sources = open_sources(config.data, tokenizer, codec.hash, config.seed, codebook_size=codes)
    if config.samples.every and not any(s.folder.manifest.kind == "pair" for s in sources.values()):
        raise UserError(
            f"samples.every {config.samples.every}: no source holds pairs, and samples draw the captions of "
            "pairs; set it to 0"
        )
    loader, validation_loader = _make_loader(config, config.data, sources, tokenizer, codec, mesh), None
    if config.data.validation:
        data = _validation_data(config.data, config.data.validation, config.train.global_batch_size)
        section = "data.validation.sources"
        held_out = open_sources(data, tokenizer, codec.hash, config.seed, section, codes)
        validation_loader = _make_loader(config, data, held_out, tokenizer, codec, mesh)
    started_from = None
    if config.train.init_from and not newest_step(config.out):
        started_from = check_origin(open_origin(config), config, tokenizer)
    vision = None
    if aligned := config.objective.alignment:
        vision = VisionFeatures(aligned, config.model.grids, default_device(), dtype)
    return Components(tokenizer, codec, sources, loader, validation_loader, started_from, vision)


def _make_loader(
    config: RunConfig,
    data: DataConfig,
    sources: dict[str, Source],
    tokenizer: Tokenizer,
    codec: ImageCodec,
    mesh: Mesh,
) -> DataLoader:
    shape = config.sequence_shape
    for source in sources.values():
        _check_rows(source.key, source.folder.manifest, config)
        manifest = source.folder.manifest
        # Held-out losses have no alignment.
        is_aligned = config.objective.alignment and data is config.data
        if is_aligned and manifest.num_images and manifest.image_kind != "pixels":
            raise UserError(
                f"objective.alignment: its model sees pixels, and {source.key} keeps {manifest.images}; "
                "preprocess it with image_storage: pixels, or leave objective.alignment out"
            )
        if source.folder.manifest.image_kind == "pixels":
            shape = replace(shape, pixels_per_latent=codec.downsampling)
    return DataLoader(
        data,
        sources,
        shape,
        tokenizer,
        config.objective.noise_process.build(),
        config.train.global_batch_size,
        rows_of_rank(config.train.global_batch_size, mesh),
        config.train.micro_batch_size,
        # A linear adapter takes no time, and shapes must not change between stages.
        drops_unused_slots=config.model.adapter == "unet" and mesh.size("pipeline") == 1,
    )


def _validation_data(data: DataConfig, validation: ValidationConfig, global_batch_size: int) -> DataConfig:
    """How held-out documents are read: as those of training, but none is changed or left out at random."""
    fixed = {"caption_dropout": 0, "crop": 1, "flip": 0, "num_workers": 0, "on_error": "fail"}
    streams = {"num_streams": global_batch_size}
    return data.model_copy(update={"sources": validation.sources, "validation": None} | fixed | streams)


def build_engine(
    config: RunConfig, mesh: Mesh, is_read: Callable[[str], bool] = lambda name: False
) -> Engine:
    """The engine of a run. Called by every rank. is_read: see `make_engine`."""
    return make_engine(
        mesh,
        model=config.model,
        objective=config.objective,
        optimizer=config.optimizer,
        train=config.train,
        resilience=config.resilience,
        shape=config.sequence_shape,
        seed=config.seed,
        is_read=is_read,
    )


def _check_compiler() -> None:
    """Raise UserError if torch.compile would not find a C++ compiler at the first step."""
    names = [os.environ.get("CXX") or "g++", "c++", "clang++"]
    if not torch.cuda.is_available() and not any(map(shutil.which, names)):
        raise UserError(
            "train.compile: true needs a C++ compiler on a CPU, and none is on the PATH; on Debian: "
            "apt-get install g++, or set it to false"
        )


def _check_rows(key: str, manifest: Manifest, config: RunConfig) -> None:
    """Raise UserError if a source's latents do not fit the model."""
    model = config.model
    sizes = [shape[1:] for shape in manifest.latent_shapes]
    if not set(sizes) <= set(model.latent_sizes):
        factor = model.latent_downsampling
        wanted = [list(size) for size in model.image_sizes]
        wanted += [[h * factor, w * factor] for h, w in sizes if (h, w) not in model.latent_sizes]
        raise UserError(
            f"{key}: latents of {format_sizes(sizes)}, but the model's are "
            f"{format_sizes(model.latent_sizes)} (model.image_sizes / model.latent_downsampling); a model "
            "may have more sizes than its shards, not fewer: set model.image_sizes: "
            f"{wanted}, or leave it out"
        )


def make_pipeline(
    config: RunConfig, tokenizer: Tokenizer, codec: ImageCodec, training_flops: float | None = None
) -> TransfusionPipeline:
    """A pipeline of a run's model, with weights not loaded yet. training_flops: see PipelineConfig."""
    pipeline_config = PipelineConfig(
        model=config.model,
        objective=config.objective.model_copy(update={"alignment": None}),
        sampling=config.sampling,
        sequence_length=config.data.sequence_length,
        training_flops=training_flops,
    )
    return TransfusionPipeline(build_model(pipeline_config), tokenizer, codec, pipeline_config)
