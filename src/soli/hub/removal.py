"""Removing downloaded models, by huggingface-hub, which knows what revisions and models share."""

import shutil

from soli.errors import SoliError
from soli.hub.cache import CachedRevision, ModelId, cache_folder, find_revision


def size_of(model: ModelId) -> int:
    """Bytes on the disk of a model in the cache, or of its revision where the ID has one."""
    if model.revision is not None:
        return _revision(model).size
    blobs = (model.folder / "blobs").glob("*")
    return sum(blob.stat().st_size for blob in blobs if blob.is_file())


def remove_model(model: ModelId) -> None:
    """Removes it; a folder that huggingface-hub calls corrupted, of an interrupted download, with all its files."""
    from huggingface_hub import scan_cache_dir

    commits = None if model.revision is None else {_revision(model).commit}
    cache = scan_cache_dir(cache_folder())
    scanned = next((repo for repo in cache.repos if repo.repo_type == "model" and repo.repo_id == model.repo), None)
    try:
        if scanned is not None:
            all_commits = {revision.commit_hash for revision in scanned.revisions}
            cache.delete_revisions(*(commits or all_commits)).execute()
        if commits is None and model.folder.is_dir():
            shutil.rmtree(model.folder)
    except OSError as error:
        raise SoliError(f"{error.filename or model.folder}: {error.strerror}; it was not removed completely") from None


def _revision(model: ModelId) -> CachedRevision:
    cached = find_revision(model)
    if cached is None:
        raise SoliError(f"{model} is not in {cache_folder()}: soli models lists what is")
    return cached
