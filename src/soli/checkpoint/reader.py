"""Open a Hugging Face folder: find its shards, check every tensor against the configuration, then read what is used.

Only `config.json`, the index and the headers are read to open, so 100 GB open as fast as 100 MB. Before the first
value is used every tensor has the presence, shape and dtype that the configuration asks for, every quantized weight its
scales, and the index agrees with the shards; the first problem is an error naming file and tensor.
Pickled files are never opened.

A folder without *any* tensor of the MTP modules (many exports drop them) opens without them, with an entry in `notes`;
one that lacks some of them is broken. MTP modules that config.json does not have are left out, with a note; so is a tie
between embedding and head when the files hold a head of its own. Experts may be stacked (stacked.py).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from soli.checkpoint.layouts import SUFFIXES, WeightLayout, codec_bytes, group_of
from soli.checkpoint.name_map import HEAD, IGNORED, Kind, Slot, slots, unroll_slots
from soli.checkpoint.quantization import SOLI, read_quantization, slot_problems
from soli.checkpoint.shard import TORCH_DTYPE, Shard, TensorEntry
from soli.checkpoint.stacked import STACKED, split_stacked
from soli.checkpoint.tensor_names import published_names, rename_values, text_model_entries
from soli.config import MISTRAL_FORMAT, load_config_and_family
from soli.errors import SoliError
from soli.input_files import TABLE_BYTES, read_object
from soli.kernels import QuantizedWeight
from soli.sections import is_text, shown

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
MAX_PROBLEMS: Final = 10_000  # that are counted before the first is reported
PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """An open folder: its `config`, every tensor of it as `slots`, and `notes` for the user."""

    def __init__(self, folder: Path, mtp: bool = True, mapped: bool = True) -> None:
        """Open and check `folder`; with `mtp` false the MTP modules are checked and then ignored, with `mapped` false
        tensors are read into memory instead of being mapped.

        Raises SoliError naming file and tensor.
        """
        self.folder = folder
        self._mapped = mapped
        self.config, family = load_config_and_family(folder)
        self.quantization = read_quantization(folder, self.config)
        self._layouts: dict[str, WeightLayout | None] = {}  # found, by slot
        self._shards = _open_shards(folder)
        left_out = 0
        for shard in self._shards.values():
            entries = text_model_entries(shard.entries, family)
            left_out += len(shard.entries) - len(entries)
            if self.quantization.renames_values:
                entries = rename_values(entries)
            shard.entries = split_stacked(published_names(entries, self.config.family), self.config.n_routed_experts)
        self.entries = {name: entry for shard in self._shards.values() for name, entry in shard.entries.items()}
        notes: list[str] = []
        if left_out:
            notes.append(f"{folder}: {left_out:,} tensors of images are left out: the model is used for text alone")
        if self._has_own_head():
            self.config = replace(self.config, tie_word_embeddings=False)
            notes.append(
                f"{folder}: lm_head.weight differs from model.embed_tokens.weight though tie_word_embeddings is true "
                "in config.json: both are used; set it to false there"
            )
        if self.config.family.may_lack_router_biases and self.config.num_moe_layers:
            has_biases = any(name.endswith(".e_score_correction_bias") for name in self.entries)
            self.config = replace(self.config, topk_method="noaux_tc" if has_biases else "group_limited_greedy")
            if not has_biases:
                notes.append(f"{folder} holds no router biases: experts are selected by their scores alone")
        lacks_mtp = self._lacks_mtp()
        if lacks_mtp and mtp:
            notes.append(f"{folder} holds no MTP module though config.json has one: the model is used without")
        self._extra_layers = self._layers_beyond(mtp)
        if self._extra_layers:
            notes.append(self._describe_extra_layers())
        self.notes = tuple(notes)
        without_mtp = replace(self.config, num_nextn_predict_layers=0)
        # Unrolled lazily: of a configuration with 10^9 layers only what the files have, and some of what they lack.
        _raise_first(self._problems(unroll_slots(without_mtp if lacks_mtp else self.config)))
        if lacks_mtp or not mtp:
            self.config = without_mtp
        self.slots = slots(self.config)

    @property
    def natural_dtype(self) -> torch.dtype:
        """The dtype of the tensors that are not quantized, which is the embedding's: bf16 for FP8 files."""
        return TORCH_DTYPE[self.entries["model.embed_tokens.weight"].dtype]

    def holds(self, slot: Slot) -> bool:
        """Whether the files have this slot; only copies may be absent."""
        return slot.name in self.entries

    def metadata(self, file: Path) -> dict[str, Any]:
        """What the header of a shard has beside its tensors."""
        return self._shards[file].metadata

    def stored(self, name: str) -> Tensor:
        """A tensor as stored, mapped from disk and read-only unless the checkpoint reads into memory."""
        shard = self._shards[self.entries[name].file]
        return shard.tensor(name) if self._mapped else shard.read(name)

    def parameter(self, slot: Slot, dtype: torch.dtype) -> Tensor | None:
        """A slot's tensor mapped for writing, without a copy; None where its file has another dtype or alignment."""
        entry = self.entries[slot.name]
        if TORCH_DTYPE.get(entry.dtype) != dtype or not self._mapped:
            return None
        return self._shards[entry.file].parameter(slot.name)

    def layout(self, slot: Slot) -> WeightLayout | None:
        """How the files store a slot; None where it is not quantized."""
        try:
            return self._layouts[slot.name]
        except KeyError:
            return self._layouts.setdefault(slot.name, self.quantization.layout(slot, self.entries))

    def format(self, slot: Slot) -> str:
        """The codec that a slot has in memory as stored."""
        layout = self.layout(slot)
        if layout is not None:
            return layout.format(slot.name, self.entries)
        return "fp32" if self.entries[slot.name].dtype == "F32" else "bf16"

    def group(self, slot: Slot) -> int:
        """The inputs of a slot that share a scale; 0 where it is not quantized."""
        layout = self.layout(slot)
        if layout is None:
            return 0
        scale = self.entries[slot.name + layout.companions[0].suffix]
        return group_of(self.format(slot), slot.shape, scale.shape)

    def names(self, slot: Slot) -> list[str]:
        """All tensors of a slot: its values, and what is beside them."""
        layout = self.layout(slot)
        return [slot.name] if layout is None else layout.names(slot.name)

    def bytes_in_files(self, slot: Slot) -> int:
        """Of all tensors of a slot."""
        return sum(entry.end - entry.start for entry in map(self.entries.__getitem__, self.names(slot)))

    def bytes_as_stored(self, slot: Slot) -> int:
        """Of a slot in memory, with its values as stored."""
        layout = self.layout(slot)
        if layout is None:
            return self.bytes_in_files(slot)
        return codec_bytes(self.format(slot), slot.shape, self.group(slot))

    @property
    def is_quantized(self) -> bool:
        """Whether config.json announces quantized weights."""
        return bool(self.quantization.schemes)

    @property
    def is_integer(self) -> bool:
        """Whether these are Soli's int8 or int4."""
        return self.quantization.method == SOLI

    def quantized(self, slot: Slot) -> QuantizedWeight | None:
        """A slot's values and scales, mapped from disk where memory has the files' bytes; None where it is not
        quantized. Scales are checked, except those of Soli's int8 and int4."""
        layout = self.layout(slot)
        return None if layout is None else self.as_weight(slot, [*map(self.stored, layout.names(slot.name))])

    def as_weight(self, slot: Slot, tensors: Sequence[Tensor]) -> QuantizedWeight | None:
        """`quantized`, of a slot whose tensors have been read."""
        layout = self.layout(slot)
        if layout is None:
            return None
        try:
            return layout.read(slot.shape, *tensors)
        except SoliError as error:
            scale = self.entries[slot.name + layout.companions[0].suffix]
            raise SoliError(f"{scale}: {error}") from None

    def values(self, slot: Slot, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """The values of a slot in `dtype` on `device`, dequantized where needed. May be the read-only map itself."""
        weight = self.quantized(slot)
        if weight is None:
            return self.stored(slot.name).to(device, dtype)
        return weight.to(device).dequantize(dtype)

    def check_copies(self) -> None:
        """Read the copies of embedding and head, those of MTP modules and a tied head, and compare with the originals.

        Soli has one table for both; a copy that differs would be lost silently, so it is an error naming it.
        """
        originals = {slot.soli: slot.name for slot in self.slots if not slot.copy}
        for slot in self.slots:
            if slot.copy and self.holds(slot) and not self._equal(slot.name, originals[slot.soli]):
                raise SoliError(
                    f"{self.entries[slot.name]} should repeat {originals[slot.soli]} but differs from it; "
                    "Soli shares one table between the model and its MTP modules: load with mtp=False"
                )

    def check_router_biases(self) -> None:
        """SoliError for a router whose bias is not finite: every token would select the same experts, or none."""
        for slot in self.slots:
            if slot.kind is Kind.ROUTER_BIAS and not self.stored(slot.name).isfinite().all():
                raise SoliError(f"{self.entries[slot.name]} has values that are not finite; fetch the file again")

    def _equal(self, name: str, other: str) -> bool:
        dtype = self.entries[name].dtype
        if dtype != self.entries[other].dtype:
            return False
        suffixes = ("", *(suffix for suffix in SUFFIXES if name + suffix in self.entries))
        return all(
            other + suffix in self.entries and torch.equal(self.stored(name + suffix), self.stored(other + suffix))
            for suffix in suffixes
        )

    def _has_own_head(self) -> bool:
        """Whether the embedding is tied to a head that the files hold with other values: the head counts, as it does
        for transformers. Reads both where the configuration ties them."""
        embedding = "model.embed_tokens.weight"
        if not self.config.tie_word_embeddings or not {HEAD, embedding} <= self.entries.keys():
            return False
        return self.entries[HEAD].shape == self.entries[embedding].shape and not self._equal(HEAD, embedding)

    def _lacks_mtp(self) -> bool:
        first, count = self.config.num_hidden_layers, self.config.num_nextn_predict_layers
        return count > 0 and not any(first <= _layer(name) < first + count for name in self.entries)

    def _layers_beyond(self, mtp: bool) -> frozenset[int]:
        """HF layers behind those of config.json that are left out: MTP modules, and without `mtp` any other."""
        end = self.config.num_hidden_layers + self.config.num_nextn_predict_layers
        layers = {_layer(name) for name in self.entries}
        modules = {_layer(name) for name in self.entries if name.endswith(".eh_proj.weight")}
        return frozenset(layer for layer in (modules if mtp else layers) if layer >= end)

    def _describe_extra_layers(self) -> str:
        layers = ", ".join(map(str, sorted(self._extra_layers)))
        return (
            f"{self.folder} holds layer {layers}, which config.json does not have: left out; num_hidden_layers is "
            f"{self.config.num_hidden_layers} and num_nextn_predict_layers {self.config.num_nextn_predict_layers}"
        )

    def _problems(self, expected: Iterable[Slot]) -> Iterable[str]:
        known = set()
        ignored = (*IGNORED, *self.config.family.ignored_tensors)
        end = self.config.num_hidden_layers + self.config.num_nextn_predict_layers
        for slot in expected:
            known |= {slot.name, *(slot.name + suffix for suffix in SUFFIXES)}
            if self.holds(slot):
                yield from slot_problems(slot, self.entries, self.quantization)
            elif not slot.copy:
                listing = self.folder / (INDEX if (self.folder / INDEX).exists() else SINGLE)
                tensor = f"tensor {slot.name} of shape {slot.shape}"
                yield f"{listing}: {tensor} is missing, though config.json asks for it"
        for name, entry in self.entries.items():
            if name in known or _layer(name) in self._extra_layers:
                continue
            if 0 in entry.shape or any(fnmatchcase(name, pattern) for pattern in ignored):
                continue  # transformers writes 0 shared experts as tensors without elements
            if _layer(name) >= end:
                fields = "raise num_nextn_predict_layers if it is an MTP module, num_hidden_layers if not"
                yield f"{entry} is behind the last layer of config.json: {fields}, or leave it out with mtp=False"
            elif STACKED.fullmatch(name):
                experts = self.config.n_routed_experts
                yield f"{entry} of shape {entry.shape} is no stack of the {experts} experts that config.json asks for"
            else:
                yield f"{entry} is not part of a model with this config.json"


def _layer(name: str) -> int:
    """The HF layer of a tensor; -1 outside of layers."""
    match = re.match(r"model\.layers\.([0-9]{1,18})\.", name)
    return int(match[1]) if match else -1


def _raise_first(problems: Iterable[str]) -> None:
    sentences = list(islice(problems, MAX_PROBLEMS))
    if sentences:
        count = f"{len(sentences) - 1:,}" if len(sentences) < MAX_PROBLEMS else f"at least {MAX_PROBLEMS - 1:,}"
        raise SoliError(sentences[0] + (f" (and {count} more problems in this folder)" if len(sentences) > 1 else ""))


def _open_shards(folder: Path) -> dict[Path, Shard]:
    single, index = folder / SINGLE, folder / INDEX
    weight_map = _read_index(index) if index.exists() else None
    if weight_map is not None and single.exists() and set(weight_map.values()) != {SINGLE}:
        raise SoliError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that does not belong to the model")
    if weight_map is not None:
        return _open_indexed(folder, weight_map)
    if single.exists():
        return {single: Shard(single)}
    if any(file for pattern in PICKLES for file in folder.glob(pattern)):
        raise SoliError(
            f"{folder}: holds weights as pickle files only, which can run code when opened, so Soli does not; "
            "fetch the model's safetensors files"
        )
    if any(folder.glob("consolidated*.safetensors")):
        raise SoliError(f"{folder}: holds weights as consolidated.safetensors only, {MISTRAL_FORMAT}")
    if any(folder.glob("*.safetensors")):
        raise SoliError(f"{folder}: holds safetensors files but no {INDEX}; fetch it too")
    raise SoliError(f"{folder}: holds no weights, neither {SINGLE} nor {INDEX}")


def _read_index(index: Path) -> dict[str, str]:
    weight_map: Any = read_object(index, TABLE_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise SoliError(f"{index}: is damaged, it has no JSON object weight_map")
    for name, file in weight_map.items():
        if not is_text(file) or not file or Path(file).name != file:
            raise SoliError(f"{index}: tensor {name} is in {shown(file)}, which is not a plain file name beside it")
    return weight_map


def _open_indexed(folder: Path, weight_map: Mapping[str, str]) -> dict[Path, Shard]:
    """Open every shard of an index. `total_size` is not compared: published indexes often miscount it."""
    shards = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).exists():
            name = next(name for name in weight_map if weight_map[name] == file)
            raise SoliError(f"{folder / file}: the shard is missing; by {INDEX} it holds tensor {name}; fetch it")
        shards[folder / file] = Shard(folder / file)
    _raise_first(_index_problems(folder, weight_map, shards))
    return shards


def _index_problems(folder: Path, weight_map: Mapping[str, str], shards: Mapping[Path, Shard]) -> Iterable[str]:
    entries: dict[str, TensorEntry] = {}
    for shard in shards.values():
        for name, entry in shard.entries.items():
            if name in entries:
                yield f"{entry} is also in {entries[name].file.name}; a tensor may be in one shard only"
            entries[name] = entry
            if name not in weight_map:
                yield f"{entry} is not in {INDEX}"
    named = {shard_file.name: shard.entries for shard_file, shard in shards.items()}
    for name, file in weight_map.items():
        if name not in named[file]:
            where = f"it is in {entries[name].file.name}" if name in entries else "no shard holds it"
            yield f"{folder / file}: tensor {name} is not there, though {INDEX} lists it; {where}"
