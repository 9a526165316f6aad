"""Pictures, captions and text to shards that a run reads: latents, token ids, metadata, a manifest."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from rich.progress import Progress
from webdataset.tariterators import group_by_keys, tar_file_expander

import megafusion
from megafusion.autoencoder.codec import ImageCodec, to_tensor
from megafusion.config import Config, dump_config
from megafusion.data.members import StoredDocument
from megafusion.data.reader import ShardFolder
from megafusion.data.shards import (
    MANIFEST,
    Kind,
    Manifest,
    load_manifest,
    write_shards,
)
from megafusion.device import default_device
from megafusion.errors import UserError
from megafusion.progress import progress_bar
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256, refuse_foreign

IMAGE_SUFFIXES = {"webp", "png", "jpg", "jpeg"}


class PreprocessConfig(Config):
    """Where pictures, captions and text come from, and where shards go."""

    out: Path
    """Folder that receives one folder of shards a kind: pairs/ and text/."""
    tokenizer: Path
    """SentencePiece model."""
    vae: Path
    """diffusers AutoencoderKL folder."""
    pictures: tuple[Path, ...] = ()
    """webdataset tars with a picture and a .txt caption a key, or folders of pictures with .txt files."""
    keys: Path | None = None
    """File that names the keys to keep, one a line; all of them by default."""
    image_size: int = Field(64, gt=0)
    """Pictures are cropped about the centre to a square of this many pixels."""
    texts: tuple[Path, ...] = ()
    """Text files in UTF-8, one document a line."""
    documents_per_shard: int = Field(1024, gt=0)
    """Documents in each tar."""
    batch_size: int = Field(64, gt=0)
    """Pictures encoded at a time."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a picture or caption that cannot be used does: stop the command, or be counted and left out."""


class Picture(NamedTuple):
    """A picture with its caption as found, still encoded."""

    key: str
    origin: str
    content: bytes
    caption: bytes | None


def preprocess(config: PreprocessConfig) -> list[Manifest]:
    """Make the folders of shards that the configuration asks for; those already up to date are kept."""
    if not config.pictures and not config.texts:
        raise UserError("nothing to preprocess: give `pictures`, `texts` or both")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"{config.out}: is a file; name a folder")
    tokenizer = Tokenizer(config.tokenizer)
    made = []
    with progress_bar() as progress:
        if config.pictures:
            made.append(_make("pair", config, tokenizer, progress))
        if config.texts:
            made.append(_make("text", config, tokenizer, progress))
    return made


def _make(kind: Kind, config: PreprocessConfig, tokenizer: Tokenizer, progress: Progress) -> Manifest:
    folder = config.out / ("pairs" if kind == "pair" else "text")
    inputs = _input_files(config.pictures if kind == "pair" else config.texts)
    provenance = {"megafusion": megafusion.__version__, "config": dump_config(config)}
    provenance |= {str(path): file_sha256(path) for path in inputs}
    fields = {"kind": kind, "tokenizer_sha256": tokenizer.hash}
    codec = None
    if kind == "pair":
        codec = ImageCodec.from_pretrained(config.vae, default_device())
        fields |= {
            "vae_sha256": codec.hash,
            "latent_shape": codec.latent_shape(config.image_size, config.image_size),
            "latent_scale": codec.scaling_factor,
            "latent_shift": codec.shift_factor,
        }
        if config.keys:
            if not config.keys.is_file():
                raise UserError(f"{config.keys}: no such file of keys")
            provenance[str(config.keys)] = file_sha256(config.keys)
    if _is_current(folder, fields, provenance):
        progress.console.print(f"{folder}: up to date")
        return load_manifest(folder)
    refuse_foreign(folder, MANIFEST)
    skipped: Counter[str] = Counter()
    task = progress.add_task(f"{kind}s to {folder}", total=None, losses="")
    documents = _pairs(config, tokenizer, codec, skipped) if codec else _texts(config, tokenizer)
    documents = _counted(documents, lambda n: progress.update(task, completed=n))
    made = write_shards(folder, documents, config.documents_per_shard, provenance=provenance, **fields)
    progress.update(task, total=made.num_documents, completed=made.num_documents)
    dropped = ", ".join(f"{count} x {reason}" for reason, count in skipped.items()) or "none"
    progress.console.print(
        f"{folder}: {made.num_documents} documents, {made.num_tokens} tokens, {made.num_images} images in "
        f"{len(made.shards)} shards; dropped: {dropped}"
    )
    return made


