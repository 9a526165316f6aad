"""Inspects and verifies folders of shards, for `megafusion data`."""

from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from megafusion.data.document_format import StoredDocument
from megafusion.data.images import decode, first_images
from megafusion.data.latent_statistics import LatentStatistics, latent_statistics, spread_documents
from megafusion.data.reader import ShardFolder
from megafusion.data.shards import INDEX, document_offsets
from megafusion.errors import UserError
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.progress import progress_bar
from megafusion.storage import file_sha256, write_file


def inspect_shards(folder: Path, vae: Path, out: Path, num_documents: int) -> None:
    """Print what a folder of shards holds, and write a sheet of its images with captions to `out`.

    Documents are taken at equal distances. Raises UserError if the autoencoder at `vae` did not make the
    latents.
    """
    shards = ShardFolder(folder)
    chosen = spread_documents(shards, num_documents)
    statistics = latent_statistics(chosen, shards.manifest)
    Console().print(_table(shards, chosen, statistics))
    if statistics and statistics.warning:
        print(f"warning: {folder}: {statistics.warning}")
    if shards.manifest.num_images:
        every = map(shards.read, range(len(shards)))
        with_images = filter(_has_image, chosen if any(map(_has_image, chosen)) else every)
        _write_sheet(shards, list(islice(with_images, num_documents)), vae, out)
        return
    for document in chosen[:3]:
        print(f"tokens: {document.segments[0].data[:24].tolist()} ...")


def verify_shards(folder: Path) -> None:
    """Hash every shard and recompute its index. Raises UserError naming the first file that differs."""
    shards = ShardFolder(folder)
    with progress_bar() as progress:
        task = progress.add_task(f"verifying {folder}", total=len(shards.manifest.shards), losses="")
        for entry in shards.manifest.shards:
            path = shards.folder / entry.name
            if file_sha256(path) != entry.sha256:
                raise UserError(f"{path}: altered (its hash differs); copy it again or preprocess again")
            _check_index(path)
            progress.advance(task)
    print(f"{folder}: {len(shards.manifest.shards)} shards, {len(shards):,} documents, as they were written")


def _has_image(document: StoredDocument) -> bool:
    return bool(first_images([document]))


def _check_index(path: Path) -> None:
    """Raises UserError if a shard's index is not the one that its bytes give."""
    index = path.with_suffix(INDEX)
    try:
        is_same = np.array_equal(np.load(index, allow_pickle=False), document_offsets(path))
    except (OSError, ValueError, EOFError):
        is_same = False
    if not is_same:
        raise UserError(f"{index}: is not the index of {path.name}; copy it again or preprocess again")


def _table(shards: ShardFolder, chosen: list[StoredDocument], statistics: LatentStatistics | None) -> Table:
    manifest = shards.manifest
    lengths = sorted(sum(len(s.data) for s in d.segments if s.kind == "tokens") for d in chosen)
    table = Table("", "", title=str(shards.folder), show_header=False)
    table.add_row("kind", manifest.kind)
    table.add_row("documents", f"{manifest.num_documents:,} in {len(manifest.shards)} shards")
    table.add_row("bytes", decimal(sum(entry.num_bytes for entry in manifest.shards)))
    table.add_row("tokens, images", f"{manifest.num_tokens:,}, {manifest.num_images:,}")
    median = lengths[len(lengths) // 2]
    table.add_row(f"tokens of {len(chosen)} documents", f"{lengths[0]} to {lengths[-1]}, median {median}")
    images = first_images(chosen)
    if images and manifest.image_kind == "pixels":
        mean_bytes = sum(len(image.data) for image in images) // len(images)
        table.add_row("images", f"pixels, WebP of {decimal(mean_bytes)} each")
    elif images and manifest.image_kind == "codes":
        used = len(np.unique(np.concatenate([image.data.ravel() for image in images])))
        for (height, width), count in manifest.count_by_size.items():
            table.add_row("codes", f"{height} x {width}: {count:,} images")
        table.add_row("", f"{used} of {manifest.codebook_size} codes in these documents")
    elif statistics:
        shapes = [" x ".join(map(str, shape)) for shape in manifest.latent_shapes]
        for shape, count in zip(shapes, manifest.count_by_size.values(), strict=True):
            table.add_row("latents" if shape == shapes[0] else "", f"{shape}: {count:,} images")
        deviation = f"mean {statistics.mean:.3f}, standard deviation {statistics.deviation:.3f}"
        table.add_row("", f"normalized as in training: {deviation}")
    for name, value in manifest.provenance.items():
        if name != "config":
            table.add_row("made with" if name == "megafusion" else "from", f"{name} {value[:12]}")
    return table


def _write_sheet(shards: ShardFolder, chosen: list[StoredDocument], vae: Path, out: Path) -> None:
    from megafusion.images.codec import ImageCodec  # imports diffusers

    codec = ImageCodec.from_pretrained(vae)
    kind = shards.manifest.images
    if kind != "pictures" and codec.hash != shards.manifest.vae_sha256:
        raise UserError(
            f"{vae}: is not the autoencoder that made the {kind} of {shards.folder} (hash "
            f"{codec.hash[:12]}, there {str(shards.manifest.vae_sha256)[:12]}); name that one with --vae"
        )
    captions = [str(document.metadata.get("caption", "")) for document in chosen]
    images = decode(first_images(chosen), codec)
    write_file(out, encode_png(make_image_grid(list(zip(captions, images, strict=True)))))
    how = "as kept" if kind == "pictures" else f"decoded from their {kind}"
    print(f"{out}: {len(chosen)} images {how}, with captions")
