"""Downloaded models: the cache that all of Hugging Face's libraries share, read as it is on the disk.

    models--ORG--NAME/refs/main             the commit of a branch or tag
    models--ORG--NAME/snapshots/COMMIT/...  symlinks to blobs/; a file is there once it is complete

HF_HUB_CACHE and HF_HOME say where. Nothing here uses the network. A model is complete when its config.json and its
weights are there, every shard that the index names; `soli pull` fetches all other files before the weights.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soli.errors import SoliError
from soli.input_files import TABLE_BYTES, read_object

CONFIG: Final = "config.json"
QUANTIZATION: Final = "hf_quant_config.json"  # of ModelOpt, what config.json may lack
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
COMMIT: Final = re.compile(r"[0-9a-f]{40}")  # a revision like this is a commit and no branch
FOLDER_NAME: Final = re.compile(r"[A-Za-z0-9]{1,64}")  # of a commit, whatever a mirror calls it
LONGEST_ID = 96  # characters, as the hub has it
_REPO = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?(?:/[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?)?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,254}")


@dataclass(frozen=True)
class ModelId:
    """A model of the hub: ORG/NAME, and the branch, tag or commit of ORG/NAME@REVISION; None is main."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def folder(self) -> Path:
        """The cache's folder for it."""
        return cache_folder() / f"models--{self.repo.replace('/', '--')}"


@dataclass(frozen=True)
class CachedRevision:
    """One commit of a model in the cache. `refs`: branches and tags that are this commit here; `missing`: what it
    lacks, a file or more of the weights; `size`: bytes of its files."""

    repo: str
    commit: str
    refs: tuple[str, ...]
    folder: Path
    missing: tuple[str, ...]
    size: int

    @property
    def complete(self) -> bool:
        return not self.missing


def parse_id(name: str) -> ModelId | None:
    """The ID that `name` spells; None for what cannot be one."""
    repo, at, revision = name.partition("@")
    valid = _REPO.fullmatch(repo) and len(repo) <= LONGEST_ID and "--" not in repo and ".." not in repo
    if not valid or repo.endswith(".git"):
        return None
    return ModelId(repo, checked_revision(revision) if at else None)


def checked_revision(revision: str) -> str:
    """The revision itself, which may be part of a path; SoliError for one that no hub has."""
    if not _REVISION.fullmatch(revision) or any(part in ("", ".", "..") for part in revision.split("/")):
        raise SoliError(f"the revision is {revision!r}: give a branch, a tag or a commit")
    return revision


def cache_folder() -> Path:
    """Where Hugging Face's libraries keep what they download, by HF_HUB_CACHE and HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_revision(model: ModelId) -> CachedRevision | None:
    """The cached commit of a model, whatever it lacks; None where there is none."""
    try:
        refs = _refs(model.folder)
        revision = model.revision or "main"
        commit = revision if COMMIT.fullmatch(revision) else refs.get(revision)
        if commit is None or not (model.folder / "snapshots" / commit).is_dir():
            return None
        return _cached_revision(model.repo, model.folder / "snapshots" / commit, refs)
    except OSError as error:
        raise SoliError(f"{model.folder}: {error.strerror}; soli models rm {model.repo} removes it") from None


def find_folder(name: str, config_only: bool = False) -> Path | None:
    """The folder of a downloaded model by its ID; None for a name that is none of a model in the cache. SoliError for a
    model whose download is not complete; with `config_only` it need have no weights."""
    model = parse_id(name)
    if model is None:
        return None
    cached = find_revision(model) or _only_revision(name, model)
    if cached is None or cached.complete or (config_only and CONFIG not in cached.missing):
        return None if cached is None else cached.folder
    lack = f"without {cached.missing[0]}" + (f" and {len(cached.missing) - 1} more" if cached.missing[1:] else "")
    raise SoliError(f"{name} is only partly downloaded, {lack}: run soli pull {name}, which resumes")


def _only_revision(name: str, model: ModelId) -> CachedRevision | None:
    """A commit whose download was interrupted, before it got its branch; SoliError where others are complete."""
    revisions = list_revisions(model)
    complete = [f"{model.repo}@{(*one.refs, one.commit)[0]}" for one in revisions if one.complete]
    if complete:
        raise SoliError(f"{name} is not downloaded, but {', '.join(complete)}: give that, or run soli pull {name}")
    return revisions[-1] if revisions and model.revision is None else None


def how_to_fetch(name: str, option: str = "") -> str:
    """The end of an error about a name that is no folder: the command that fetches it, where it may be an ID."""
    model = parse_id(name)
    if model is None or "/" not in model.repo:
        return ""
    return f"; if it is a model of the Hugging Face hub, download it with: soli pull {name} {option}".rstrip()


def display_name(name: str, folder: Path) -> str:
    """What a model is called where its folder is named after a commit: its ID."""
    return name if folder.parent.name == "snapshots" and not Path(name).is_dir() else folder.name


def list_revisions(model: ModelId | None = None) -> list[CachedRevision]:
    """Every commit of every model in the cache, or of one; those of broken folders lack config.json."""
    folders = [model.folder] if model else sorted(cache_folder().glob("models--*"))
    revisions: list[CachedRevision] = []
    for folder in folders:
        repo = folder.name.removeprefix("models--").replace("--", "/")
        try:
            refs = _refs(folder)
            snapshots = sorted(one for one in (folder / "snapshots").glob("*") if one.is_dir())
            revisions += [_cached_revision(repo, snapshot, refs) for snapshot in snapshots]
        except OSError:
            continue
    return revisions


def unfinished_bytes(model: ModelId) -> int:
    """Bytes of files of a model whose download was interrupted."""
    return sum(file.stat().st_size for file in (model.folder / "blobs").glob("*.incomplete"))


def _refs(folder: Path) -> dict[str, str]:
    """Branch or tag -> commit."""
    root = folder / "refs"
    files = [file for file in root.rglob("*") if file.is_file()] if root.is_dir() else []
    refs = {file.relative_to(root).as_posix(): file.read_text("utf-8", "replace").strip()[:64] for file in files}
    return {ref: commit for ref, commit in refs.items() if FOLDER_NAME.fullmatch(commit)}


def _cached_revision(repo: str, folder: Path, refs: dict[str, str]) -> CachedRevision:
    names = tuple(sorted(ref for ref, commit in refs.items() if commit == folder.name))
    blobs = {file.resolve() for file in folder.rglob("*") if file.is_file()}
    size = sum(blob.stat().st_size for blob in blobs)
    return CachedRevision(repo, folder.name, names, folder, tuple(_missing(folder)), size)


def _missing(folder: Path) -> Iterator[str]:
    if not (folder / CONFIG).is_file():
        yield CONFIG
    if (folder / INDEX).is_file():
        for shard in shards_of(folder / INDEX):
            if not (folder / shard).is_file():
                yield shard
    elif not (folder / SINGLE).is_file():
        yield SINGLE


def shards_of(index: Path) -> list[str]:
    """The files that an index names; SoliError for one that is damaged or names what is no file beside it."""
    weight_map = read_object(index, TABLE_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SoliError(f"{index}: is damaged, it has no JSON object weight_map")
    shards = sorted({file for file in weight_map.values() if isinstance(file, str)})
    if len(shards) == 0 or any(Path(file).name != file or not file.endswith(".safetensors") for file in shards):
        raise SoliError(f"{index}: its weight_map names files that are not safetensors files beside it")
    return shards
