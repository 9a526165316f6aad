"""Fingerprints of inputs and settings: tell whether a folder of shards is up to date or another's."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megafusion.device import default_device

import megafusion
from data_prep.config import KEYS_WITHOUT_EFFECT, PreprocessConfig
from data_prep.readers.splits import InputSplit, split_files
from data_prep.scan import SCHEMA, file_stat
from data_prep.write import CHANGED
from megafusion.config import dump_config
from megafusion.data.manifest import Kind
from megafusion.data.reader import ShardFolder
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256, write_file

INPUTS = "inputs.json"


class InputFingerprint:
    """Inputs and settings of a folder of shards.

    A file counts as unchanged while its size and modification time are, else by its hash.
    """

    def __init__(self, kind: Kind, config: PreprocessConfig, tokenizer: Tokenizer, splits: list[InputSplit]):
        self.fields = manifest_fields(kind, config, tokenizer)
        self._config = dump_config(config, KEYS_WITHOUT_EFFECT)
        self._paths, extra_files = _input_paths(kind, config)
        files = [file for split in splits for file in split_files(split)] + extra_files
        self._stats = {str(file): list(file_stat(file)) for file in files}
        values = [self.fields, self._config, self._stats, SCHEMA.names]
        # Tables of a partial folder are numbered by splits.
        values += [spans] if (spans := [split.span for split in splits if split.span]) else []
        self.digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]

    def is_current(self, folder: Path) -> bool:
        """Whether a folder holds complete shards of these inputs and settings."""
        try:
            shards = ShardFolder(folder)
        except UserError:
            return False
        manifest = shards.manifest
        if any(getattr(manifest, name) != value for name, value in self.fields.items()):
            return False
        if manifest.provenance.get("config") != self._config:
            return False
        known = folder / INPUTS
        hashes = self.hash_files(json.loads(known.read_bytes()) if known.is_file() else {})
        return manifest.provenance == self.provenance(hashes) and shards.is_intact()

    def hash_files(self, known: dict[str, list]) -> dict[str, list]:
        """Size, modification time and hash of each file; hashes anew those that differ from `known`."""
        return {
            file: known[file] if known.get(file, [])[:2] == stat else [*stat, file_sha256(Path(file))]
            for file, stat in self._stats.items()
        }

    def refuse_changed(self) -> None:
        """UserError where an input has changed since this object was made."""
        for file, stat in self._stats.items():
            path = Path(file)
            if not path.is_file() or list(file_stat(path)) != stat:
                raise UserError(f"{file}: {CHANGED}; start again")

    def provenance(self, hashes: dict[str, list]) -> dict[str, str]:
        """The version, the settings, and a hash of each configured input path."""
        found = {"megafusion": megafusion.__version__, "config": self._config}
        for path in self._paths:
            inside = [name for name in hashes if Path(name).is_relative_to(path)]
            lines = [f"{Path(name).relative_to(path)} {hashes[name][2]}" for name in sorted(inside)]
            is_file = inside == [str(path)]
            folder_hash = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
            found[str(path)] = hashes[str(path)][2] if is_file else folder_hash
        return found


def write_hashes(folder: Path, hashes: dict[str, list]) -> None:
    """Store the input files' hashes with the shards, so that unchanged files are not hashed again."""
    write_file(folder / INPUTS, json.dumps(hashes, indent=1) + "\n")


def manifest_fields(kind: Kind, config: PreprocessConfig, tokenizer: Tokenizer) -> dict:
    """Fields of a manifest that its documents do not determine."""
    fields: dict[str, Any] = {"kind": kind, "tokenizer_sha256": tokenizer.hash}
    if kind != "text" and config.image_storage == "pixels":
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


def _input_paths(kind: Kind, config: PreprocessConfig) -> tuple[list[Path], list[Path]]:
    """Configured input paths of a kind, and those of their files that do not belong to a split."""
    if kind == "text":
        return list(config.texts), []
    paths, extra = (
        (config.images, config.keys) if kind == "pair" else (config.documents, config.document_images)
    )
    if extra is None:
        return list(paths), []
    if not extra.exists():
        raise UserError(f"{extra}: no such file or folder")
    files = sorted(p for p in extra.rglob("*") if p.is_file()) if extra.is_dir() else [extra]
    return [*paths, extra], files
