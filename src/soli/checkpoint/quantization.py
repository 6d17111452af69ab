"""How config.json says that a folder's weights are quantized, and whether each tensor is quantized as it says.

    soli                 {"bits": 8 or 4, ...}; a 4-bit folder may hold 8-bit tensors
    fp8                  E4M3 in 128x128 blocks with `weight_block_size` [128, 128], else per tensor or per row
    compressed-tensors   by `format` and `config_groups`: pack-, float-, nvfp4-pack- and mxfp4-pack-quantized
    modelopt             by `quant_algo`, here or in hf_quant_config.json: FP8, NVFP4 and both in one folder
    mxfp4                E2M1 with a power of two for 32

A tensor's own dtype and scales determine how it is quantized (layouts.py), the configuration which layouts may occur
and where. Scales of activations are not read: weights alone are quantized here, and activations keep their precision.
Problems are detected from headers alone, each a sentence that names file and tensor.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, NoReturn

from soli.checkpoint import layouts
from soli.checkpoint.layouts import SUFFIXES, WeightLayout
from soli.checkpoint.name_map import Slot
from soli.checkpoint.shard import TensorEntry
from soli.config import ModelConfig
from soli.errors import SoliError
from soli.formats.fp8 import BLOCK
from soli.formats.integer import GROUPS
from soli.hub.cache import QUANTIZATION
from soli.input_files import read_object_if_present
from soli.network_fields import is_empty
from soli.sections import shown

FLOATS: Final = ("BF16", "F16", "F32")
FP8: Final = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
SOLI: Final = "soli"
METHODS: Final = (SOLI, "fp8", "compressed-tensors", "modelopt", "modelopt_fp4", "mxfp4")
FORMAT_NAMES: Final = {"F8_E4M3": "FP8", "I8": "int8", "U8": "int4 or FP4", "I32": "packed int4"}  # by dtype


@dataclass(frozen=True)
class Scheme:
    """Layouts of the weights of some modules: `targets` are names, `re:` patterns or Linear, which is all of them."""

    targets: tuple[str, ...]
    layouts: tuple[WeightLayout, ...]


@dataclass(frozen=True)
class Quantization:
    """Which layouts each weight of a folder may have. `ignored` names modules that are not quantized, as targets do,
    `excluded` with the wildcards of file names, as ModelOpt does; `by_module`: the layouts of modules that are listed
    one by one; `announced`: what all that is read from."""

    method: str | None
    schemes: tuple[Scheme, ...] = ()
    ignored: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    by_module: Mapping[str, WeightLayout] | None = None
    announced: Mapping[str, Any] | None = None

    @property
    def renames_values(self) -> bool:
        """Whether values may have another name than `weight`."""
        return self.method in ("compressed-tensors", "mxfp4")

    @property
    def layouts(self) -> list[WeightLayout]:
        """All that may occur."""
        return [layout for scheme in self.schemes for layout in scheme.layouts]

    @property
    def has_integers(self) -> bool:
        """Whether there are integers among them, which are computed with as stored."""
        return any(format.startswith("int") for layout in self.layouts for format in layout.formats.values())

    @property
    def names(self) -> str:
        """What the weights are, in words."""
        return " and ".join(dict.fromkeys(layout.name.split()[0] for layout in self.layouts))

    def layout(self, slot: Slot, entries: Mapping[str, TensorEntry]) -> WeightLayout | None:
        """The layout of a tensor that is present; None where it is not quantized, or not as announced."""
        entry = entries[slot.name]
        if entry.dtype in FLOATS or not slot.integer:
            return None
        allowed = [one for one in self._layouts(_modules(slot, entry)) if one.dtype == entry.dtype]
        fitting = (one for one in allowed if one.fits(slot.name, slot.shape, entries))
        return next(fitting, allowed[0] if allowed else None)

    def is_ignored(self, slot: Slot, entry: TensorEntry) -> bool:
        """Whether the configuration says that a tensor is not quantized."""
        return any(_matches(module, pattern) for module in _modules(slot, entry) for pattern in self.ignored)

    def format_of(self, modules: Sequence[str]) -> str | None:
        """The codec of a module of one of these names in memory, nvfp4 or mxfp4 for FP4; None where it is not
        quantized."""
        if any(_matches(module, pattern) for module in modules for pattern in self.ignored):
            return None
        if any(fnmatchcase(module, pattern) for module in modules for pattern in self.excluded):
            return None
        allowed = _listed(modules, self.by_module) if self.by_module else self._layouts(modules)
        if not allowed:
            return None
        codec = next(iter(allowed[0].formats.values()))
        return allowed[0].name.lower() if codec == "fp4" else codec

    def _layouts(self, modules: Sequence[str]) -> tuple[WeightLayout, ...]:
        """Of the scheme that names a module most exactly."""
        if len(self.schemes) == 1 and "Linear" in self.schemes[0].targets:
            return self.schemes[0].layouts
        exactness = [max((_exactness(modules, one) for one in scheme.targets), default=0) for scheme in self.schemes]
        best = max(exactness, default=0)
        return self.schemes[exactness.index(best)].layouts if best else ()


def _modules(slot: Slot, entry: TensorEntry) -> list[str]:
    """The names that a configuration may give to a weight's module: as in the files, and without what is before it."""
    names = (slot.name, entry.name)
    return list(dict.fromkeys(re.sub(r"\.weight(_packed|_blocks)?$", "", name) for name in names))


