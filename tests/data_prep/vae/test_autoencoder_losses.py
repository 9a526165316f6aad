import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file

from data_prep.vae.config import LossConfig
from data_prep.vae.features import ResNet50Features, VGG16Features, load_weights
from data_prep.vae.losses import AutoencoderLoss, PatchDiscriminator, feature_distance
from megafusion.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of random weights under torchvision's names: VGG-16, ResNet-50, LPIPS' heads."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, network in (("vgg", VGG16Features()), ("resnet", ResNet50Features())):
        state = network.state_dict() | {"classifier.0.weight": torch.zeros(1)}
        save_file({k: v for k, v in state.items() if "num_batches" not in k}, folder / f"{name}.safetensors")
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(VGG16Features.channels)}
    save_file(heads, folder / "heads.safetensors")
    return folder


@pytest.fixture
def scene():
    """(images, reconstructions, moments of the posterior), the last two with gradients."""
    torch.manual_seed(1)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    reconstructions = (images + 0.3 * torch.randn_like(images)).requires_grad_()
    moments = torch.randn(2, 8, 4, 4, requires_grad=True)
    return images, reconstructions, moments


def gradients(config: LossConfig, scene, step: int = 1):
    torch.manual_seed(2)
    images, reconstructions, moments = scene
    loss = AutoencoderLoss(config)
    terms = loss(images, reconstructions, DiagonalGaussianDistribution(moments), step)
    found = torch.autograd.grad(sum(terms.values()), (reconstructions, moments), allow_unused=True)
    return terms, found


def test_l1_and_l2_are_means_over_pixels(scene):
    images, reconstructions, _ = scene
    difference = reconstructions - images
    (terms, (l1, moments)) = gradients(LossConfig(kl_weight=0), scene)
    assert list(terms) == ["reconstruction"]
    assert moments is None
    torch.testing.assert_close(terms["reconstruction"], difference.abs().mean())
    terms, (l2, _) = gradients(LossConfig(reconstruction="l2", kl_weight=0), scene)
    torch.testing.assert_close(terms["reconstruction"], difference.square().mean())
    assert not torch.allclose(l1, l2)


def test_divergence_is_summed_over_latents(scene):
    mean, log_variance = scene[2].chunk(2, dim=1)
    by_hand = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
    terms, (_, moments) = gradients(LossConfig(kl_weight=0.01), scene)
    torch.testing.assert_close(terms["kl"], 0.01 * by_hand)
    assert moments.abs().max() > 0


@pytest.mark.parametrize("term", ["perceptual", "identity", "adversarial"])
def test_each_term_has_a_weight_and_a_gradient(term, weights, scene):
    options = {
        "perceptual": {"perceptual_weights": weights / "vgg.safetensors"},
        "identity": {"identity_weights": weights / "resnet.safetensors"},
        "adversarial": {"adversarial_start_step": 1, "discriminator_channels": 4, "discriminator_layers": 2},
    }[term]
    plain, (before, _) = gradients(LossConfig(**options), scene)
    assert term not in plain
    half, (after, _) = gradients(LossConfig(**options, **{f"{term}_weight": 0.5}), scene)
    assert not torch.allclose(before, after)
    assert after.isfinite().all()
    full, _ = gradients(LossConfig(**options, **{f"{term}_weight": 1.0}), scene)
    torch.testing.assert_close(2 * half[term], full[term])


def test_equal_images_have_zero_distance_and_finite_gradients(weights, scene):
    network = VGG16Features()
    load_weights(network, weights / "vgg.safetensors", "key")
    same = scene[0].clone().requires_grad_()
    distance = feature_distance(network, scene[0], same)
    assert distance == 0
    assert torch.autograd.grad(distance, same)[0].isfinite().all()
    assert feature_distance(network, scene[0], scene[1]) > 0
    # All-zero features have no direction; distance and gradient must stay finite.
    for parameter in network.parameters():
        parameter.data.zero_()
    distance = feature_distance(network, scene[0], same)
    assert distance == 0
    assert torch.autograd.grad(distance, same)[0].isfinite().all()


