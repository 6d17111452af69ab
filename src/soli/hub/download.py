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
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from soli.atomic_file import replace_file
from soli.errors import SoliError
from soli.hub.cache import (
    COMMIT,
    CONFIG,
    FOLDER_NAME,
    INDEX,
    SINGLE,
    ModelId,
    cache_folder,
    checked_revision,
    find_revision,
    parse_id,
    shards_of,
)
from soli.hub.failures import hub_failures
from soli.quantities import scaled

if TYPE_CHECKING:
    from huggingface_hub import HfApi, HfFileMetadata

WORKERS = 4  # files at the same time
CHUNK_BYTES = 2**17  # of a transfer: what an interruption loses at most
SIDE_FILES: Final = (
    CONFIG, "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tiktoken.model", "*.tiktoken",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "*.jinja", "additional_chat_templates/*.jinja",
    "README.md", "LICENSE*", "LICENCE*", "*-LICENSE*", "NOTICE*",
)  # fmt: skip
CONFIG_FILES: Final = (CONFIG, INDEX)
SHARD = re.compile(r"[^/]+-\d+-of-\d+\.safetensors")
UNREAD_WEIGHTS: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
_ETAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")

Progress = Callable[[int, int], None]  # bytes fetched, bytes in all


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `size`, `blob` (its name in the cache) None: the hub did not say."""

    name: str
    size: int | None
    blob: str | None = None


@dataclass(frozen=True)
class PullPlan:
    """What a pull fetches: `files` before `weights`. On the disk already are `present` files of this commit, `blobs` of
    others with the same content, and `partial` bytes of interrupted downloads."""

    model: ModelId
    commit: str
    files: tuple[RemoteFile, ...]
    weights: tuple[RemoteFile, ...]
    present: frozenset[str] = frozenset()
    blobs: frozenset[str] = frozenset()
    partial: int = 0

    @property
    def folder(self) -> Path:
        return self.model.folder / "snapshots" / self.commit

    @property
    def total_bytes(self) -> int:
        return sum(file.size or 0 for file in (*self.files, *self.weights))

    @property
    def weight_bytes(self) -> int:
        return sum(file.size or 0 for file in self.weights)

    @property
    def remaining_bytes(self) -> int:
        here = self.present | self.blobs
        files = [file for file in (*self.files, *self.weights) if file.name not in here]
        return max(0, sum(file.size or 0 for file in files) - self.partial)

    @property
    def finished(self) -> bool:
        return all(file.name in self.present for file in (*self.files, *self.weights))


def requested_model(name: str, revision: str | None = None) -> ModelId:
    """The model of an ID as a user writes it; SoliError for what is none."""
    model = parse_id(name)
    if model is None:
        raise SoliError(f"{name!r} is no ID of a model: write it as the hub does, ORGANISATION/NAME")
    if revision is None:
        return model
    if model.revision is not None:
        raise SoliError(f"{name} names a revision, and --revision {revision} another: give one of them")
    return ModelId(model.repo, checked_revision(revision))


def plan_pull(model: ModelId, config_only: bool = False) -> PullPlan:
    """Asks the hub what a model consists of; downloads nothing. SoliError, a sentence, for whatever is in the way."""
    with hub_failures(model):
        api = _api()
        info = api.model_info(model.repo, revision=model.revision or "main", files_metadata=True)
        commit = info.sha or ""
        listed = {file.rfilename: _remote_file(file) for file in info.siblings or ()}
    if not FOLDER_NAME.fullmatch(commit):
        raise SoliError(f"{model}: {_endpoint()} names no commit for it, so it is no Hugging Face hub: see HF_ENDPOINT")
    if CONFIG not in listed:
        raise SoliError(f"{model}: has no {CONFIG}, so it is no model that Soli reads")
    weights = [] if config_only else _weight_names(model, listed)
    patterns = CONFIG_FILES if config_only else (*SIDE_FILES, *([INDEX] if SINGLE not in weights else []))
    names = [name for name in sorted(listed) if any(_matches(name, pattern) for pattern in patterns)]
    with hub_failures(model):
        _fill_sizes(api, model, commit, listed, {*names, *weights})
    plan = PullPlan(model, commit, tuple(listed[name] for name in names), tuple(listed[name] for name in weights))
    return _with_local_state(plan)


def _matches(name: str, pattern: str) -> bool:
    """Whether a file's path matches, folder by folder; never one that leads out of its folder."""
    parts, patterns = name.split("/"), pattern.split("/")
    matches = len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
    return matches and ".." not in parts and "\\" not in name


