"""Fetching a model from the hub, by huggingface-hub and into its cache: only what Soli reads, resumable.

Configuration, tokenizer, chat templates and licence come first, then the weights, whose index is checked before. Only
safetensors: pickled and GGUF files and code are left. A weight file is written beside its place and moved there when
its size, and for LFS files its SHA-256, are right; after an interruption, even kill -9, it continues where it ended.
(Files that the hub serves by Xet are left to huggingface-hub, which fetches such a file anew.)
"""

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soli.atomic_file import replace_file
from soli.errors import SoliError
from soli.hub.cache import COMMIT, INDEX, ModelId, cache_folder, find_revision, shards_of
from soli.hub.failures import hub_failures
from soli.hub.pull_plan import ETAG, PullPlan, RemoteFile, check_disk, endpoint, plan_pull, requested_model

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

WORKERS = 4  # files at the same time
CHUNK_BYTES = 2**17  # of a transfer: what an interruption loses at most
Progress = Callable[[int, int], None]  # bytes fetched, bytes in all


def fetch(plan: PullPlan, progress: Progress = lambda fetched, total: None) -> Path:
    """Downloads what is not there yet; the folder. What was fetched before an error, or a kill, is used by the next
    call, and the model does not count as complete until all of it is there."""
    check_disk(plan)
    transfer = _Transfer(plan, progress)
    with hub_failures(plan.model), _short_chunks():
        transfer.fetch_all(plan.files)
        transfer.fetch_all(_indexed(plan))
        _record_revision(plan)
    return plan.folder


def fetch_config(name: str, revision: str | None = None) -> Path:
    """The folder of a model's config.json and weight index, fetched if they are not there: a few megabytes at most."""
    return fetch(plan_pull(requested_model(name, revision), config_only=True))


def _indexed(plan: PullPlan) -> tuple[RemoteFile, ...]:
    """The weights that the index names, or all without one; SoliError for one that the repository does not have."""
    if not any(file.name == INDEX for file in plan.files) or not plan.weights:
        return plan.weights
    shards = shards_of(plan.folder / INDEX)
    available = {file.name for file in plan.weights}
    absent = [shard for shard in shards if shard not in available]
    if absent:
        raise SoliError(
            f"{plan.model}: its {INDEX} names {absent[0]}, which the repository does not have, so it is incomplete "
            "there: no weights were downloaded"
        )
    return tuple(file for file in plan.weights if file.name in shards)


def _record_revision(plan: PullPlan) -> None:
    """Branch or tag -> commit, once all files are there: an older commit stays in use until then."""
    current = find_revision(plan.model)
    if not plan.weights and current is not None and current.complete:
        return
    revision = plan.model.revision or "main"
    if not COMMIT.fullmatch(revision):
        file = plan.model.folder / "refs" / revision
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, plan.commit)


class _Cancelled(Exception):
    """The pull was interrupted while a worker was receiving."""


