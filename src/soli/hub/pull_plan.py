"""What pulling a model means: its files at a revision, what of them is on the disk, whether the rest fits.

Asks the hub for lists, and downloads nothing. SoliError, a sentence, for whatever is in the way.
"""

import contextlib
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from soli.errors import SoliError
from soli.hub.cache import (
    CONFIG,
    FOLDER_NAME,
    INDEX,
    QUANTIZATION,
    SINGLE,
    ModelId,
    cache_folder,
    checked_revision,
    parse_id,
)
from soli.hub.failures import hub_failures
from soli.quantities import scaled

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SIDE_FILES: Final = (
    CONFIG, QUANTIZATION, "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tiktoken.model", "*.tiktoken",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "*.jinja", "additional_chat_templates/*.jinja",
    "README.md", "LICENSE*", "LICENCE*", "*-LICENSE*", "NOTICE*",
)  # fmt: skip
CONFIG_FILES: Final = (CONFIG, QUANTIZATION, INDEX)
SHARD = re.compile(r"[^/]+-\d+-of-\d+\.safetensors")
UNREAD_WEIGHTS: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
ETAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


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
        raise SoliError(f"{model}: {endpoint()} names no commit for it, so it is no Hugging Face hub: see HF_ENDPOINT")
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
    return RemoteFile(sibling.rfilename, sibling.size, blob if blob and ETAG.fullmatch(blob) else None)


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
            url = hf_hub_url(model.repo, name, revision=commit, endpoint=endpoint())
            listed[name] = replace(listed[name], size=get_hf_file_metadata(url, endpoint=endpoint()).size)


def _is_file_of(file: Path, size: int | None) -> bool:
    return file.is_file() and (size is None or file.stat().st_size == size)


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), library_name="soli")


def endpoint() -> str:
    """The hub's address, by HF_ENDPOINT."""
    from huggingface_hub import constants

    return constants.ENDPOINT