def _is_current(folder: Path, fields: dict, provenance: dict) -> bool:
    """Whether shards of the same inputs, tokenizer, autoencoder and settings stand there whole."""
    try:
        shards = ShardFolder(folder)
    except UserError:
        return False
    same = all(getattr(shards.manifest, name) == value for name, value in fields.items())
    return same and shards.manifest.provenance == provenance and shards.is_intact()


def _input_files(paths: Iterable[Path]) -> list[Path]:
    files = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder to preprocess")
    return files


def _pairs(
    config: PreprocessConfig, tokenizer: Tokenizer, codec: ImageCodec, skipped: Counter
) -> Iterator[StoredDocument]:
    usable = _usable(config, skipped)
    while batch := list(islice(usable, config.batch_size)):
        pictures = to_tensor([image for _, _, image in batch], config.image_size)
        mean_and_log_variance = codec.encode(pictures.to(codec.model.device))
        moments = torch.stack(mean_and_log_variance, dim=1).to(torch.float16).cpu().numpy()
        for (key, caption, _), picture_moments in zip(batch, moments, strict=True):
            tokens = np.array(tokenizer.encode(caption), np.int32)
            yield StoredDocument({"key": key, "caption": caption}, (tokens, picture_moments))


def _usable(config: PreprocessConfig, skipped: Counter) -> Iterator[tuple[str, str, Image.Image]]:
    """Keys, captions and decoded pictures; what is bad stops the command or is counted, by policy."""
    for picture in _pictures(config):
        try:
            yield decode_picture(picture)
        except UserError as error:
            if config.on_error == "fail":
                raise UserError(f"{error}; mend or remove it, or set on_error=skip") from error
            skipped[str(error).rsplit(": ", 1)[-1]] += 1


def decode_picture(picture: Picture) -> tuple[str, str, Image.Image]:
    """Key, caption and decoded picture. UserError naming the origin and key of what is bad."""
    where = f"{picture.origin}, key {picture.key!r}"
    if picture.caption is None:
        raise UserError(f"{where}: no .txt caption")
    try:
        caption = picture.caption.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: caption is not UTF-8") from error
    if not caption:
        raise UserError(f"{where}: empty caption")
    try:
        image = Image.open(io.BytesIO(picture.content))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: picture does not decode") from error
    return picture.key, caption, image


def _pictures(config: PreprocessConfig) -> Iterator[Picture]:
    wanted = None
    if config.keys:
        wanted = set(config.keys.read_text().split())
    found = set()
    origins = (_folder_pictures(path) if path.is_dir() else tar_pictures(path) for path in config.pictures)
    for picture in chain.from_iterable(origins):
        if wanted is None or picture.key in wanted:
            found.add(picture.key)
            yield picture
    if wanted is not None and wanted != found:
        missing = sorted(wanted - found)
        raise UserError(
            f"{config.keys}: {len(missing)} keys are in no picture source, the first {missing[0]!r}"
        )


def tar_pictures(path: Path) -> Iterator[Picture]:
    """Every picture of a webdataset tar, with its caption. UserError when the tar cannot be read."""
    try:
        with path.open("rb") as file:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                name = next((suffix for suffix in sample if suffix in IMAGE_SUFFIXES), None)
                if name:
                    yield Picture(sample["__key__"], str(path), sample[name], sample.get("txt"))
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise UserError(f"{path}: not readable as a tar ({error}); fetch it again") from error


def _folder_pictures(path: Path) -> Iterator[Picture]:
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES:
            caption = file.with_suffix(".txt")
            content = caption.read_bytes() if caption.is_file() else None
            yield Picture(str(file.relative_to(path).with_suffix("")), str(path), file.read_bytes(), content)


def _texts(config: PreprocessConfig, tokenizer: Tokenizer) -> Iterator[StoredDocument]:
    for path in config.texts:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not UTF-8 ({error}); convert the file"
                    ) from error
                if text:
                    tokens = np.array(tokenizer.encode(text), np.int32)
                    yield StoredDocument({"line": number}, (tokens,))


def _counted(documents: Iterable[StoredDocument], report) -> Iterator[StoredDocument]:
    for number, document in enumerate(documents, start=1):
        yield document
        if number % 64 == 0:
            report(number)