def _matches(module: str, pattern: str) -> bool:
    """A module's name, a pattern after `re:` that fits its beginning, or Linear."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern in (module, "Linear")


def _exactness(modules: Sequence[str], target: str) -> int:
    if not any(_matches(module, target) for module in modules):
        return 0
    return 1 if target == "Linear" else 2 if target.startswith("re:") else 3


def read_quantization(folder: Path, config: ModelConfig) -> Quantization:
    """What config.json announces, or ModelOpt's file beside it; SoliError for what Soli does not read, by name."""
    announced = announced_quantization(folder, config)
    file = folder / ("config.json" if announced is config.quantization_config else QUANTIZATION)
    try:
        return replace(parse_quantization(announced), announced=announced)
    except SoliError as error:
        raise SoliError(f"{file}: {error}; fetch the model's bf16 or official FP8 files") from None


def announced_quantization(folder: Path, config: ModelConfig) -> dict[str, Any] | None:
    """`quantization_config` of a folder: config.json's, or in its place what ModelOpt's file beside it says."""
    if config.quantization_config is None:
        nested = read_object_if_present(folder / QUANTIZATION).get("quantization")
        if isinstance(nested, dict) and nested.get("quant_algo") is not None:
            return nested | {"quant_method": "modelopt"}
    return config.quantization_config


def parse_quantization(announced: Mapping[str, Any] | None) -> Quantization:
    """The object `quantization_config` of a config.json. SoliError naming field and value."""
    if announced is None:
        return Quantization(None)
    method = announced.get("quant_method")
    if method == SOLI:
        by_bits = {8: (layouts.INT8,), 4: (layouts.INT4, layouts.INT8)}
        bits = announced.get("bits")
        if type(bits) is int and bits in by_bits:
            return Quantization(SOLI, _everywhere(*by_bits[bits]))
        _reject("bits", bits, "8 or 4")
    if method == "fp8":
        return Quantization("fp8", _everywhere(*_fp8_layouts(announced)))
    if method == "compressed-tensors":
        return _compressed_tensors(announced)
    if method in ("modelopt", "modelopt_fp4"):
        return _modelopt(announced)
    if method == "mxfp4":
        return Quantization("mxfp4", _everywhere(layouts.MXFP4))
    _reject("quant_method", method, ", ".join(METHODS))


def _listed(modules: Sequence[str], by_module: Mapping[str, WeightLayout]) -> tuple[WeightLayout, ...]:
    """That of the module, by one of its names, or of one that it is a part of."""
    for module in modules:
        parts = module.split(".")
        for length in range(len(parts), 0, -1):
            layout = by_module.get(".".join(parts[:length]))
            if layout is not None:
                return (layout,)
    return ()


def _everywhere(*allowed: WeightLayout) -> tuple[Scheme, ...]:
    return (Scheme(("Linear",), allowed),)


def _fp8_layouts(announced: Mapping[str, Any]) -> tuple[WeightLayout, ...]:
    if not is_empty(announced.get("fmt")) and announced["fmt"] != "e4m3":
        _reject("fmt", announced["fmt"], "only 'e4m3'")
    size = announced.get("weight_block_size")
    if is_empty(size):
        return (*layouts.FP8_TENSOR, *layouts.FP8_ROWS)
    if size != [BLOCK, BLOCK]:
        _reject("weight_block_size", size, f"only {[BLOCK, BLOCK]}, and null for scales per tensor or row")
    return (layouts.FP8_BLOCKS,)


