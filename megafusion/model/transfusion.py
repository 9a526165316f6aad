"""The whole model: stem, blocks and tail, which pipeline stages divide among them."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from megafusion.model.adapters import Skips, adapter_module
from megafusion.model.attention import check_backend
from megafusion.model.config import ModelConfig
from megafusion.model.rope import rope_positions
from megafusion.model.transformer import Block, block_context
from megafusion.model.weights import Replicated, declare
from megafusion.model.wrapper import canonical_name
from megafusion.objective.alignment import Alignment
from megafusion.objective.config import ObjectiveConfig
from megafusion.objective.head import LanguageHead
from megafusion.objective.losses import Losses, Objective
from megafusion.sequence.packing import PackedBatch


class Stem(nn.Module):
    """Tokens and noised latents to the residual stream: Megatron's pre_process stage.

    A model with a codebook has no adapter: its images are tokens.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embedding = declare(nn.Embedding(config.vocab_size, config.hidden_size), "vocab")
        self.adapter = _adapter("Down", config)

    def forward(
        self,
        tokens_BS: Tensor,
        patch_index_BS: Tensor,
        latents_BNCHW: Tensor,
        timesteps_BN: Tensor,
        image_size_BN: Tensor,
        clean: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Skips]:
        """x [B, S, D] with patches at their positions, and skips; image_size_BN: index of each size. clean:
        with clean context, clean latents and their timesteps."""
        if self.adapter is None:
            return self.embedding(tokens_BS), ()
        patches_BPD, skips = self._patches(latents_BNCHW, timesteps_BN, image_size_BN)
        if clean is not None:
            patches_BPD = torch.cat([patches_BPD, self._patches(*clean, image_size_BN)[0]], dim=1)
        index = patch_index_BS.clamp(min=0).long()[..., None].expand(-1, -1, patches_BPD.shape[-1])
        is_patch = patch_index_BS[..., None] >= 0
        return torch.where(is_patch, patches_BPD.gather(1, index), self.embedding(tokens_BS)), skips

    def _patches(
        self, latents_BNCHW: Tensor, timesteps_BN: Tensor, image_size_BN: Tensor
    ) -> tuple[Tensor, Skips]:
        """Patches [B, N x P, D], and skips."""
        latents_NCHW = latents_BNCHW.flatten(0, 1).to(self.embedding.weight.dtype)
        patches_NPD, skips = self.adapter(latents_NCHW, timesteps_BN.flatten(), image_size_BN.flatten())
        return patches_NPD.unflatten(0, (len(latents_BNCHW), -1)).flatten(1, 2), skips


class Tail(nn.Module):
    """The last norm, the language head, and the adapter back to latents: Megatron's post_process stage."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.max_patches = max(config.patches)
        self.norm = declare(nn.RMSNorm(config.hidden_size, eps=config.norm_eps), Replicated("positions"))
        self.head = declare(LanguageHead(config.hidden_size, config.vocab_size), "vocab")
        self.adapter = _adapter("Up", config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Normalised hidden states [B, S, D], which `head` and `images` read."""
        return self.norm(x_BSD)

    def images(
        self, hidden_BSD: Tensor, start_BN: Tensor, timesteps_BN: Tensor, skips: Skips, image_size_BN: Tensor
    ) -> Tensor:
        """Predictions [B, N, C, H, W] of images whose patches begin at start_BN; C is 0 with a codebook."""
        if self.adapter is None:
            return hidden_BSD.new_zeros(*start_BN.shape, 0, 1, 1)
        hidden_NPD = at_patches(hidden_BSD, start_BN, self.max_patches)
        images_NCHW = self.adapter(hidden_NPD, timesteps_BN.flatten(), skips, image_size_BN.flatten())
        return images_NCHW.unflatten(0, start_BN.shape)