class _Transfer:
    """The downloads of one pull, and how far they are together."""

    def __init__(self, plan: PullPlan, progress: Progress) -> None:
        self._plan, self._progress = plan, progress
        self._fetched = plan.total_bytes - plan.remaining_bytes - plan.partial  # partial: as it is continued
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    def fetch_all(self, files: tuple[RemoteFile, ...]) -> None:
        """Files at the same time; the first error ends all."""
        with ThreadPoolExecutor(WORKERS) as pool:
            downloads = [pool.submit(self._fetch, file) for file in files if file.name not in self._plan.present]
            try:
                for download in as_completed(downloads):
                    download.result()
            except BaseException:
                self._cancelled.set()
                for download in downloads:
                    download.cancel()
                raise

    def _count(self, received: int) -> None:
        if self._cancelled.is_set():
            raise _Cancelled
        with self._lock:
            self._fetched += received
            self._progress(self._fetched, self._plan.total_bytes)

    def _fetch(self, file: RemoteFile) -> None:
        """One file to its place in the snapshot."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        plan, hub = self._plan, endpoint()
        pointer = plan.folder / file.name
        if pointer.is_symlink() or pointer.exists():  # of a wrong size
            pointer.resolve().unlink(missing_ok=True)
            pointer.unlink(missing_ok=True)
        bar = _progress_bar_class(self._count)
        url = hf_hub_url(plan.model.repo, file.name, revision=plan.commit, endpoint=hub)
        metadata = get_hf_file_metadata(url, endpoint=hub)
        if file.size is not None and metadata.size is not None and metadata.size != file.size:
            raise SoliError(
                f"{plan.model}: {file.name} has {file.size:,} bytes by the hub's list and {metadata.size:,} by its "
                "answer: try again later"
            )
        if file.name.endswith(".safetensors") and not _served_by_xet(metadata):
            self._fetch_resumable(metadata, file, bar)
        place = hf_hub_download(
            plan.model.repo, file.name, revision=plan.commit, endpoint=hub, tqdm_class=bar, library_name="soli"
        )
        size = Path(place).stat().st_size
        if file.size is not None and size != file.size:
            Path(place).resolve().unlink()
            Path(place).unlink(missing_ok=True)
            raise SoliError(
                f"{plan.model}: {file.name} came with {size:,} bytes instead of {file.size:,}, so it was removed: run "
                "soli pull again"
            )

    def _fetch_resumable(self, metadata: "HfFileMetadata", file: RemoteFile, bar: type) -> None:
        """A file to the cache's blobs, continued where an earlier download of it ended."""
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers

        plan, etag = self._plan, metadata.etag or ""
        if not ETAG.fullmatch(etag):
            raise SoliError(f"{plan.model}: {endpoint()} gives {file.name} no ETag, so it is no Hugging Face hub")
        blob = plan.model.folder / "blobs" / etag
        draft = blob.with_name(f"{etag}.incomplete")
        lock = cache_folder() / ".locks" / plan.model.folder.name / f"{etag}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists():
                return
            expected = metadata.size if metadata.size is not None else file.size
            start = draft.stat().st_size if draft.exists() else 0
            if expected is not None and start > expected:
                draft.unlink()
                start = 0
            headers = build_hf_headers(library_name="soli")
            if _host(metadata.location) != _host(endpoint()):
                headers.pop("authorization", None)  # a storage host is given no token
            with draft.open("ab") as stream:
                self._count(start)
                http_get(
                    metadata.location,
                    stream,
                    resume_size=start,
                    headers=headers,
                    expected_size=expected,
                    displayed_filename=file.name,
                    tqdm_class=bar,
                )
                stream.flush()
                os.fsync(stream.fileno())
            _check_digest(plan.model, file.name, draft, etag)
            os.replace(draft, blob)


def _check_digest(model: ModelId, name: str, draft: Path, etag: str) -> None:
    """The ETag of an LFS file is its SHA-256."""
    if re.fullmatch("[0-9a-f]{64}", etag):
        with draft.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != etag:
            draft.unlink()
            raise SoliError(f"{model}: {name} arrived damaged, by its SHA-256, and was removed: run soli pull again")


def _served_by_xet(metadata: "HfFileMetadata") -> bool:
    from huggingface_hub import constants

    has_client = find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET
    return metadata.xet_file_data is not None and has_client


def _progress_bar_class(count: Callable[[int], None]) -> type:
    """What huggingface-hub takes for a progress bar of tqdm: counts bytes, draws nothing."""

    class Bar:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.total, self.n = options.get("total"), options.get("initial", 0)

        def update(self, received: float | None = 1) -> None:
            count(int(received or 0))

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def __getattr__(self, name: str) -> Any:  # set_description, refresh, close and so on
            if name.startswith("_") or name == "update_transfer":
                raise AttributeError(name)
            return lambda *arguments, **options: None

    return Bar


@contextlib.contextmanager
def _short_chunks() -> Iterator[None]:
    """huggingface-hub hands on ten megabytes at a time, which an interruption would lose."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    usual, verbosity = constants.DOWNLOAD_CHUNK_SIZE, logging.get_verbosity()
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    logging.set_verbosity_error()  # of a transfer that it resumes it would write lines into the progress bar
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = usual
        logging.set_verbosity(verbosity)


def _host(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).netloc
