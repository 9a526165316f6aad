"""Tars that tests make, of any members."""

import io
import tarfile
from collections.abc import Iterable


def add_members(tar: tarfile.TarFile, members: Iterable[tuple[str, bytes] | tarfile.TarInfo]) -> None:
    """Add files by name and content, and whatever a header alone describes."""
    for member in members:
        if isinstance(member, tarfile.TarInfo):
            tar.addfile(member)
            continue
        info = tarfile.TarInfo(member[0])
        info.size = len(member[1])
        tar.addfile(info, io.BytesIO(member[1]))


def link(name: str, target: str) -> tarfile.TarInfo:
    """A symbolic link."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info
