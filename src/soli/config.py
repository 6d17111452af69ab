"""The shape of a model: every field of a Hugging Face `config.json` of the DeepSeek-V3 family, under its own name.

`from_dict` reads the spellings in use (config_spellings.py). `to_dict` writes the classic one, which all readers know,
and returns every field that Soli does not use. Impossible values are rejected at construction, by field, value and
remedy; so are fields that change the network and that Soli does not compute (network_fields.py). Nothing here imports
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from soli.config_spellings import rope_fields, unify_spellings
from soli.errors import SoliError
from soli.families import DERIVED, FAMILIES, MODEL_TYPES, NULL_MEANS, OTHER_NETWORKS, ModelFamily
from soli.hub.cache import find_folder, how_to_fetch
from soli.indexer_fields import INDEXER_TYPES, MAX_LISTED_LAYERS, check_indexer, fold_indexer
from soli.input_files import read_object
from soli.network_fields import NEUTRAL, reject_contradictions, reject_variants
from soli.presets import PRESETS
from soli.rope_scaling import QueryScaling, RopeScaling
from soli.sections import (
    BelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    reject,
    shown,
    suggest,
)

MISTRAL_FORMAT = "Mistral's own format, which Soli does not read: fetch the model in Hugging Face's, with config.json"
ROPE_FIELDS = ("rope_scaling", "llama_4_scaling")
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# What a model of images and text says beside its text model's configuration, and of that what counts more than there.
WHOLE_MODEL_FIELDS = ("quantization_config", "tie_word_embeddings")
SHARED_FIELDS = (*TOKEN_FIELDS, "dtype", "torch_dtype", *WHOLE_MODEL_FIELDS)


@dataclass(frozen=True)
class ModelConfig(Section, section="", exact_integers=True):
    """A model's shape and routing, in Hugging Face names; defaults are those of `deepseek_v3` files that omit a field.

    Sizes count elements. Raises SoliError at construction for an impossible value.
    """

    model_type: str = "deepseek_v3"
    vocab_size: PositiveInt = 129280
    hidden_size: PositiveInt = 7168
    intermediate_size: PositiveInt = 18432
    moe_intermediate_size: NonNegativeInt = 2048
    num_hidden_layers: PositiveInt = 61
    num_nextn_predict_layers: NonNegativeInt = 0
    num_attention_heads: PositiveInt = 128
    num_key_value_heads: int | None = None  # MLA does not use it; always num_attention_heads
    n_shared_experts: NonNegativeInt = 1
    n_routed_experts: NonNegativeInt = 256
    num_experts_per_tok: NonNegativeInt = 8
    n_group: PositiveInt = 8
    topk_group: PositiveInt = 4
    first_k_dense_replace: NonNegativeInt = 3
    moe_layer_freq: PositiveInt = 1
    routed_scaling_factor: PositiveFloat = 2.5
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    aux_loss_alpha: NonNegativeFloat = 1e-4  # section 4.2; a file that omits it means this, not 0
    seq_aux: bool = True
    q_lora_rank: PositiveInt | None = 1536
    kv_lora_rank: PositiveInt = 512
    qk_nope_head_dim: PositiveInt = 128
    qk_rope_head_dim: PositiveInt = 64
    v_head_dim: PositiveInt = 128
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    llama_4_scaling: QueryScaling | None = None
    rope_interleave: bool = True
    index_topk: PositiveInt | None = None  # the tokens that one attends to in sparse attention; None: all before it
    index_n_heads: PositiveInt | None = None
    index_head_dim: PositiveInt | None = None
    indexer_types: tuple[Literal["full", "shared"], ...] | None = None  # of each layer; None: all full
    indexer_rope_interleave: bool = False
    max_position_embeddings: PositiveInt = 4096
    rms_norm_eps: PositiveFloat = 1e-6
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    attention_dropout: BelowOne = 0.0
    initializer_range: NonNegativeFloat = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = field(default=1, hash=False)
    pad_token_id: int | None = None
    quantization_config: dict[str, Any] | None = field(default=None, hash=False)
    extra: dict[str, Any] = field(default_factory=dict, hash=False)  # fields Soli does not use, returned by to_dict

    def __post_init__(self) -> None:
        _check_family(self.model_type)
        if self.family.text_config:
            reject("model_type", self.model_type, f"its text model's is {self.family.text_model_type}")
        token_ids = {name: getattr(self, name) for name in TOKEN_FIELDS}  # before 1.0 in a list becomes 1
        super().__post_init__()
        for name, ids in token_ids.items():
            check_token_ids(name, ids, self.vocab_size)
        object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not any(value is not None for value in (self.quantization_config or {}).values()):
            object.__setattr__(self, "quantization_config", None)
        _check_extra(self)
        _check_shape(self)
        check_indexer(self, self.family.sparse_attention)
        if self.n_routed_experts:
            _check_routing(self)

    @property
    def family(self) -> ModelFamily:
        """What this model_type changes of DeepSeek-V3."""
        return FAMILIES[self.model_type]

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key: the part without position, then the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether HF layer `layer` has routed experts; MTP modules (layers L, L+1, ...) always do in a mixture."""
        if not self.n_routed_experts:
            return False
        if layer >= self.num_hidden_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model, MTP modules not counted."""
        if not self.n_routed_experts:
            return 0
        step = self.moe_layer_freq  # of its multiples, those from first_k_dense_replace to the last layer
        return -(-self.num_hidden_layers // step) - -(-self.first_k_dense_replace // step)

    def has_indexer(self, layer: int) -> bool:
        """Whether HF layer `layer` selects tokens itself; MTP modules (layers L, L+1, ...) do in sparse attention."""
        if self.indexer_types is None or layer >= self.num_hidden_layers:
            return self.index_topk is not None
        return self.indexer_types[layer] == "full"

    def num_indexers(self, mtp_modules: int = 0) -> int:
        """Layers of the main model and of so many MTP modules that have an indexer."""
        if self.index_topk is None:
            return 0
        shared = 0 if self.indexer_types is None else self.indexer_types.count("shared")
        return self.num_hidden_layers - shared + mtp_modules

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> ModelConfig:
        """A configuration from the JSON object of a `config.json`; SoliError for one that is impossible."""
        text_model = _text_model(table)
        d = {name: value for name, value in text_model.items() if name not in DERIVED}
        d["model_type"] = _check_family(d.get("model_type"))
        family = FAMILIES[d["model_type"]]
        unify_spellings(d, family)
        layers = d.get("num_hidden_layers") or family.defaults.get("num_hidden_layers", cls.num_hidden_layers)
        fold_indexer(d, family.sparse_attention, layers)
        if d.get("architectures") in [[known.architecture] for known in FAMILIES.values()]:
            del d["architectures"]  # follows model_type
        values = {**family.defaults, **{name: d.pop(name) for name in FIELDS if name in d}}
        for name, value in list(values.items()):
            if value is None and "None" not in str(FIELDS[name].type):
                values[name] = NULL_MEANS.get(name, family.defaults.get(name, FIELDS[name].default))
        _drop_default_tokens(values, family)
        return cls(**values, extra=d)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a `config.json`, classic spelling, unknown fields included; `from_dict` is its inverse."""
        d: dict[str, Any] = {
            "architectures": [self.family.architecture],
            **{name: getattr(self, name) for name in FIELDS},
        }
        share = self.qk_rope_head_dim / self.qk_head_dim
        rope = rope_fields(self.rope_scaling, self.llama_4_scaling, self.rope_theta, share, self.family)
        d = {name: value for name, value in d.items() if name not in ROPE_FIELDS or name in rope} | rope
        if self.quantization_config is None:
            del d["quantization_config"]
        if self.index_topk is None:
            for name in ("index_topk", "index_n_heads", "index_head_dim", "indexer_types", "indexer_rope_interleave"):
                del d[name]
        elif self.num_hidden_layers <= MAX_LISTED_LAYERS:
            d["indexer_types"] = list(self.indexer_types or ("full",) * self.num_hidden_layers)
        if self.family.writes_layer_types and self.num_hidden_layers <= MAX_LISTED_LAYERS:
            d["mlp_layer_types"] = mlp_layer_types(self)  # its other readers do not know first_k_dense_replace
        return d | self.extra


