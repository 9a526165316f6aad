"""RunConfig: the configuration of a run, composed of the sections of its components. Imports no torch."""

from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from megafusion.checkpoint.config import CheckpointConfig
from megafusion.config import Config
from megafusion.data.config import DataConfig
from megafusion.engine.config import OptimizerConfig, TrainConfig
from megafusion.model.config import ModelConfig
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from megafusion.parallel.config import ParallelConfig
from megafusion.parallel.degrees import check_degrees
from megafusion.resilience.config import ResilienceConfig
from megafusion.telemetry.config import TelemetryConfig

if TYPE_CHECKING:
    from megafusion.plan.job import Job
    from megafusion.plan.rows import RowKind
    from megafusion.sequence.packing import SequenceShape


class SamplesConfig(Config):
    """Sample sheets: images drawn and captions written while training."""

    every: int = Field(0, ge=0)
    """Steps between two sample sheets, a multiple of checkpoint.every; 0 for none."""
    num_pairs: int = Field(8, gt=0)
    """Pairs of the first pair source whose captions are drawn and whose images are described."""


class RunConfig(Config):
    """Everything that decides a run's numbers, and where it is kept."""

    renamed_keys: ClassVar[dict[str, str]] = {"health": "resilience"}

    out: Path
    """Run folder: frozen configuration, metrics, checkpoints, samples."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights and of the data order."""
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    sampling: SamplingConfig = SamplingConfig()
    samples: SamplesConfig = SamplesConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.train.precision != "fp32" and self.parallel.zero_stage == 0:
            raise ValueError(
                f"train.precision {self.train.precision} needs float32 master weights, which ZeRO stage 0 "
                "does not keep; set parallel.zero_stage: 1"
            )
        if self.parallel.async_tensor and not self.train.compile:
            raise ValueError("parallel.async_tensor is the work of torch.compile; set train.compile: true")
        if self.parallel.async_tensor and self.train.precision == "fp8":
            raise ValueError(
                "parallel.async_tensor has no effect with train.precision fp8, whose products are "
                "transformer-engine's; set parallel.async_tensor: false, or train.precision: bf16"
            )
        if self.train.lora and self.train.freeze:
            raise ValueError(
                "train.freeze: with train.lora all weights but its own are frozen; leave train.freeze out"
            )
        is_fp8, weights = self.train.precision == "fp8", self.model.modality_weights
        if weights != "none" and (self.train.lora or is_fp8):
            raise ValueError(
                f"train.{'lora' if self.train.lora else 'precision fp8'} is not supported with "
                f"model.modality_weights {weights}; leave one of them out"
            )
        if self.train.lora and is_fp8:
            raise ValueError("train.lora is not supported with train.precision fp8; use bf16")
        self._check_alignment()
        if self.data.t_per != "image" and (codes := self.model.codebook_size):
            raise ValueError(
                f"data.t_per {self.data.t_per} with model.codebook_size {codes}: images of codes are not "
                "noised and have no t; leave one of them out"
            )
        clean_context = self.data.clean_context
        positions = max(self.model.patches) * (2 if clean_context else 1) + 4  # bos, boi, eoi, eos
        if positions > self.data.sequence_length:
            twice = " with data.clean_context true, which holds it twice" if clean_context else ""
            raise ValueError(
                f"an image takes {positions} positions{twice}, more than data.sequence_length "
                f"{self.data.sequence_length}; raise it or model.patch_size"
            )
        for key, value, is_other in (
            ("codebook_size", self.model.codebook_size, self.model.codebook_size > 0),
            ("image_attention", "causal", self.model.image_attention == "causal"),
        ):
            if clean_context and is_other:
                raise ValueError(
                    f"data.clean_context true is for images that are denoised and whose patches see one "
                    f"another, not for model.{key} {value}; leave one of them out"
                )
        if reason := self.objective.noise_process.build().unsupported_reason(self.sampling):
            raise ValueError(reason)
        validation, log_every = self.data.validation, self.telemetry.log_every
        if validation and validation.every % log_every:
            raise ValueError(
                f"data.validation.every {validation.every} is not a multiple of telemetry.log_every "
                f"{log_every}: its losses are in the lines of metrics"
            )
        if self.checkpoint.keep_best and not (validation and self.checkpoint.every % validation.every == 0):
            raise ValueError(
                f"checkpoint.keep_best needs data.validation, and checkpoint.every {self.checkpoint.every} "
                "to be a multiple of data.validation.every"
            )
        if self.samples.every % self.checkpoint.every:
            raise ValueError(
                f"samples.every {self.samples.every} is not a multiple of checkpoint.every "
                f"{self.checkpoint.every}: sheets are drawn from checkpoints"
            )
        return self

    def _check_alignment(self) -> None:
        """Raise ValueError where objective.alignment does not go with another key."""
        if not (alignment := self.objective.alignment):
            return
        if alignment.layer > self.model.num_layers:
            raise ValueError(
                f"objective.alignment.layer {alignment.layer} is above model.num_layers "
                f"{self.model.num_layers}; name one of the blocks"
            )
        others = {
            f"parallel.pipeline {self.parallel.pipeline}": self.parallel.pipeline > 1,
            f"model.codebook_size {self.model.codebook_size}": self.model.codebook_size > 0,
            "train.lora": bool(self.train.lora),
        }
        if found := [name for name, is_given in others.items() if is_given]:
            raise ValueError(f"objective.alignment is not supported with {found[0]}; leave one of them out")

    def warnings(self) -> list[str]:
        """Values that cannot do what they say, and what happens instead."""
        optimizer, num_steps, warnings = self.optimizer, self.train.num_steps, []
        if optimizer.num_warmup_steps >= num_steps:
            last = optimizer.learning_rate * num_steps / optimizer.num_warmup_steps
            warnings.append(
                f"optimizer.num_warmup_steps {optimizer.num_warmup_steps} is not below train.num_steps "
                f"{num_steps}: the learning rate only rises, to {last:.3g} at the last step"
            )
        if optimizer.final_learning_rate > optimizer.learning_rate and optimizer.schedule != "constant":
            warnings.append(
                f"optimizer.final_learning_rate {optimizer.final_learning_rate:.3g} is above "
                f"optimizer.learning_rate {optimizer.learning_rate:.3g}: it rises after the warm-up, too"
            )
        if (self.train.lora or self.train.freeze) and not self.train.init_from:
            key = "lora" if self.train.lora else "freeze"
            warnings.append(f"train.{key}: without train.init_from, the frozen weights stay random")
        every, keep_every = self.checkpoint.every, self.checkpoint.keep_every
        if keep_every % every:
            warnings.append(
                f"checkpoint.keep_every {keep_every} is not a multiple of checkpoint.every {every}: steps "
                f"that are a multiple of {lcm(every, keep_every)} are kept"
            )
        if self.sampling.guidance_scale != 1 and not self.data.caption_dropout:
            warnings.append(
                f"data.caption_dropout 0 trains no image without its caption, so sampling.guidance_scale "
                f"{self.sampling.guidance_scale} guides by what was never trained; set it to 1"
            )
        return [f"warning: {warning}" for warning in warnings]

    def check_degrees(self, world_size: int) -> None:
        """Raise UserError if the degrees of parallelism do not divide what they shard on so many ranks."""
        check_degrees(
            self.model,
            self.parallel,
            sequence_length=self.data.sequence_length,
            global_batch_size=self.train.global_batch_size,
            micro_batch_size=self.train.micro_batch_size,
            world_size=world_size,
        )

    def job(self, world_size: int, rows: "RowKind" = "mixed") -> "Job":
        """The input of a plan of this run on so many ranks."""
        from megafusion.plan.job import Job

        data = self.data
        return Job(
            self.model,
            self.train,
            self.parallel,
            data.sequence_length,
            data.images_per_row,
            world_size,
            rows,
            data.clean_context,
            self.objective.alignment is not None,
        )

    @property
    def sequence_shape(self) -> "SequenceShape":
        """The shape of a packed row that data and model agree on."""
        from megafusion.sequence.packing import SequenceShape

        data, model = self.data, self.model
        return SequenceShape(
            data.sequence_length,
            data.images_per_row,
            model.patches,
            model.latent_channels,
            model.latent_sizes,
            causal_images=model.image_attention == "causal",
            clean_context=data.clean_context,
        )
