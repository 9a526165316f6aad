"""Fingerprints of inputs and settings: tell whether a folder of shards is up to date or another's."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megafusion.device import default_device

import yaml

import megafusion
from data_prep.config import KEYS_OF_KIND, KEYS_WITHOUT_EFFECT, PATHS_OF_INPUTS, PreprocessConfig
from data_prep.readers.files import walk
from data_prep.readers.splits import Inputs
from data_prep.scan import SCHEMA, file_stat
from data_prep.write import CHANGED
from megafusion.config import dump_config
from megafusion.data.manifest import Kind, Manifest
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

    def __init__(self, kind: Kind, config: PreprocessConfig, tokenizer: Tokenizer, inputs: Inputs):
        self.fields = manifest_fields(kind, config, tokenizer)
        self._hashes: dict[Path, dict[str, list]] = {}
        self._config = dump_config(config, KEYS_WITHOUT_EFFECT)
        self._files: dict[Path, list[Path]] = {path: [] for path in config.inputs[kind]}
        self._files |= _other_files(kind, config)
        for split in inputs.splits:
            self._files[split.source] += split.files
        files = [file for found in self._files.values() for file in found]
        self._stats = {str(file): list(file_stat(file)) for file in files}
        values = [self.fields, self._config, self._stats, SCHEMA.names]
        # Tables of a partial folder are numbered by splits.
        values += [spans] if (spans := [split.span for split in inputs.splits if split.span]) else []
        self.digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]

    def changed_keys(self, folder: Path, manifest: Manifest) -> list[str]:
        """Keys that matter to a kind of input, and are not those that a folder's shards were made with.

        Inputs may be at another place: they are the same if their hashes are.
        """
        earlier, now = (yaml.safe_load(c) for c in (manifest.provenance.get("config", "{}"), self._config))
        changed = [key for key in KEYS_OF_KIND[manifest.kind] if earlier.get(key) != now[key]]
        if not PATHS_OF_INPUTS.isdisjoint(changed):
            found = self.provenance(self._known_hashes(folder))
            if input_hashes(found) == input_hashes(manifest.provenance):
                changed = [key for key in changed if key not in PATHS_OF_INPUTS]
        hashes = {"tokenizer": "tokenizer_sha256", "vae": "vae_sha256"}
        return changed + [
            key
            for key, name in hashes.items()
            if name in self.fields and self.fields[name] != getattr(manifest, name)
        ]

    def is_current(self, folder: Path) -> bool:
        """Whether a folder holds complete shards of these inputs and settings."""
        try:
            shards = ShardFolder(folder)
        except UserError:
            return False
        manifest = shards.manifest
        if any(getattr(manifest, name) != value for name, value in self.fields.items()):
            return False
        if self.changed_keys(folder, manifest):
            return False
        provenance = self.provenance(self._known_hashes(folder))
        return (
            manifest.provenance.get("megafusion") == provenance["megafusion"]
            and input_hashes(manifest.provenance) == input_hashes(provenance)
            and shards.is_intact()
        )

    def _known_hashes(self, folder: Path) -> dict[str, list]:
        """`hash_files`, with what a folder of shards knows; computed once."""
        if folder not in self._hashes:
            known = folder / INPUTS
            values = json.loads(known.read_bytes()) if known.is_file() else {}
            self._hashes[folder] = self.hash_files(values)
        return self._hashes[folder]

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
        for path, files in self._files.items():
            inside = [name for name in hashes if Path(name).is_relative_to(path)] or list(map(str, files))
            relative = {name: os.path.relpath(name, path) if path.exists() else name for name in inside}
            lines = [f"{relative[name]} {hashes[name][2]}" for name in sorted(set(inside))]
            is_file = inside == [str(path)]
            folder_hash = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
            found[str(path)] = hashes[str(path)][2] if is_file else folder_hash
        return found


def input_hashes(provenance: dict[str, str]) -> list[str]:
    """The hashes of the configured inputs, in their order, wherever they are."""
    return [value for name, value in provenance.items() if name not in ("megafusion", "config")]


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
        }
        if codec.codebook_size:
            fields |= {"images": "codes", "codebook_size": codec.codebook_size}
        else:
            fields |= {"latent_scale": codec.scaling_factor, "latent_shift": codec.shift_factor}
    return fields


def _other_files(kind: Kind, config: PreprocessConfig) -> dict[Path, list[Path]]:
    """A configured path whose files belong to no split, and these files."""
    extra = {"pair": config.keys, "text": None, "interleaved": config.document_images}[kind]
    if extra is None:
        return {}
    if not extra.exists():
        raise UserError(f"{extra}: no such file or folder")
    found = (
        walk(extra, set(map(os.path.realpath, config.output_folders)), {})
        if extra.is_dir()
        else [(extra, None)]
    )
    return {extra: sorted(path for path, _ in found if path.is_file())}