FIELDS = {f.name: f for f in dataclasses.fields(ModelConfig) if f.name != "extra"}


def _check_family(model_type: Any) -> str:
    """The family's name in the table."""
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        difference = OTHER_NETWORKS.get(model_type) if isinstance(model_type, str) else None
        known = f"Soli reads {', '.join(FAMILIES)}"
        reject("model_type", model_type, known if difference is None else f"{difference}; {known}")
    return model_type


def _text_model(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the text model, which a model of images and text has in an object of its own."""
    family = FAMILIES[_check_family(table.get("model_type"))]
    if not family.text_config:
        return table
    text = table.get(family.text_config)
    if not isinstance(text, Mapping):
        reject(family.text_config, text, f"a {table['model_type']} has its text model's fields there, a JSON object")
    inner_type = _check_family(text.get("model_type") or family.text_model_type)
    if FAMILIES[inner_type].text_config:
        reject(f"{family.text_config}.model_type", inner_type, "it must be that of a text model")
    shared = {name: table[name] for name in SHARED_FIELDS if table.get(name) not in (None, {})}
    own = {name: value for name, value in text.items() if value is not None or name not in shared}
    whole = {name: shared[name] for name in WHOLE_MODEL_FIELDS if name in shared}
    return {**shared, **own, **whole, "model_type": inner_type}


def _drop_default_tokens(values: dict[str, Any], family: ModelFamily) -> None:
    """Files of small models keep the token ids of the family's large one, which their vocabulary does not have."""
    vocabulary = values.get("vocab_size")
    for name in TOKEN_FIELDS:
        default = family.defaults.get(name)
        if default is not None and values.get(name) == default and type(vocabulary) is int and default >= vocabulary:
            values[name] = None


def mlp_layer_types(config: ModelConfig) -> list[str]:
    """What newer writers say instead of `first_k_dense_replace`: which layers are mixtures."""
    return ["sparse" if config.is_moe_layer(layer) else "dense" for layer in range(config.num_hidden_layers)]


def _check_extra(config: ModelConfig) -> None:
    """SoliError for a field that Soli does not have and that asks for another network than the one it would build.

    Lists of the layers' types are dropped from `extra` where they say what the configuration does."""
    extra = config.extra
    reject_variants({name: value for name, value in extra.items() if name not in config.family.ignored_fields}, NEUTRAL)
    window = extra.get("sliding_window")
    if window and extra.get("use_sliding_window") is not False and _is_below(window, config.max_position_embeddings):
        reject("sliding_window", window, "Soli has no such variant; remove it or set null")
    reject_contradictions(
        extra,
        {
            "scoring_function": config.scoring_func,
            "score_function": config.scoring_func,
            "moe_router_activation_func": config.scoring_func,
            "shared_expert_intermediate_size": config.n_shared_experts * config.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": config.n_shared_experts * config.moe_intermediate_size,
            "moe_router_enable_expert_bias": config.topk_method == "noaux_tc",
            "router_scaling_factor": config.routed_scaling_factor,
            "moe_topk": config.num_experts_per_tok,
            "expert_ffn_hidden_size": config.moe_intermediate_size,
            "rotary_emb_base": config.rope_theta,
        },
    )
    layers = config.num_hidden_layers
    sparse = ("indexed_attention", "deepseek_sparse_attention")  # both are transformers' names
    kinds = sparse if config.family.sparse_attention else ("full_attention",)
    for name, is_expected in (
        ("layer_types", lambda types: types in [[kind] * layers for kind in kinds]),
        ("mlp_layer_types", lambda types: types == mlp_layer_types(config)),
    ):
        types = extra.get(name)
        if types and not (isinstance(types, list) and len(types) == layers and is_expected(types)):
            reject(name, types, f"Soli has no such variant of {layers} layers; remove it")
    repeated = ("layer_types", "mlp_layer_types")  # what other fields say, and would not follow when they change
    object.__setattr__(config, "extra", {name: value for name, value in extra.items() if name not in repeated})


def _is_below(window: Any, positions: int) -> bool:
    return not isinstance(window, int | float) or window < positions


def _reject_first(config: ModelConfig, *rules: tuple[bool, str, str]) -> None:
    """SoliError for the first rule that is broken; a rule is (whether it is, the field, what it must be)."""
    for is_broken, name, remedy in rules:
        if is_broken:
            reject(name, getattr(config, name), remedy)


def _check_shape(config: ModelConfig) -> None:
    layers = config.num_hidden_layers
    _reject_first(
        config,
        (
            config.first_k_dense_replace > layers,
            "first_k_dense_replace",
            f"it counts dense layers at the start, so at most num_hidden_layers, {layers}",
        ),
        (
            config.family.is_dense and config.n_routed_experts > 0,
            "n_routed_experts",
            f"{config.model_type} has no mixture; remove it or set 0",
        ),
        (
            config.llama_4_scaling is not None and config.family.rope_parameters is None,
            "llama_4_scaling",
            f"Soli has no such variant of {config.model_type}; remove it, or set model_type mistral4",
        ),
        (config.qk_rope_head_dim % 2 == 1, "qk_rope_head_dim", "RoPE rotates pairs, so it must be even"),
        (
            config.rope_scaling is not None and config.rope_theta <= 1,
            "rope_theta",
            "with rope_scaling it must be above 1",
        ),
    )


def check_token_ids(name: str, value: Any, vocab_size: int) -> frozenset[int]:
    """The token ids that a JSON field holds: a number or a list of them; none for null. SoliError for anything else."""
    if name == "pad_token_id" and type(value) is int and value == -1:
        return frozenset()  # written for "none" by many; Soli pads nothing
    tokens = [] if value is None else value if isinstance(value, list) else [value]
    if value == []:
        reject(name, value, "it must be a whole number, or a list of at least one")
    for token in tokens:
        if type(token) is not int:
            reject(name, token, "a token's id is a whole number")
        if not 0 <= token < vocab_size:
            reject(name, token, f"tokens go from 0 to vocab_size - 1, {vocab_size - 1}")
    return frozenset(tokens)


def _check_routing(config: ModelConfig) -> None:
    experts, selected = config.n_routed_experts, config.num_experts_per_tok
    _reject_first(
        config,
        (selected < 1, "num_experts_per_tok", f"with {experts} routed experts each token must select at least one"),
        (
            selected > experts,
            "num_experts_per_tok",
            f"there are only {experts} experts (n_routed_experts) to select from",
        ),
        (config.moe_intermediate_size < 1, "moe_intermediate_size", "experts need a positive width"),
    )
    if config.topk_method != "greedy":
        _check_groups(config)


def _check_groups(config: ModelConfig) -> None:
    experts, groups, surviving = config.n_routed_experts, config.n_group, config.topk_group
    size = experts // groups
    _reject_first(
        config,
        (experts % groups > 0, "n_group", f"it must divide n_routed_experts, {experts}; 1 means no groups"),
        (surviving > groups, "topk_group", f"at most n_group, {groups}, groups can survive"),
        (
            surviving * size < config.num_experts_per_tok,
            "topk_group",
            f"the surviving groups hold {surviving * size} experts ({size} each), fewer than num_experts_per_tok, "
            f"{config.num_experts_per_tok}; let more groups survive or select fewer experts",
        ),
        (
            config.topk_method == "noaux_tc" and groups > 1 and size < 2,
            "n_group",
            f"noaux_tc ranks a group by its two best experts, so {experts} experts make at most {experts // 2} groups",
        ),
    )


def load_config(path: str | Path) -> ModelConfig:
    """Read the `config.json` of a model folder, or that file itself; SoliError names the file and what is wrong."""
    return load_config_and_family(path)[0]


def load_config_and_family(path: str | Path) -> tuple[ModelConfig, ModelFamily]:
    """The same, and the family that the file names: of a model of images and text not that of its text model."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.exists() and (path / "params.json").exists():
        raise SoliError(f"{path}: holds no config.json but params.json, {MISTRAL_FORMAT}")
    table = read_object(file)
    try:
        return ModelConfig.from_dict(table), FAMILIES[_check_family(table["model_type"])]
    except SoliError as error:
        raise SoliError(f"{file}: {error}") from None


def preset(name: str) -> ModelConfig:
    """A published configuration by name, such as `deepseek-v3`; the names are the keys of PRESETS."""
    if name not in PRESETS:
        raise SoliError(f"there is no preset {shown(name)}; {suggest(str(name), PRESETS)}")
    return ModelConfig.from_dict(PRESETS[name])


def resolve(name_or_folder: str | Path) -> ModelConfig:
    """A preset by name, else a model folder or `config.json` by path, else a downloaded model by ID."""
    name = str(name_or_folder)
    if name in PRESETS:
        return preset(name)
    if Path(name).exists():
        return load_config(name)
    folder = find_folder(name, config_only=True)
    if folder is not None:
        return load_config(folder)
    advice = how_to_fetch(name, "--config-only") or f"; {suggest(name, PRESETS)}"
    raise SoliError(f"there is no preset and no folder {name!r}{advice}")


def replace(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """A copy with fields changed; `rope_scaling.factor` reaches inside. SoliError for a name that is no field."""
    d = config.to_dict()
    if config.indexer_types is None or "indexer_types" in changes:
        for name in INDEXER_TYPES:  # what is not changed stays full in every layer, however many there are
            d.pop(name, None)
    elif type(changes.get("num_hidden_layers")) is int:
        d["indexer_types"] = d["indexer_types"][: changes["num_hidden_layers"]]
    for name in ("mlp_layer_types", "rope_parameters"):  # follow the fields that may change
        d.pop(name, None)
    d["rope_scaling"] = None if config.rope_scaling is None else config.rope_scaling.to_dict()
    d["llama_4_scaling"] = None if config.llama_4_scaling is None else config.llama_4_scaling.to_dict()
    for name, value in changes.items():
        head, _, inside = name.partition(".")
        if head not in FIELDS or (inside and head != "rope_scaling"):
            raise SoliError(f"a model configuration has no field {name!r}; {suggest(head, FIELDS)}")
        d[head] = {"type": "yarn", **(d[head] or {}), inside: value} if inside else value
    d["rope_scaling"] = d["rope_scaling"] or {"type": "default"}  # not the family's own
    return ModelConfig.from_dict(d)
