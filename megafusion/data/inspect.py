"""Inspecting and verifying folders of shards."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from megafusion.data.decode import first_images, originals
from megafusion.data.document_format import StoredDocument, segment_kind
from megafusion.data.reader import ShardFolder
from megafusion.data.shards import document_offsets
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.progress import progress_bar
from megafusion.storage import file_sha256, write_file


def inspect_shards(folder: Path, vae: Path, out: Path, num_documents: int) -> None:
    """Print what a folder of shards holds; write `out`: documents with pictures decoded from their latents.

    Documents are taken evenly from the folder. Raises UserError where the autoencoder at `vae` is not the one
    that made the latents.
    """
    shards = ShardFolder(folder)
    chosen = [shards.read(*place) for place in _evenly(shards, num_documents)]
    Console().print(_table(shards, chosen))
    if shards.manifest.num_images:
        pictured = filter(_has_image, chosen if any(map(_has_image, chosen)) else _all(shards))
        _write_page(shards, list(islice(pictured, num_documents)), vae, out)
        return
    for document in chosen[:3]:
        print(f"tokens: {document.segments[0][:24].tolist()} ...")


def _has_image(document: StoredDocument) -> bool:
    return bool(first_images([document]))


def _all(shards: ShardFolder) -> Iterator[StoredDocument]:
    for number, entry in enumerate(shards.manifest.shards):
        yield from (shards.read(number, position) for position in range(entry.num_documents))


def verify_shards(folder: Path) -> None:
    """Hash every shard and make its index anew. UserError naming the first file that differs."""
    shards = ShardFolder(folder)
    with progress_bar() as progress:
        task = progress.add_task(f"verifying {folder}", total=len(shards.manifest.shards), losses="")
        for entry in shards.manifest.shards:
            path = shards.folder / entry.name
            if file_sha256(path) != entry.sha256:
                raise UserError(
                    f"{path}: not as it was made (its hash differs); copy it again or preprocess again"
                )
            _check_index(path)
            progress.advance(task)
    print(f"{folder}: {len(shards.manifest.shards)} shards, {len(shards):,} documents, as they were made")


def _check_index(path: Path) -> None:
    """UserError where a shard's index is not the one that its bytes give."""
    index = path.with_suffix(".index.npy")
    try:
        is_same = np.array_equal(np.load(index, allow_pickle=False), document_offsets(path))
    except (OSError, ValueError, EOFError):
        is_same = False
    if not is_same:
        raise UserError(f"{index}: is not the index of {path.name}; copy it again or preprocess again")


def _evenly(shards: ShardFolder, number: int) -> list[tuple[int, int]]:
    """Shard and position of documents at equal distances."""
    sizes = [entry.num_documents for entry in shards.manifest.shards]
    ends = np.cumsum(sizes)
    wanted = [len(shards) * i // min(number, len(shards)) for i in range(min(number, len(shards)))]
    found = np.searchsorted(ends, wanted, side="right")
    return [(int(s), int(w - ends[s] + sizes[s])) for s, w in zip(found, wanted, strict=True)]


def _table(shards: ShardFolder, chosen: list[StoredDocument]) -> Table:
    manifest = shards.manifest
    lengths = sorted(sum(len(s) for s in d.segments if segment_kind(s) == "tokens") for d in chosen)
    table = Table("", "", title=str(shards.folder), show_header=False)
    table.add_row("kind", manifest.kind)
    table.add_row("documents", f"{manifest.num_documents:,} in {len(manifest.shards)} shards")
    table.add_row("bytes", decimal(sum(entry.num_bytes for entry in manifest.shards)))
    table.add_row("tokens, images", f"{manifest.num_tokens:,}, {manifest.num_images:,}")
    middle = lengths[len(lengths) // 2]
    table.add_row(f"tokens of {len(chosen)} documents", f"{lengths[0]} to {lengths[-1]}, median {middle}")
    shown = first_images(chosen)
    if not shown:
        pass
    elif manifest.images == "pictures":
        kept = shown
        table.add_row("pictures", f"kept as WebP, {decimal(sum(map(len, kept)) // len(kept))} each")
    else:
        numbers = np.concatenate([moments[0].ravel() for moments in shown])
        latents = (torch.from_numpy(numbers).float() - manifest.latent_shift) * manifest.latent_scale
        shapes = [" x ".join(map(str, shape)) for shape in manifest.latent_shapes]
        for shape, count in zip(shapes, manifest.count_by_size.values(), strict=True):
            table.add_row("latents" if shape == shapes[0] else "", f"{shape}: {count:,} images")
        table.add_row("", "normalised as a run sees them:")
        table.add_row("", f"mean {latents.mean():.3f}, deviation {latents.std():.3f}")
    for name, value in manifest.provenance.items():
        if name != "config":
            table.add_row("made with" if name == "megafusion" else "from", f"{name} {value[:12]}")
    return table


def _write_page(shards: ShardFolder, chosen: list[StoredDocument], vae: Path, out: Path) -> None:
    codec = ImageCodec.from_pretrained(vae)
    has_latents = shards.manifest.images == "latents"
    if has_latents and codec.hash != shards.manifest.vae_sha256:
        raise UserError(
            f"{vae}: is not the autoencoder that made the latents of {shards.folder} (hash "
            f"{codec.hash[:12]}, there {str(shards.manifest.vae_sha256)[:12]}); name that one with --vae"
        )
    images = first_images(chosen)
    captions = [str(document.metadata.get("caption", "")) for document in chosen]
    pictures = originals(images, codec)
    write_file(out, encode_png(make_image_grid(list(zip(captions, pictures, strict=True)))))
    how = "decoded from their latents" if has_latents else "as they are kept"
    print(f"{out}: {len(chosen)} pictures {how}, with captions")
