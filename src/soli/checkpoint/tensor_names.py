"""Tensors of files under the names of the name map: those of a text model inside a model of images and text, those that
transformers names otherwise than the published files, and values of quantized weights, which are `weight` here."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from soli.checkpoint.shard import TensorEntry
from soli.errors import SoliError
from soli.families import ModelFamily

VALUES: Final = {".weight_packed": ".weight", ".weight_blocks": ".weight", ".weight_scales": ".weight_scale"}


def published_names(entries: Mapping[str, TensorEntry], family: ModelFamily) -> dict[str, TensorEntry]:
    """The tensors by their published names."""
    return {_published_name(name, family): entry for name, entry in entries.items()}


def _published_name(name: str, family: ModelFamily) -> str:
    for end, published in family.renamed_tensors.items():
        if name.endswith(end):
            return name.removesuffix(end) + published
    return name


def text_model_entries(entries: Mapping[str, TensorEntry], family: ModelFamily) -> dict[str, TensorEntry]:
    """The tensors of a text model, by their names in a folder of its own. SoliError for two with one name."""
    if not family.tensor_prefixes:
        return {**entries}
    own: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        if name.startswith(family.left_out):
            continue
        prefix = next((prefix for prefix in family.tensor_prefixes if name.startswith(prefix)), None)
        own_name = name if prefix is None else family.tensor_prefixes[prefix] + name.removeprefix(prefix)
        if own_name in own:
            raise SoliError(f"{entry} and {own[own_name].name} are the same tensor: remove one of them")
        own[own_name] = entry
    return own


def rename_values(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """`entries` with the values of quantized weights under the weights' names, unless both are there."""
    renamed = {}
    for name, entry in entries.items():
        suffix = next((suffix for suffix in VALUES if name.endswith(suffix)), None)
        weight = name if suffix is None else name.removesuffix(suffix) + VALUES[suffix]
        if weight in entries:
            weight = name
        elif suffix == ".weight_blocks" and len(entry.shape) == 3:  # (O, G, 16)
            rows, groups, width = entry.shape
            entry = replace(entry, shape=(rows, groups * width))
        renamed[weight] = entry
    return renamed