def at_patches(hidden_BSD: Tensor, start_BN: Tensor, num_patches: int) -> Tensor:
    """Hidden states [B x N, P, D] at the patches of the images that begin at start_BN."""
    patch = torch.arange(num_patches, device=hidden_BSD.device)
    # A small image at a row's end has fewer positions after its start than the largest image.
    index = (start_BN.clamp(min=0).long()[..., None] + patch).clamp(max=hidden_BSD.shape[1] - 1)
    index_BPD = index.flatten(1)[..., None].expand(-1, -1, hidden_BSD.shape[-1])
    return hidden_BSD.gather(1, index_BPD).unflatten(1, (-1, num_patches)).flatten(0, 1)


def alignment_errors(
    alignment: nn.Module, hidden_BSD: Tensor, start_BN: Tensor, features_BNPF: Tensor
) -> Tensor:
    """Errors [B, N] of `Alignment` for each image slot, from the hidden states of all positions."""
    hidden_NPD = at_patches(hidden_BSD, start_BN, features_BNPF.shape[2])
    return alignment(hidden_NPD, features_BNPF.flatten(0, 1)).unflatten(0, start_BN.shape)


def _adapter(half: Literal["Down", "Up"], config: ModelConfig) -> Any:
    """Half of the adapter of a model whose images are latents."""
    if config.codebook_size:
        return None
    return declare(getattr(adapter_module(config.adapter), half)(config), Replicated("images"))


def tie_embeddings(stem: Stem, tail: Tail) -> None:
    """Make the head's weight the embedding's: one parameter, with the embedding's name and start."""
    tail.head.weight = stem.embedding.weight


class Transfusion(nn.Module):
    """One transformer over text tokens and image patches, with both losses.

    clean_context: whether the batches that `forward` takes hold each image twice, noised and clean.
    """

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig, clean_context: bool = False):
        super().__init__()
        self.clean_context = clean_context
        check_backend(config.attention, config.head_size)
        self.config, self.objective = config, Objective(objective, config.latent_sizes)
        self.stem = Stem(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.tail = Tail(config)
        self.alignment: Alignment | None = None
        if objective.alignment:
            self.alignment = declare(Alignment(config.hidden_size, objective.alignment), Replicated("images"))
        if config.tie_embeddings:
            tie_embeddings(self.stem, self.tail)

    def weights(self) -> dict[str, Tensor]:
        """Weights by canonical name, tied ones once: what is saved, and filled where a model is loaded."""
        return {canonical_name(name): parameter.detach() for name, parameter in self.named_parameters()}

    def forward(self, batch: PackedBatch) -> Losses:
        """Both losses of a packed batch, each a share of its mean over the global batch."""
        inputs = batch.inputs()
        noised = self.objective.noise_process.add_noise(inputs.latents, inputs.noise, inputs.t)
        timesteps, clean = self.objective.noise_process.timesteps(inputs.t), None
        if self.clean_context:
            clean = inputs.latents, self.objective.noise_process.timesteps(torch.zeros_like(inputs.t))
        x_BSD, skips = self.stem(
            inputs.tokens, inputs.patch_index, noised, timesteps, inputs.image_size, clean
        )
        positions = rope_positions(self.config, inputs.positions, inputs.patch_index, inputs.image_size)
        is_patch = inputs.patch_index >= 0
        intervals = batch.intervals(self.clean_context)
        context = block_context(self.config, intervals, positions, x_BSD.dtype, is_patch)
        alignment: list[Tensor] = []
        for number, block in enumerate(self.blocks, start=1):
            x_BSD = block(x_BSD, context)
            if self.alignment and self.objective.aligns(number) and inputs.features.ndim:
                errors = alignment_errors(self.alignment, x_BSD, inputs.image_start, inputs.features)
                alignment.append(errors)
        hidden_BSD = self.tail(x_BSD)
        images = self.tail.images(hidden_BSD, inputs.image_start, timesteps, skips, inputs.image_size)
        return self.objective(self.tail.head, hidden_BSD, images, batch.targets(), *alignment)
