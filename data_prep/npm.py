"""npm tarballs as sources: read from a folder and verified by checksum."""

import tarfile
from dataclasses import dataclass
from pathlib import Path

from megafusion.errors import UserError
from megafusion.storage import file_sha256


@dataclass(frozen=True)
class NpmPackage:
    """One exact npm release."""

    name: str
    """Package name with its scope, as for `npm pack`."""
    version: str
    sha256: str
    """Hex digest of the tarball."""

    @property
    def filename(self) -> str:
        """File name that `npm pack` gives the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def read_package(package: NpmPackage, folder: Path, prefix: str) -> dict[str, bytes]:
    """Contents of the package's files below `prefix`, by path relative to it, in sorted order.

    UserError naming the tarball if it is missing or not the pinned release.
    """
    path = folder / package.filename
    fetch = f"get it with: npm pack {package.name}@{package.version} --pack-destination {folder}"
    if not path.is_file():
        raise UserError(f"{path}: no such file; {fetch}")
    if (digest := file_sha256(path)) != package.sha256:
        raise UserError(f"{path}: sha256 is {digest}, expected {package.sha256}; {fetch}")
    root = f"package/{prefix}"
    with tarfile.open(path) as archive:
        members = [m for m in archive if m.name.startswith(root)]
        files = {m.name.removeprefix(root): archive.extractfile(m) for m in members}  # None for a folder
        return {name: file.read() for name, file in sorted(files.items()) if file}
