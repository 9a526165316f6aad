"""The manifest of a folder of shards: its contents and origin. Imports no torch."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from megafusion.config import Config, parse_config
from megafusion.data.remote import is_remote, read_remote
from megafusion.errors import UserError
from megafusion.images.sizes import Size, format_sizes
from megafusion.storage import write_file

MANIFEST = "manifest.json"
Kind = Literal["pair", "text", "interleaved"]
FOLDERS: dict[Kind, str] = {"pair": "pairs", "text": "text", "interleaved": "interleaved"}
"""Folder that preprocessing writes each kind to."""


class ShardEntry(Config):
    """One shard of a folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
    """File name of the tar; never a path."""
    num_documents: int
    """Documents in it."""
    num_bytes: int
    """Size of the tar; another size on disk means a truncated or altered file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the tar."""


class ShardSummary(Config):
    """A shard's contribution to the manifest, under the same names."""

    entry: ShardEntry
    num_tokens: int
    num_images: int
    max_images: int
    max_tokens_beside_images: int
    images_by_size: dict[str, int] = Field({})


class Manifest(Config):
    """Contents of a folder of shards, and what it was made with."""

    format: Literal["megafusion-shards/1"] = "megafusion-shards/1"
    """Version of the layout."""
    kind: Kind
    """pair: one text and one image a document, in either order; text: texts only; interleaved: any texts and
    images, in the order in which the model sees them."""
    num_tokens: int
    """Text tokens, without bos, eos, boi and eoi."""
    num_images: int
    """Images."""
    max_images: int = 0
    """Maximum images of a document."""
    max_tokens_beside_images: int = 0
    """Maximum text tokens of a document with images."""
    images: Literal["latents", "pictures", "codes"] = "latents"
    """latents, codes: encoded once, by the autoencoder of vae_sha256 (an AutoencoderKL, a VQModel);
    pictures: pixels, encoded in training."""
    tokenizer_sha256: str
    """Hash of the tokenizer file that made the tokens."""
    vae_sha256: str | None = None
    """Hash of the autoencoder that made the latents or codes; null without them."""
    latent_shape: tuple[int, int, int] | None = None
    """Channels (0 for codes), height and width of the latents or codes; null without them."""
    codebook_size: int = 0
    """Codes that an image's positions may have; 0 without codes."""
    more_sizes: tuple[Size, ...] = ()
    """Further heights and widths that latents may have."""
    images_by_size: dict[str, int] = Field({})
    """Images by height and width of their latents, as 32x32, if there are several; see count_by_size."""
    latent_scale: float = 1.0
    """Factor that gives latents unit standard deviation: the autoencoder's scaling_factor."""
    latent_shift: float = 0.0
    """Subtracted before scaling: the autoencoder's shift_factor."""
    provenance: dict[str, str]
    """Inputs and versions, for people."""
    shards: tuple[ShardEntry, ...]
    """The tars, in order."""

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def image_kind(self) -> Literal["moments", "pixels", "codes"]:
        """Kind of the segments of images."""
        kinds: dict[str, Literal["moments", "pixels", "codes"]]
        kinds = {"latents": "moments", "pictures": "pixels", "codes": "codes"}
        return kinds[self.images]

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Every shape that the latents of an image may have; empty without latents."""
        if self.latent_shape is None:
            return ()
        return (self.latent_shape, *((self.latent_shape[0], *size) for size in self.more_sizes))

    @property
    def count_by_size(self) -> dict[Size, int]:
        """Images by height and width of their latents; 0 for sizes that no image has."""
        sizes = [shape[1:] for shape in self.latent_shapes]
        if len(sizes) == 1:
            return {sizes[0]: self.num_images}
        return {size: self.images_by_size.get(format_sizes([size]), 0) for size in sizes}


def write_manifest(folder: Path, summaries: Sequence[ShardSummary], fields: dict) -> Manifest:
    """Write the manifest of a folder's shards; `fields` are those that the documents do not determine."""
    manifest = Manifest(
        num_tokens=sum(shard.num_tokens for shard in summaries),
        num_images=sum(shard.num_images for shard in summaries),
        max_images=max((shard.max_images for shard in summaries), default=0),
        max_tokens_beside_images=max((shard.max_tokens_beside_images for shard in summaries), default=0),
        images_by_size=dict(sorted(sum((Counter(s.images_by_size) for s in summaries), Counter()).items())),
        shards=tuple(shard.entry for shard in summaries),
        **fields,
    )
    # Manifests of one size keep the bytes that they had before there were several.
    unused = set() if manifest.more_sizes else {"more_sizes", "images_by_size"}
    unused |= set() if manifest.codebook_size else {"codebook_size"}
    write_file(folder / MANIFEST, manifest.model_dump_json(indent=1, exclude=unused) + "\n")
    return manifest


def load_manifest(folder: Path | str) -> Manifest:
    """The manifest of a folder of shards, or of a URL. Raises UserError if there is none."""
    where = f"{folder}/{MANIFEST}"
    if is_remote(folder):
        content = read_remote(where)
    elif Path(where).is_file():
        content = Path(where).read_bytes()
    else:
        inside = [name for name in FOLDERS.values() if Path(folder, name, MANIFEST).is_file()]
        named = " or ".join(f"{folder}/{name}" for name in inside)
        way_out = f"name {named}" if inside else "make it with `megafusion preprocess`"
        raise UserError(f"{folder}: not a folder of shards (no {MANIFEST}); {way_out}")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); preprocess again") from error
    return parse_config(Manifest, values, where)
