"""The autoencoder's loss: reconstruction, KL or codebook, perceptual, identity and adversarial terms.

The paper's objective is L1 + LPIPS + 0.5 GAN + 0.2 identity + 1e-6 KL. A term of weight zero is neither built
nor computed.
"""

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.vae.config import LossConfig
from data_prep.vae.features import ResNet50Features, VGG16Features, load_heads, load_weights
from megafusion.images.autoencoder import Quantized


class AutoencoderLoss(nn.Module):
    """Weighted terms of the loss, as the configuration sets them.

    The identity term is the paper's L_ID, "a perceptual loss based on internal features of the MoCo v2
    model" (quoted from memory). Features and distance are our choice: the outputs of ResNet-50's four stages,
    under the distance of LPIPS without learned heads.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual: VGG16Features | None = None
        self.identity: ResNet50Features | None = None
        self.discriminator: PatchDiscriminator | None = None
        self.heads: list[Tensor] | None = None
        if config.perceptual_weight:
            self.perceptual = VGG16Features()
            load_weights(self.perceptual, config.perceptual_weights, "loss.perceptual_weights")
            if config.perceptual_heads:
                self.heads = load_heads(config.perceptual_heads, "loss.perceptual_heads")
        if config.identity_weight:
            self.identity = ResNet50Features()
            load_weights(self.identity, config.identity_weights, "loss.identity_weights")
        if config.adversarial_weight:
            sizes = config.discriminator_channels, config.discriminator_layers
            self.discriminator = PatchDiscriminator(*sizes)

    def is_adversarial_at(self, step: int) -> bool:
        """Whether this step trains the discriminator and has an adversarial term."""
        return self.discriminator is not None and step >= self.config.adversarial_start_step

    def forward(
        self,
        images: Tensor,
        reconstructions: Tensor,
        posterior: DiagonalGaussianDistribution | Quantized,
        step: int,
    ) -> dict[str, Tensor]:
        """Weighted terms, whose sum the autoencoder minimizes; images [N, 3, H, W], about [-1, 1]."""
        config = self.config
        difference = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
        terms = {"reconstruction": difference(reconstructions, images)}
        if isinstance(posterior, Quantized):
            terms["codebook"] = F.mse_loss(posterior.vectors.float(), posterior.latents.detach().float())
            distance = F.mse_loss(posterior.latents.float(), posterior.vectors.detach().float())
            terms["commitment"] = config.commitment_weight * distance
        elif config.kl_weight:
            terms["kl"] = config.kl_weight * posterior.kl().mean()
        if self.perceptual is not None:
            distance = feature_distance(self.perceptual, images, reconstructions, self.heads)
            terms["perceptual"] = config.perceptual_weight * distance
        if self.identity is not None:
            distance = feature_distance(self.identity, images, reconstructions)
            terms["identity"] = config.identity_weight * distance
        if self.discriminator is not None and self.is_adversarial_at(step):
            terms["adversarial"] = config.adversarial_weight * -self.discriminator(reconstructions).mean()
        return terms

    def discriminator_loss(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Hinge loss of the discriminator; the autoencoder receives no gradient."""
        assert self.discriminator
        real = self.discriminator(images)
        fake = self.discriminator(reconstructions.detach())
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def feature_distance(
    network: nn.Module, images: Tensor, reconstructions: Tensor, heads: list[Tensor] | None = None
) -> Tensor:
    """LPIPS (Zhang et al., arXiv 1801.03924, equation 1), the mean over images [N, 3, H, W] in [-1, 1].

    Each level's features are normalized to unit length at every position; squared differences are summed over
    channels (weighted by `heads`, one [C] per level), averaged over positions and summed over levels.
    """
    with torch.no_grad():
        targets = network(images)
    total = images.new_zeros(())
    for level, (a, b) in enumerate(zip(targets, network(reconstructions), strict=True)):
        squared_NCHW = (_unit(a) - _unit(b)).square()
        if heads is not None:
            squared_NCHW = squared_NCHW * heads[level].to(squared_NCHW).view(1, -1, 1, 1)
        total = total + squared_NCHW.sum(1).mean()
    return total


def _unit(features_NCHW: Tensor) -> Tensor:
    # The epsilon is inside the root: outside it, an all-zero position would have an infinite gradient.
    return features_NCHW / (features_NCHW.square().sum(1, keepdim=True) + 1e-10).sqrt()


class PatchDiscriminator(nn.Sequential):
    """PatchGAN of pix2pix (arXiv 1611.07004): images [N, 3, H, W] to logits of patches [N, 1, h, w]."""

    def __init__(self, channels: int, num_layers: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        in_channels = channels
        for level in range(1, num_layers + 1):
            out_channels = channels * min(2**level, 8)
            stride = 1 if level == num_layers else 2
            layers += [
                nn.Conv2d(in_channels, out_channels, 4, stride, 1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.LeakyReLU(0.2),
            ]
            in_channels = out_channels
        super().__init__(*layers, nn.Conv2d(in_channels, 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
