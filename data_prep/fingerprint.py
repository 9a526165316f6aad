"""What shards are made of, by hash: whether a folder is up to date, and which half-made one is its own."""

import hashlib
import json
from pathlib import Path

from megafusion.device import default_device

import megafusion
from data_prep.config import BYTES_ALIKE, PreprocessConfig
from data_prep.readers.inputs import InputSplit, piece_files
from data_prep.scan import file_stat
from data_prep.write import CHANGED
from megafusion.config import dump_config
from megafusion.data.reader import ShardFolder
from megafusion.data.shards import Kind
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256, write_file

INPUTS = "inputs.json"


class InputFingerprint:
    """Inputs and settings of a folder of shards.

    A file is taken for the same while its size and time of change are, else by its hash.
    """

    def __init__(self, kind: Kind, config: PreprocessConfig, tokenizer: Tokenizer, pieces: list[InputSplit]):
        self.fields = manifest_fields(kind, config, tokenizer)
        self._config = dump_config(config, BYTES_ALIKE)
        self._given, beside = _given(kind, config)
        files = [file for piece in pieces for file in piece_files(piece)] + beside
        self._stats = {str(file): list(file_stat(file)) for file in files}
        whole = [self.fields, self._config, self._stats]
        # Half-made work is numbered by pieces.
        whole += [parts] if (parts := [piece.part for piece in pieces if piece.part]) else []
        self.digest = hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:12]

    def is_current(self, folder: Path) -> bool:
        """Whether shards of these inputs and settings stand there whole."""
        try:
            shards = ShardFolder(folder)
        except UserError:
            return False
        found = shards.manifest
        if any(getattr(found, name) != value for name, value in self.fields.items()):
            return False
        if found.provenance.get("config") != self._config:
            return False
        known = folder / INPUTS
        hashes = self.hash_files(json.loads(known.read_bytes()) if known.is_file() else {})
        return found.provenance == self.provenance(hashes) and shards.is_intact()

    def hash_files(self, known: dict[str, list]) -> dict[str, list]:
        """Size, time of change and hash of each file, read anew where `known` does not have it as it is."""
        return {
            file: known[file] if known.get(file, [])[:2] == stat else [*stat, file_sha256(Path(file))]
            for file, stat in self._stats.items()
        }

    def refuse_changed(self) -> None:
        """UserError where an input is not what it was when the command began."""
        for file, stat in self._stats.items():
            path = Path(file)
            if not path.is_file() or list(file_stat(path)) != stat:
                raise UserError(f"{file}: {CHANGED}; start again")

    def provenance(self, hashes: dict[str, list]) -> dict[str, str]:
        """The versions, the settings, and a hash of each path that the configuration gives."""
        found = {"megafusion": megafusion.__version__, "config": self._config}
        for path in self._given:
            inside = [name for name in hashes if Path(name).is_relative_to(path)]
            lines = [f"{Path(name).relative_to(path)} {hashes[name][2]}" for name in sorted(inside)]
            is_file = inside == [str(path)]
            whole = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
            found[str(path)] = hashes[str(path)][2] if is_file else whole
        return found


def write_hashes(folder: Path, hashes: dict[str, list]) -> None:
    """Keep the files' hashes with the shards, so that a look at sizes and times is enough the next time."""
    write_file(folder / INPUTS, json.dumps(hashes, indent=1) + "\n")


def manifest_fields(kind: Kind, config: PreprocessConfig, tokenizer: Tokenizer) -> dict:
    """What a manifest says that its documents do not."""
    fields = {"kind": kind, "tokenizer_sha256": tokenizer.hash}
    if kind != "text" and config.images == "pictures":
        fields["images"] = "pictures"
    elif kind != "text":
        codec = ImageCodec.from_pretrained(config.vae, default_device())
        first, *more = (codec.latent_shape(*size) for size in config.image_sizes)
        fields |= {
            "vae_sha256": codec.hash,
            "latent_shape": first,
            "more_sizes": tuple(shape[1:] for shape in more),
            "latent_scale": codec.scaling_factor,
            "latent_shift": codec.shift_factor,
        }
    return fields


def _given(kind: Kind, config: PreprocessConfig) -> tuple[list[Path], list[Path]]:
    """Paths that the configuration names for a kind, and the files of those that are no pieces."""
    if kind == "text":
        return list(config.texts), []
    paths, beside = (
        (config.pictures, config.keys) if kind == "pair" else (config.documents, config.document_pictures)
    )
    if beside is None:
        return list(paths), []
    if not beside.exists():
        raise UserError(f"{beside}: no such file or folder")
    files = sorted(p for p in beside.rglob("*") if p.is_file()) if beside.is_dir() else [beside]
    return [*paths, beside], files
