"""Symlinks in a folder that is copied: followed only to its own files, or to the blobs of its Hugging Face cache.

A folder from elsewhere may hold a symlink to any file of this machine, and what is copied or converted may be given
away. Hugging Face's cache is made of symlinks: `snapshots/COMMIT/NAME -> ../../blobs/HASH`.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from soli.errors import SoliError


def matching_files(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Name -> the file itself, for each file of `folder` that matches a pattern. SoliError naming a symlink that leads
    elsewhere or nowhere, and what is no file, such as a FIFO."""
    entries = {entry for pattern in patterns for entry in folder.glob(pattern)}
    return {entry.name: _real_file(entry) for entry in sorted(entries)}


def _real_file(file: Path) -> Path:
    if not file.is_symlink():
        if not file.is_file():
            raise SoliError(f"{file}: is not a regular file; remove it, or fetch the file of this name")
        return file
    folder, target = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
    roots = [folder]
    if folder.parent.name == "snapshots":
        repository = folder.parent.parent
        roots += [repository / "blobs", repository.parent / "blobs"]  # the latter is shared by models
    if not any(target.is_relative_to(root) for root in roots):
        raise SoliError(f"{file}: is a symlink out of its folder, to {target}; put the file itself there")
    if not target.is_file():
        raise SoliError(f"{file}: is a symlink to {target}, which is not a file; fetch it again")
    return target