def test_lpips_by_hand_with_learned_heads(weights, scene):
    config = LossConfig(
        perceptual_weight=1.0,
        perceptual_weights=weights / "vgg.safetensors",
        perceptual_heads=weights / "heads.safetensors",
    )
    loss = AutoencoderLoss(config)
    images, reconstructions, _ = scene
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    expected = 0.0
    a, b = (images - shift) / scale, (reconstructions - shift) / scale
    ends = (3, 8, 15, 22, 29)
    for index, layer in enumerate(loss.perceptual.features):
        a, b = layer(a), layer(b)
        if index in ends:
            unit = [x / x.norm(dim=1, keepdim=True).clamp(min=1e-5) for x in (a, b)]
            head = loss.heads[ends.index(index)].view(1, -1, 1, 1)
            expected = expected + ((unit[0] - unit[1]) ** 2 * head).sum(1).mean()
    terms, _ = gradients(config, scene)
    torch.testing.assert_close(terms["perceptual"], expected, rtol=1e-3, atol=1e-5)


def test_feature_networks_are_frozen_and_reach_the_known_shapes(weights):
    network = ResNet50Features()
    load_weights(network, weights / "resnet.safetensors", "key")
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    images = torch.zeros(1, 3, 64, 64)
    assert [tuple(x.shape[1:]) for x in network(images)] == [
        (256, 16, 16),
        (512, 8, 8),
        (1024, 4, 4),
        (2048, 2, 2),
    ]
    assert [tuple(x.shape[1:2]) for x in VGG16Features()(images)] == [(c,) for c in VGG16Features.channels]
    # torchvision's counts without the classifiers.
    assert sum(p.numel() for p in network.parameters()) == 23_508_032
    assert sum(p.numel() for p in VGG16Features().parameters()) == 14_714_688


def test_the_adversarial_term_starts_at_its_step(scene):
    config = LossConfig(adversarial_weight=0.5, adversarial_start_step=5, discriminator_layers=1)
    assert "adversarial" not in gradients(config, scene, step=4)[0]
    assert "adversarial" in gradients(config, scene, step=5)[0]


def test_the_discriminator_learns_without_gradients_to_the_autoencoder(scene):
    images, reconstructions, _ = scene
    config = LossConfig(adversarial_weight=0.5, discriminator_channels=8, discriminator_layers=2)
    torch.manual_seed(0)
    loss = AutoencoderLoss(config)
    assert isinstance(loss.discriminator, PatchDiscriminator)
    optimizer = torch.optim.Adam(loss.discriminator.parameters(), 2e-3)
    values = []
    for _ in range(20):
        value = loss.discriminator_loss(images, reconstructions)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert reconstructions.grad is None
    assert values[0] == pytest.approx(1, abs=0.2)  # hinge loss of an undecided discriminator
    assert values[-1] < 0.7 * values[0]


def test_missing_and_invalid_weights_are_named(tmp_path, weights):
    with pytest.raises(UserError, match=r"loss\.perceptual_weights must name"):
        AutoencoderLoss(LossConfig(perceptual_weight=1.0))
    with pytest.raises(UserError, match=r"identity_weights: .*nowhere\.safetensors: not readable"):
        AutoencoderLoss(LossConfig(identity_weight=1.0, identity_weights=tmp_path / "nowhere.safetensors"))
    with pytest.raises(UserError, match=r"resnet\.safetensors: lacks features\.0\.weight"):
        AutoencoderLoss(LossConfig(perceptual_weight=1.0, perceptual_weights=weights / "resnet.safetensors"))
    (tmp_path / "text.safetensors").write_text("not a tensor")
    with pytest.raises(UserError, match=r"perceptual_heads: .*text\.safetensors: not readable"):
        AutoencoderLoss(
            LossConfig(
                perceptual_weight=1.0,
                perceptual_weights=weights / "vgg.safetensors",
                perceptual_heads=tmp_path / "text.safetensors",
            )
        )