def _modelopt(announced: Mapping[str, Any]) -> Quantization:
    fp8 = (*layouts.FP8_TENSOR, *layouts.FP8_ROWS)
    by_algorithm = {
        "FP8": fp8,
        "FP8_PER_CHANNEL_PER_TOKEN": fp8,
        "NVFP4": (layouts.NVFP4,),
        "W4A16_NVFP4": (layouts.NVFP4,),
        "MIXED_PRECISION": (layouts.NVFP4, *fp8),
    }
    name = announced.get("quant_algo")
    if not isinstance(name, str) or name not in by_algorithm:
        _reject("quant_algo", name, ", ".join(by_algorithm))
    layers = announced.get("quantized_layers")
    by_module = {}
    for module, layer in layers.items() if isinstance(layers, dict) else ():
        own = layer.get("quant_algo") if isinstance(layer, dict) else layer
        if not isinstance(own, str) or own not in by_algorithm:
            _reject("quantized_layers.quant_algo", own, ", ".join(by_algorithm))
        by_module[module] = by_algorithm[own][0]
    if announced.get("group_size") not in (None, 0, 16):
        _reject("group_size", announced["group_size"], "only 16")
    lists = {field: _texts(field, announced.get(field) or []) for field in ("ignore", "exclude_modules")}
    excluded = (*lists["ignore"], *lists["exclude_modules"])  # in config.json and in ModelOpt's own file
    return Quantization("modelopt", _everywhere(*by_algorithm[name]), excluded=excluded, by_module=by_module)


def _compressed_tensors(announced: Mapping[str, Any]) -> Quantization:
    status = announced.get("quantization_status")
    if status not in (None, "compressed"):
        _reject("quantization_status", status, "'compressed'")
    for field in ("sparsity_config", "transform_config"):
        value = announced.get(field)
        if not is_empty(value) and not (isinstance(value, dict) and _changes_nothing(value)):
            _reject(field, value, "weights without it")
    groups = announced.get("config_groups")
    if not isinstance(groups, dict):
        _reject("config_groups", groups, "a JSON object of groups")
    schemes = []
    for name, group in groups.items():
        field = f"config_groups.{name}"
        if not isinstance(group, dict):
            _reject(field, group, "a JSON object")
        if group.get("weights") is None:
            continue
        layout = _group_layout(field, group, group.get("format") or announced.get("format"))
        schemes.append(Scheme(_texts(f"{field}.targets", group.get("targets") or []), (layout,)))
    return Quantization("compressed-tensors", tuple(schemes), _texts("ignore", announced.get("ignore") or []))


def _changes_nothing(config: Mapping[str, Any]) -> bool:
    """Whether a `sparsity_config` or `transform_config` has dense weights or no transform."""
    return config.get("format") == "dense" or all(is_empty(value) for value in config.values())


def _group_layout(field: str, group: Mapping[str, Any], format: Any) -> WeightLayout:
    """How the weights of one of compressed-tensors' groups are stored."""
    weights = group["weights"]
    field = f"{field}.weights"
    if not isinstance(weights, dict):
        _reject(field, weights, "a JSON object")
    if weights.get("symmetric") not in (None, True):
        _reject(f"{field}.symmetric", weights["symmetric"], "weights without zero points, true")
    if weights.get("actorder"):
        _reject(f"{field}.actorder", weights["actorder"], "groups of neighbours, null")
    kind = weights.get("type", "int"), weights.get("num_bits", 8)
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    known: dict[tuple[Any, ...], WeightLayout] = {
        ("pack-quantized", ("int", 4), "group", group_size): layouts.packed_int4(group_size) for group_size in GROUPS
    }
    known[("nvfp4-pack-quantized", ("float", 4), "tensor_group", 16)] = layouts.DIVIDED_NVFP4
    known[("mxfp4-pack-quantized", ("float", 4), "group", 32)] = layouts.MXFP4
    for fp8_format in ("float-quantized", "naive-quantized"):
        known[(fp8_format, ("float", 8), "tensor", None)] = layouts.FP8_TENSOR[0]
        known[(fp8_format, ("float", 8), "channel", None)] = layouts.FP8_ROWS[0]
        if weights.get("block_structure") == [BLOCK, BLOCK]:
            known[(fp8_format, ("float", 8), "block", None)] = layouts.FP8_BLOCKS_AS_SCALE
    variant = (format, kind, strategy, None if strategy in ("tensor", "channel", "block") else size)
    try:
        return known[variant]
    except (KeyError, TypeError):  # TypeError: a list or an object
        raise SoliError(_unknown_variant(field, weights, format)) from None