def _remote_file(sibling: Any) -> RemoteFile:
    blob = sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256
    return RemoteFile(sibling.rfilename, sibling.size, blob if blob and _ETAG.fullmatch(blob) else None)


def _with_local_state(plan: PullPlan) -> PullPlan:
    """The plan, with what of it is on the disk."""
    files = (*plan.files, *plan.weights)
    blobs = plan.model.folder / "blobs"
    present = {file.name for file in files if _is_file_of(plan.folder / file.name, file.size)}
    others = {file.name for file in files if file.blob and _is_file_of(blobs / file.blob, file.size)}
    drafts = [blobs / f"{file.blob}.incomplete" for file in files if file.blob and file.name not in present | others]
    partial = sum(draft.stat().st_size for draft in drafts if draft.is_file())
    return replace(plan, present=frozenset(present), blobs=frozenset(others), partial=partial)


def free_disk_bytes() -> int:
    """What the disk of the cache has free."""
    folder = cache_folder().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def check_disk(plan: PullPlan) -> None:
    """SoliError where the remaining files do not fit on the disk."""
    free = free_disk_bytes()
    if plan.remaining_bytes > free:
        raise SoliError(
            f"{plan.model}: {scaled(plan.remaining_bytes, 'B')} remain to be downloaded, but the disk of "
            f"{cache_folder()} has {scaled(free, 'B')} free: make space, or set HF_HUB_CACHE to a folder elsewhere"
        )


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


def _weight_names(model: ModelId, names: Collection[str]) -> list[str]:
    """The safetensors files that may hold the weights: where there is an index the shards, which it will name, else the
    single file."""
    if INDEX in names:
        shards = [name for name in names if SHARD.fullmatch(name)]
        shards = shards or [name for name in names if name.endswith(".safetensors") and "/" not in name]
        if shards:
            return sorted(shards)
    if SINGLE in names:
        return [SINGLE]
    if any(fnmatchcase(name, pattern) for name in names for pattern in UNREAD_WEIGHTS):
        raise SoliError(
            f"{model}: has no safetensors weights, and Soli opens no other: pickled files can run code; look for a "
            "repository of the model with safetensors"
        )
    raise SoliError(f"{model}: has neither {SINGLE} nor {INDEX} with its shards, so there are no weights to download")


def _fill_sizes(api: "HfApi", model: ModelId, commit: str, listed: dict[str, RemoteFile], names: set[str]) -> None:
    """Sizes that the list of files lacks: from the repository's tree, or from the files' own headers."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if any(listed[name].size is None for name in names):
        with contextlib.suppress(HfHubHTTPError):  # mirrors do not always have it
            for entry in api.list_repo_tree(model.repo, recursive=True, revision=commit):
                if entry.path in names:
                    listed[entry.path] = replace(listed[entry.path], size=getattr(entry, "size", None))
    for name in names:
        if listed[name].size is None:
            url = hf_hub_url(model.repo, name, revision=commit, endpoint=_endpoint())
            listed[name] = replace(listed[name], size=get_hf_file_metadata(url, endpoint=_endpoint()).size)


def _is_file_of(file: Path, size: int | None) -> bool:
    return file.is_file() and (size is None or file.stat().st_size == size)


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

        plan, endpoint = self._plan, _endpoint()
        pointer = plan.folder / file.name
        if pointer.is_symlink() or pointer.exists():  # of a wrong size
            pointer.resolve().unlink(missing_ok=True)
            pointer.unlink(missing_ok=True)
        bar = _progress_bar_class(self._count)
        url = hf_hub_url(plan.model.repo, file.name, revision=plan.commit, endpoint=endpoint)
        metadata = get_hf_file_metadata(url, endpoint=endpoint)
        if file.size is not None and metadata.size is not None and metadata.size != file.size:
            raise SoliError(
                f"{plan.model}: {file.name} has {file.size:,} bytes by the hub's list and {metadata.size:,} by its "
                "answer: try again later"
            )
        if file.name.endswith(".safetensors") and not _served_by_xet(metadata):
            self._fetch_resumable(metadata, file, bar)
        place = hf_hub_download(
            plan.model.repo, file.name, revision=plan.commit, endpoint=endpoint, tqdm_class=bar, library_name="soli"
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
        if not _ETAG.fullmatch(etag):
            raise SoliError(f"{plan.model}: {_endpoint()} gives {file.name} no ETag, so it is no Hugging Face hub")
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
            if _host(metadata.location) != _host(_endpoint()):
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


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint(), library_name="soli")


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _host(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).netloc
