"""How often each expert of a model was used, remembered from run to run: what to read first, and what to keep.

A file per model in the cache folder (SOLI_CACHE, else XDG_CACHE_HOME/soli, else ~/.cache/soli), named by the digest of
the folder's config.json and index; without an index, of its file's header. It holds shares of tokens, by layer, and no
text. Whatever is wrong with it, it is left aside with a line, and written anew.
"""

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from soli.atomic_file import replace_file
from soli.checkpoint.reader import Checkpoint
from soli.errors import SoliError
from soli.experts.policy import ExpertUsage
from soli.experts.sources import LayerSource
from soli.input_files import DOCUMENT_BYTES, open_regular, read_object_if_present
from soli.kernels.cpu.build import cache_folder
from soli.kernels.cpu.library_cache import make_private

log = logging.getLogger(__name__)

FORMAT: Final = 1
LARGEST_COUNT: Final = 2**53
DIGITS: Final = 4  # of a share


@dataclass(frozen=True)
class UsageFile:
    """Where a model's usage is remembered, and the layers that it has experts in."""

    path: Path
    layers: tuple[LayerSource, ...]

    def read(self) -> ExpertUsage | None:
        """What is remembered; None where there is nothing, or nothing that can be used, which is logged."""
        try:
            document = read_object_if_present(self.path, DOCUMENT_BYTES)
            return self._usage(document) if document else None
        except (SoliError, OSError) as error:
            log.warning("%s; which experts were used before is not known", str(error).removesuffix("."))
            return None

    def write(self, usage: ExpertUsage) -> None:
        """Remember a usage; layers that it lacks stay as they were. Where that fails it is logged."""
        shares = [[round(share, DIGITS) for share in row] for row in usage.shares_LE.tolist()]
        layers = {
            str(source.layer): row[: len(source.experts)] for source, row in zip(self.layers, shares, strict=True)
        }
        try:
            for folder in (self.path.parent.parent, self.path.parent):
                make_private(folder)
            document = {"format": FORMAT, "tokens": usage.tokens, "layers": self._other_layers() | layers}
            replace_file(self.path, json.dumps(document))
        except (SoliError, OSError) as error:
            log.warning("which experts were used is not remembered (%s)", error)

    def forget(self) -> bool:
        """Delete the file; whether there was one."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise SoliError(f"{self.path}: cannot be deleted ({error.strerror})") from None
        return True

    def _usage(self, document: dict[str, Any]) -> ExpertUsage:
        tokens, layers = document.get("tokens"), document.get("layers")
        if document.get("format") != FORMAT or not isinstance(layers, dict):
            raise SoliError(f"{self.path}: is no usage of experts of format {FORMAT}")
        if not isinstance(tokens, int) or isinstance(tokens, bool) or not 0 <= tokens <= LARGEST_COUNT:
            raise SoliError(f"{self.path}: tokens must be a number of tokens")
        shares_LE = np.zeros((len(self.layers), max(len(source.experts) for source in self.layers)))
        for row, source in enumerate(self.layers):
            shares = layers.get(str(source.layer))
            if shares is None:
                continue
            if not isinstance(shares, list) or len(shares) != len(source.experts) or not all(map(_is_share, shares)):
                raise SoliError(f"{self.path}: layer {source.layer} must have {len(source.experts)} shares, 0 to 1")
            shares_LE[row, : len(shares)] = shares
        return ExpertUsage(tokens, shares_LE)

    def _other_layers(self) -> dict[str, Any]:
        """Those of the file that this model was opened without, as an MTP module's."""
        try:
            layers = read_object_if_present(self.path, DOCUMENT_BYTES).get("layers")
        except SoliError:
            return {}
        return layers if isinstance(layers, dict) else {}


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1


def usage_file(checkpoint: Checkpoint, layers: tuple[LayerSource, ...]) -> UsageFile:
    """Where the usage of a folder's experts is remembered."""
    return UsageFile(cache_folder() / "experts" / f"{_digest(checkpoint.folder)}.json", layers)


def _digest(folder: Path) -> str:
    """Of a folder's configuration and of the names and places of its tensors."""
    digest = hashlib.sha256()
    names = ["config.json", "model.safetensors.index.json"]
    files = [folder / name for name in names if (folder / name).exists()]
    if len(files) < len(names):
        files += sorted(folder.glob("*.safetensors"))
    for file in files:
        with open_regular(file) as stream:
            size = DOCUMENT_BYTES
            if file.suffix == ".safetensors":
                size = int.from_bytes(stream.read(8), "little")
            digest.update(file.name.encode() + stream.read(min(size, 100_000_000)))
    return digest.hexdigest()[:32]
