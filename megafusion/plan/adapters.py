"""Sizes of the adapters' tensors and their FLOPs, as model/adapters/ makes them."""

from collections.abc import Iterator
from typing import NamedTuple

from megafusion.model.config import ModelConfig

NUM_FREQUENCIES = 256  # sines and cosines of TimestepEmbedding


class Layer(NamedTuple):
    """A module's tensors, and the FLOPs of its forward pass for an image."""

    tensors: tuple[int, ...]
    """Numbers in each tensor."""
    flops: int = 0
    features: int = 0
    """Numbers that it outputs for an image, where backward reads them."""


class Adapter(NamedTuple):
    """The adapter's two halves."""

    down: tuple[Layer, ...]
    up: tuple[Layer, ...]
    skips: int = 0
    """Numbers of an image's features that pipeline stages send from one half to the other."""


def num_weights(layers: tuple[Layer, ...]) -> int:
    return sum(sum(layer.tensors) for layer in layers)


def num_flops(layers: tuple[Layer, ...]) -> int:
    return sum(layer.flops for layer in layers)


def num_features(layers: tuple[Layer, ...]) -> int:
    return sum(layer.features for layer in layers)


def adapter_layers(model: ModelConfig) -> Adapter:
    """The layers of a model's adapter, for an image of the first size; none where images are codes."""
    if model.codebook_size:
        return Adapter((), ())
    return _LAYERS[model.adapter](model)


def _linear(inputs: int, outputs: int, positions: int) -> Layer:
    return Layer((inputs * outputs, outputs), 2 * inputs * outputs * positions, outputs * positions)


def _conv(inputs: int, outputs: int, pixels: int, side: int = 3) -> Layer:
    weights = side * side * inputs * outputs
    is_shortcut = side == 1  # whose output is only added
    return Layer((weights, outputs), 2 * weights * pixels, 0 if is_shortcut else outputs * pixels)


def _norm(channels: int, pixels: int) -> Layer:
    return Layer((channels, channels), 0, 3 * channels * pixels)  # normalized, scaled, and SiLU's output


def _features(numbers: int) -> Layer:
    return Layer((), 0, numbers)


def _timestep(size: int) -> list[Layer]:
    return [_linear(NUM_FREQUENCIES, size, 1), _linear(size, size, 1)]


def _linear_adapter(model: ModelConfig) -> Adapter:
    size, patches = model.latent_channels * model.patch_size**2, model.patches[0]
    down = [*_timestep(size), _linear(size, model.hidden_size, patches)]
    return Adapter(tuple(down), (_linear(model.hidden_size, size, patches),))


def _residual(inputs: int, outputs: int, embedding: int, pixels: int) -> Iterator[Layer]:
    """diffusers' ResnetBlock2D."""
    yield _norm(inputs, pixels)
    yield _conv(inputs, outputs, pixels)
    yield _linear(embedding, outputs, 1)
    yield _norm(outputs, pixels)
    yield _conv(outputs, outputs, pixels)
    if inputs != outputs:
        yield _conv(inputs, outputs, pixels, side=1)


def _unet_adapter(model: ModelConfig) -> Adapter:
    (height, width), base = model.latent_sizes[0], model.unet_channels
    num_levels = model.patch_size.bit_length()
    levels = [(base * (2 if level else 1), height * width >> 2 * level) for level in range(num_levels)]
    embedding, channels = 4 * base, base
    down = [*_timestep(embedding), _conv(model.latent_channels, base, height * width)]
    for number, (size, pixels) in enumerate(levels):
        if number:
            down.append(_conv(channels, channels, pixels))
        down += [*_residual(channels, size, embedding, pixels), *_residual(size, size, embedding, pixels)]
        channels = size
    down.append(_linear(channels, model.hidden_size, model.patches[0]))
    up = [*_timestep(embedding), _linear(model.hidden_size, channels, model.patches[0])]
    for number, (size, pixels) in enumerate(reversed(levels)):
        if number:
            up.append(_conv(channels, channels, pixels))
        for inputs in (channels + size, 2 * size):
            # With the skip; what is concatenated is not saved itself.
            up += [_features((inputs - size) * pixels), *_residual(inputs, size, embedding, pixels)]
        channels = size
    up += [
        _features(channels * height * width),
        _norm(channels, height * width),
        _conv(channels, model.latent_channels, height * width),
    ]
    largest = max(rows * columns for rows, columns in model.latent_sizes)  # the others' are padded
    skips = sum(2 * size * (largest >> 2 * level) for level, (size, _) in enumerate(levels))
    return Adapter(tuple(down), tuple(up), skips)


_LAYERS = {"linear": _linear_adapter, "unet": _unet_adapter}