def _unknown_variant(field: str, weights: Mapping[str, Any], format: Any) -> str:
    names = ("type", "num_bits", "strategy", "group_size", "block_structure")
    values = ", ".join(f"{name} {shown(weights[name])}" for name in names if weights.get(name) is not None)
    return (
        f"quantization_config has {field} of {values} in format {shown(format)}, but Soli reads pack-quantized int 4 "
        "in groups of 32, 64 or 128, float-quantized float 8 per tensor, channel or 128x128 block, "
        "nvfp4-pack-quantized and mxfp4-pack-quantized"
    )


def _texts(field: str, value: Any) -> tuple[str, ...]:
    """A list of names and patterns. SoliError for anything else, and for a pattern that cannot be read."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        _reject(field, value, "a list of names")
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except re.error:
                _reject(field, item, "regular expressions after re:")
    return tuple(value)


def describe_integers(bits: int, group: int, int8_modules: Sequence[str], high: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of an int8 or int4 folder: `int8_modules` have 8 bits in an int4 folder, the tensors `high`
    are not quantized."""
    return {
        "quant_method": SOLI,
        "bits": bits,
        "group_size": group,
        "scale_dtype": "float16",
        **({"modules_in_8_bits": list(int8_modules)} if bits == 4 else {}),
        "modules_to_not_convert": module_patterns(high),
    }


def module_patterns(names: Iterable[str]) -> list[str]:
    """Tensors' names as modules, with a star for each number: one pattern for all layers and experts."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")) for name in names))


def slot_problems(slot: Slot, entries: Mapping[str, TensorEntry], quantization: Quantization) -> Iterator[str]:
    """What is wrong with a tensor that is present: its shape, its dtype, its scales."""
    entry = entries[slot.name]
    layout = quantization.layout(slot, entries)
    shape = slot.shape if layout is None else layout.values_shape(slot.shape)
    if layout is None and entry.dtype not in FLOATS and slot.integer and entry.dtype in FORMAT_NAMES:
        yield f"{entry} is {FORMAT_NAMES[entry.dtype]}, but config.json has no quantization_config for it"
    elif layout is None and entry.dtype not in FLOATS:
        yield f"{entry} is {entry.dtype}, but a {slot.kind.value} must be one of {', '.join(FLOATS)}"
    elif entry.shape != shape:
        yield f"{entry} has shape {entry.shape}, but config.json asks for {shape}"
    own = set() if layout is None else {companion.suffix for companion in layout.companions}
    for suffix in SUFFIXES:
        if suffix not in own and slot.name + suffix in entries:
            yield f"{entries[slot.name + suffix]} is a scale, but {slot.name} is {entry.dtype} and needs none"
    if layout is not None:
        if quantization.is_ignored(slot, entry):
            yield f"{entry} is {layout.name}, but quantization_config in config.json says that it is not quantized"
        yield from _companion_problems(slot, entries, layout)


def _companion_problems(slot: Slot, entries: Mapping[str, TensorEntry], layout: WeightLayout) -> Iterator[str]:
    for companion in layout.companions:
        name = slot.name + companion.suffix
        if name not in entries:
            yield f"{entries[slot.name]} is {layout.name}, but its scales {name} are missing"
            continue
        entry, allowed = entries[name], companion.shapes(slot.shape)
        if entry.shape not in allowed:
            shapes = " or ".join(map(str, allowed)) or "no scales at all"
            yield f"{entry} has shape {entry.shape}, but {layout.name} of shape {slot.shape} needs {shapes}"
        elif entry.dtype not in companion.dtypes:
            yield f"{entry} is {entry.dtype}, but with {layout.name} it must be {' or '.join(companion.dtypes)}"


def _reject(field: str, value: Any, reads: str) -> NoReturn:
    raise SoliError(f"quantization_config.{field} is {shown(value)}, but Soli reads {reads}")
