"""Symlinks in a folder that is copied: followed only to its own files, or to the blobs of its Hugging Face cache.

A folder from elsewhere may hold a symlink to any file of this machine, and what is copied or converted may be given
away. Hugging Face's cache is made of symlinks: `snapshots/COMMIT/NAME -> ../../blobs/HASH`.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from soli.errors import SoliError


def matching_files(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Name within `folder` -> the file itself, for each file that matches a pattern. SoliError naming a symlink that
    leads elsewhere or nowhere, its folder's as well, and what is no file, such as a FIFO; a folder without a suffix in
    its name was not meant to be one."""
    matches = {entry for pattern in patterns for entry in folder.glob(pattern)}
    entries = [entry for entry in matches if entry.suffix or entry.is_symlink() or not entry.is_dir()]
    return {str(entry.relative_to(folder)): _real_file(entry, folder) for entry in sorted(entries)}


def _real_file(file: Path, named_folder: Path) -> Path:
    folder, target = Path(os.path.realpath(named_folder)), Path(os.path.realpath(file))
    roots = [folder]
    if folder.parent.name == "snapshots":
        repository = folder.parent.parent
        roots += [repository / "blobs", repository.parent / "blobs"]  # the latter is shared by models
    if not any(target.is_relative_to(root) for root in roots):
        raise SoliError(f"{file}: is a symlink out of its folder, to {target}; put the file itself there")
    if not target.is_file():
        problem = f"is a symlink to {target}, which is not a file" if file.is_symlink() else "is not a regular file"
        raise SoliError(f"{file}: {problem}; fetch it again, or remove it")
    return target
