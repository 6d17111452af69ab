"""The fields of config.json that describe DeepSeek sparse attention (DSA): `index_topk` and the indexer's sizes, and in
which layers there is an indexer.

GLM-5.2 says the latter in up to three ways: `indexer_types`, "full" or "shared" for each layer; `index_topk_pattern`,
the same as "FSSF..."; `index_topk_freq`, every how many layers is full, with `index_skip_topk_offset`. The first that
is there counts, as in transformers; all become `indexer_types`, None where every layer is full.
"""

from collections.abc import Mapping
from typing import Any, Final

from soli.network_fields import OFF, is_empty
from soli.sections import reject

SIZES: Final = ("index_topk", "index_n_heads", "index_head_dim")
INDEXER_TYPES: Final = ("indexer_types", "index_topk_pattern", "index_topk_freq")  # three ways to say one thing
LETTERS: Final = {"F": "full", "S": "shared"}  # of index_topk_pattern
MAX_LISTED_LAYERS: Final = 10_000  # what can be written as a list of layers; a configuration may claim 10^9


def fold_indexer(d: dict[str, Any], sparse: bool, layers: Any) -> None:
    """Bring the fields of `d` to those of ModelConfig. `sparse`: whether the family has DSA; without it neutral values
    are dropped, and others are left to be rejected by name. `layers`: num_hidden_layers, not checked yet."""
    for name in (*SIZES, "indexer_types", "indexer_rope_interleave"):
        neutral = is_empty(d.get(name)) or (not sparse and name in SIZES and d[name] in OFF)
        if name in d and neutral:
            del d[name]
    if not sparse:
        return
    if "indexer_types" not in d:
        d["indexer_types"] = _types_by_pattern(d) or _types_by_frequency(d, layers)
    if isinstance(d["indexer_types"], list | tuple) and all(kind == "full" for kind in d["indexer_types"]):
        _check_length(d["indexer_types"], layers)
        d["indexer_types"] = None


def _types_by_pattern(d: Mapping[str, Any]) -> list[Any] | None:
    pattern = d.get("index_topk_pattern")
    if is_empty(pattern):
        return None
    if isinstance(pattern, list):
        return pattern
    if not isinstance(pattern, str) or not set(pattern) <= LETTERS.keys():
        reject("index_topk_pattern", pattern, "it must be text of F, a full indexer, and S, a shared one")
    return [LETTERS[letter] for letter in pattern]


def _types_by_frequency(d: Mapping[str, Any], layers: Any) -> list[str] | None:
    frequency, offset = d.get("index_topk_freq"), d.get("index_skip_topk_offset")
    frequency = 1 if frequency is None else frequency
    offset = 2 if offset is None else offset
    for name, value in (("index_topk_freq", frequency), ("index_skip_topk_offset", offset)):
        if type(value) is not int:
            reject(name, value, "it must be a whole number")
    if frequency <= 1 or type(layers) is not int or layers < 1:
        return None
    if layers > MAX_LISTED_LAYERS:
        reject("index_topk_freq", frequency, f"with more than {MAX_LISTED_LAYERS} layers it must be 1")
    return ["shared" if max(layer - offset + 1, 0) % frequency else "full" for layer in range(layers)]


def check_indexer(config: Any, sparse: bool) -> None:
    """SoliError for a ModelConfig whose fields do not describe an indexer that Soli computes."""
    if not sparse:
        for name in (*SIZES, "indexer_types"):
            if getattr(config, name) is not None:
                reject(name, getattr(config, name), f"{config.model_type} has no sparse attention; remove it")
        return
    for name in SIZES:
        if getattr(config, name) is None:
            reject(name, None, f"{config.model_type} has sparse attention, so it must be a positive number")
    if config.q_lora_rank is None:
        reject("q_lora_rank", None, "the indexer reads the query latent, so it must be a positive number")
    if config.index_head_dim < config.qk_rope_head_dim:
        rotated = f"its first qk_rope_head_dim, {config.qk_rope_head_dim}, values are rotated"
        reject("index_head_dim", config.index_head_dim, f"{rotated}, so it must be at least that")
    if config.indexer_types is not None:
        _check_length(config.indexer_types, config.num_hidden_layers)
        if config.indexer_types[0] != "full":
            reject("indexer_types", config.indexer_types, "the first layer has none before it to share, so it is full")


def _check_length(types: Any, layers: Any) -> None:
    if len(types) != layers:
        reject("indexer_types", list(types), f"it must have one item for each of {layers} layers (num_hidden_layers)")
