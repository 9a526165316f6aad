"""Frozen feature networks for perceptual losses: VGG-16 and ResNet-50 trunks, torchvision's names."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from megafusion.errors import UserError

# ImageNet's mean and standard deviation per channel, for images in [-1, 1].
MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)


class _Features(nn.Module):
    """A frozen trunk; its batch norms always use their running statistics."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "_Features":
        return super().train(False)

    def normalized(self, images_N3HW: Tensor) -> Tensor:
        return (images_N3HW - self.mean) / self.std


class VGG16Features(_Features):
    """Images [N, 3, H, W] in [-1, 1] to the features after relu1_2, 2_2, 3_3, 4_3 and 5_3."""

    channels = (64, 128, 256, 512, 512)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for out_channels, num_convolutions in zip(self.channels, (2, 2, 3, 3, 3), strict=True):
            for _ in range(num_convolutions):
                layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU()]
                in_channels = out_channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, images_N3HW: Tensor) -> list[Tensor]:
        x = self.normalized(images_N3HW)
        found = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]


class ResNet50Features(_Features):
    """Images [N, 3, H, W] in [-1, 1] to the outputs of the four stages."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self._stage(64, 64, 3, 1)
        self.layer2 = self._stage(256, 128, 4, 2)
        self.layer3 = self._stage(512, 256, 6, 2)
        self.layer4 = self._stage(1024, 512, 3, 2)

    @staticmethod
    def _stage(in_channels: int, width: int, num_blocks: int, stride: int) -> nn.Sequential:
        first = _Bottleneck(in_channels, width, stride)
        return nn.Sequential(first, *(_Bottleneck(4 * width, width, 1) for _ in range(num_blocks - 1)))

    def forward(self, images_N3HW: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(self.normalized(images_N3HW)))), 3, 2, 1)
        found = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            found.append(x)
        return found


class _Bottleneck(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if in_channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


def load_weights(network: nn.Module, path: Path | None, key: str) -> None:
    """Load and freeze a feature network; other tensors of the file (a classifier) are ignored.

    UserError, naming the file and the configuration's `key`, if there is none or it lacks a weight.
    """
    if path is None:
        weight = key.removesuffix("s")
        raise UserError(f"{weight} is above 0, so {key} must name a safetensors file; or set {weight}=0")
    weights = _read(path, key)
    for name, own in network.state_dict().items():
        # Many exports lack batch norm's batch count, which evaluation does not use.
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, own)
        elif name not in weights or weights[name].shape != own.shape:
            raise UserError(f"{key}: {path}: lacks {name} of shape {tuple(own.shape)}")
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    network.eval().requires_grad_(False)


def load_heads(path: Path, key: str) -> list[Tensor]:
    """LPIPS' learned weights for VGG-16, one [C] per level: lin0.model.1.weight [1, C, 1, 1] and so on."""
    weights = _read(path, key)
    heads = []
    for level, num in enumerate(VGG16Features.channels):
        name = f"lin{level}.model.1.weight"
        if name not in weights or weights[name].numel() != num:
            raise UserError(f"{key}: {path}: lacks {name} of {num} numbers")
        heads.append(weights[name].flatten())
    return heads


def _read(path: Path, key: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {path}: not readable as a safetensors file ({error})") from error
