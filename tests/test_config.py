"""Configuration: every spelling in use is read, every field survives a round trip, bad values are rejected by name."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soli.config import FIELDS, PRESETS, ModelConfig, RopeScaling, load_config, preset, replace, resolve
from soli.errors import SoliError

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}


def v3(**changes: object) -> dict:
    return {**PRESETS["deepseek-v3"], **changes}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
    config = preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_what_is_written(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    d = preset(name).to_dict()
    if d["model_type"] == "kimi_k2":  # known to its own remote code, which is DeepseekV3Config
        d["model_type"] = "deepseek_v3"
    (tmp_path / "config.json").write_text(json.dumps(d))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for field, value in d.items():
        if field not in ("rope_theta", "rope_scaling"):
            assert getattr(theirs, field) == value, field
    assert theirs.rope_parameters["rope_theta"] == d["rope_theta"]
    for field, value in (d["rope_scaling"] or {}).items():
        assert theirs.rope_parameters[{"type": "rope_type"}.get(field, field)] == value, field


@pytest.mark.parametrize("name", PRESETS)
def test_what_transformers_writes_is_read_as_the_same_model(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = preset(name)
    d = config.to_dict() | {"model_type": config.model_type.replace("kimi_k2", "deepseek_v3")}
    (tmp_path / "config.json").write_text(json.dumps(d))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in again and "rope_scaling" not in again  # the newer spelling is what this reads
    ours, theirs = ModelConfig.from_dict(d).to_dict(), load_config(tmp_path / "again").to_dict()
    assert {field: theirs[field] for field in ours} == ours


def test_new_spelling_equals_the_classic_one():
    new = v3(rope_parameters={**YARN, "rope_type": "yarn", "rope_theta": 10000}, num_local_experts=256)
    for field in ("rope_theta", "rope_scaling", "n_routed_experts"):
        del new[field]
    del new["rope_parameters"]["type"]
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(v3(rope_scaling=YARN))


def test_plain_rope_in_the_new_spelling():
    config = ModelConfig.from_dict(v3(rope_scaling=None, rope_theta=5e4, rope_parameters={"rope_type": "default"}))
    assert config.rope_scaling is None and config.rope_theta == 5e4


def test_unknown_fields_are_written_back():
    source = v3(torch_dtype="bfloat16", auto_map={"AutoConfig": "x.Y"}, ep_size=1)
    written = ModelConfig.from_dict(source).to_dict()
    assert {k: written[k] for k in ("torch_dtype", "auto_map", "ep_size")} == {
        "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "x.Y"},
        "ep_size": 1,
    }


def test_absent_and_null_fields_mean_what_the_family_says():
    v2 = ModelConfig.from_dict({"model_type": "deepseek_v2", "num_experts_per_tok": 6})
    assert (v2.scoring_func, v2.topk_method, v2.norm_topk_prob, v2.n_shared_experts) == ("softmax", "greedy", False, 2)
    bare = ModelConfig.from_dict({"model_type": "deepseek_v3"})
    assert (bare.scoring_func, bare.topk_method, bare.n_group, bare.num_nextn_predict_layers) == (
        "sigmoid",
        "noaux_tc",
        8,
        0,
    )
    dense = ModelConfig.from_dict(v3(n_routed_experts=None, n_group=None, topk_group=None, norm_topk_prob=None))
    assert (dense.n_routed_experts, dense.n_group, dense.norm_topk_prob, dense.num_moe_layers) == (0, 1, True, 0)


def test_moe_layers():
    config = replace(preset("nano"), {"num_hidden_layers": 6, "first_k_dense_replace": 2, "moe_layer_freq": 2})
    assert [config.is_moe_layer(i) for i in range(7)] == [False, False, True, False, True, False, True]
    assert config.num_moe_layers == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_rope_head_dim": 63}, ["qk_rope_head_dim", "63", "even"]),
        ({"num_experts_per_tok": 257}, ["num_experts_per_tok", "257", "256"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok", "0", "at least one"]),
        ({"n_group": 7}, ["n_group", "7", "divide", "256"]),
        ({"topk_group": 9}, ["topk_group", "9", "n_group"]),
        ({"topk_group": 1, "num_experts_per_tok": 33}, ["topk_group", "32 experts", "33"]),
        ({"n_group": 256, "topk_group": 256}, ["n_group", "256", "two best", "128"]),
        ({"scoring_func": "tanh"}, ["scoring_func", "tanh", "sigmoid"]),
        ({"topk_method": "best"}, ["topk_method", "best", "noaux_tc"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling.type", "linear", "yarn"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, ["rope_scaling", "original_max_position_embeddings"]),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, ["rope_scaling.factor", "0.5", "at least 1"]),
        ({"rope_scaling": {**YARN, "rope_type": "llama3"}}, ["yarn", "llama3", "keep one"]),
        ({"rope_scaling": {**YARN, "attention_factor": 2.0}}, ["rope_scaling.attention_factor", "remove"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling", "JSON object"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ["rope_scaling", "rope_parameters"]),
        ({"rope_parameters": {**YARN, "rope_theta": 5e4}}, ["rope_theta", "50000", "keep one"]),
        ({"num_local_experts": 8}, ["n_routed_experts", "256", "num_local_experts", "8"]),
        ({"hidden_size": -1}, ["hidden_size", "-1", "above 0"]),
        ({"hidden_size": 7168.5}, ["hidden_size", "7168.5", "whole number"]),
        ({"hidden_size": 7168.0}, ["hidden_size", "7168.0", "whole number"]),
        ({"hidden_size": True}, ["hidden_size", "True", "whole number"]),
        ({"hidden_size": "7168"}, ["hidden_size", "'7168'", "whole number"]),
        ({"eos_token_id": []}, ["eos_token_id", "[]", "whole number"]),
        ({"eos_token_id": [1, 129280]}, ["eos_token_id", "129280", "vocab_size"]),
        ({"aux_loss_alpha": -0.1}, ["aux_loss_alpha", "-0.1", "at least 0"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan", "finite"]),
        ({"norm_topk_prob": "yes"}, ["norm_topk_prob", "'yes'", "true or false"]),
        ({"quantization_config": []}, ["quantization_config", "JSON object"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"mlp_bias": True}, ["mlp_bias", "True", "remove"]),
        ({"first_k_dense_replace": 62}, ["first_k_dense_replace", "62", "61"]),
        ({"q_lora_rank": 0}, ["q_lora_rank", "0", "null"]),
        ({"num_key_value_heads": "8"}, ["num_key_value_heads", "'8'", "whole number"]),
        ({"attention_dropout": 1.0}, ["attention_dropout", "1.0", "below 1"]),
        ({"moe_intermediate_size": 0}, ["moe_intermediate_size", "0", "positive"]),
        ({"model_type": "llama"}, ["model_type", "llama", "deepseek_v3"]),
    ],
)
def test_impossible_values_are_rejected_by_name(changes, words):
    with pytest.raises(SoliError) as rejection:
        ModelConfig.from_dict(v3(**changes))
    sentence = str(rejection.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text("ay\n", max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "factor"]), inner),
    max_leaves=4,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from([*FIELDS, "rope_parameters", "num_local_experts"]), json_values, max_size=4))
def test_any_json_is_accepted_or_rejected_in_a_sentence(changes):
    try:
        config = ModelConfig.from_dict(v3(**changes))
    except SoliError as rejection:
        assert str(rejection)
    else:
        assert ModelConfig.from_dict(config.to_dict()) == config


def test_v2_without_its_number_of_selected_experts_is_rejected():
    with pytest.raises(SoliError, match="num_experts_per_tok"):
        ModelConfig.from_dict({"model_type": "deepseek_v2"})


def test_greedy_selection_needs_no_groups():
    config = ModelConfig.from_dict(v3(topk_method="greedy", n_group=7))
    assert config.topk_method == "greedy"


@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[1]", "JSON object"), ("\xff", "not valid")])
def test_a_bad_file_is_named(tmp_path, text, words):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(SoliError, match=words) as rejection:
        load_config(tmp_path)
    assert str(file) in str(rejection.value)


ROPE = {**YARN, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 16}},
        {"llama_4_scaling_beta": 0.1},
        {"attn_temperature_tuning": True},
        {"sliding_window": 4096},
        {"sliding_window": 4096, "use_sliding_window": True},
        {"attention_chunk_size": 8192},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"query_pre_attn_scalar": 256},
        {"partial_rotary_factor": 0.5},
        {"rope_ratio": 2},
        {"no_rope_layers": [1, 1, 0]},
        {"mlp_bias": True},
        {"qk_layernorm": True},
        {"use_qk_norm": True},
        {"use_mla": False},
        {"embedding_multiplier": 12.0},
        {"scale_depth": 1.4},
        {"swiglu_limit": 7.0},
        {"hidden_activation": "gelu"},
        {"index_topk": 2048},
        {"index_n_heads": 64},
        {"index_head_dim": 128},
        {"indexer_types": ["full"] * 61},
        {"zero_expert_num": 4},
        {"gated_norm_rank": 16},
        {"mla_scale_q_lora": True},
        {"linear_num_heads": 32},
        {"kv_source_layers": [0, 0, 1]},
        {"moe_router_enable_expert_bias": False},
        {"moe_topk": 12},
        {"hc_mult": 4},
        {"layer_types": ["full_attention"] * 60 + ["sliding_attention"]},
        {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 59},
        {"moe_router_activation_func": "softmax"},
        {"shared_expert_intermediate_size": 4096},
        {"hidden_act": "gelu"},
        {"rope_scaling": {**ROPE, "attn_factor": 0.5}},
        {"rope_scaling": {**ROPE, "extrapolation_factor": 0.5}},
        {"rope_scaling": {**ROPE, "apply_yarn_scaling": False}},
        {"rope_scaling": {**ROPE, "truncate": False}},
        {"rope_scaling": {**ROPE, "attention_factor": 1.2}},
        {"rope_scaling": {**ROPE, "llama_4_scaling_beta": 0.1}},
        {"rope_scaling": {**ROPE, "partial_rotary_factor": 0.5}},
        {"rope_scaling": {**ROPE, "something_new": 0.5}},
        {"rope_scaling": {"type": "default", "llama_4_scaling_beta": 0.1}},
        {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"full_attention": {"rope_type": "default"}}},
        {"rope_scaling": {"factor": 40}},
        {"rope_scaling": {"type": "dynamic", "factor": 4}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
    ],
    ids=str,
)
@pytest.mark.parametrize("table", ["rope_scaling", "rope_parameters"])
def test_a_field_that_changes_the_network_is_rejected_by_name(changes, table):
    """Whether classic or new, inside the rope table or outside of it."""
    if table == "rope_parameters" and "rope_scaling" not in changes:
        pytest.skip("a field outside of the table")
    inside = changes.get("rope_scaling", changes)
    names = [name for name in inside if name not in ROPE] or ["type"]
    names += [inside["rope_type"]] if "rope_type" in inside else []
    fields = v3(rope_scaling=None)
    fields |= {table: changes["rope_scaling"]} if "rope_scaling" in changes else changes
    with pytest.raises(SoliError) as rejection:
        ModelConfig.from_dict(fields)
    assert any(name in str(rejection.value) for name in names), str(rejection.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"llama_4_scaling": None, "llama_4_scaling_beta": 0, "attn_temperature_tuning": False},
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 10**9},
        {"attn_logit_softcapping": None, "final_logit_softcapping": 0.0, "query_pre_attn_scalar": None},
        {"partial_rotary_factor": 1, "mlp_bias": False, "use_mla": True, "qk_layernorm": 0, "rope_ratio": 1.0},
        {"index_topk": None, "mlp_only_layers": [], "zero_expert_num": 0},
        {"index_topk": 0, "index_n_heads": False, "index_head_dim": 0, "indexer_types": []},
        {"layer_types": ["full_attention"] * 61, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58},
        {"moe_router_activation_func": "sigmoid", "shared_expert_intermediate_size": 2048, "rotary_emb_base": 10000},
        {"hidden_dropout": 0.1, "use_cache": False, "pretraining_tp": 2, "torch_dtype": "float16", "_comment": "x"},
        {"num_key_value_heads": 8},
        {"quantization_config": {}},
        {"quantization_config": {"quant_method": None}},
        {"rope_scaling": {**ROPE, "attn_factor": 1.0, "extrapolation_factor": 1, "apply_yarn_scaling": True}},
        {"rope_scaling": {**ROPE, "attention_factor": 1.0, "truncate": True, "partial_rotary_factor": 1.0}},
        {"rope_scaling": {**ROPE, "attention_factor": None, "low_freq_factor": 1.0, "finetuned": True}},
        {"rope_scaling": {**ROPE, "mscale_all_dim": 0, "attention_factor": 1.3688879454113936}},
        {"rope_scaling": {"rope_type": "default", "factor": 40, "attn_factor": 0.5}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
    ],
    ids=str,
)
def test_a_field_without_effect_and_a_neutral_value_are_ignored(changes):
    plain = v3(rope_scaling=changes.get("rope_scaling"), quantization_config=None)
    config, expected = ModelConfig.from_dict(plain | changes), ModelConfig.from_dict(plain)
    fields = [field for field in FIELDS if field != "rope_scaling"]
    assert [getattr(config, field) for field in fields] == [getattr(expected, field) for field in fields]
    assert ModelConfig.from_dict(config.to_dict()) == config


MISTRAL = {"model_type": "mistral4", "num_hidden_layers": 2}
TABLE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


def test_mistral4_scales_queries_as_its_rope_table_says():
    default = ModelConfig.from_dict(MISTRAL)
    assert default.llama_4_scaling.beta == 0.1 and default.rope_scaling.factor == 128.0
    config = ModelConfig.from_dict(MISTRAL | {"rope_parameters": {**TABLE, "llama_4_scaling_beta": 0.3}})
    assert dataclasses.asdict(config.llama_4_scaling) == {"beta": 0.3, "original_max_position_embeddings": 16}
    assert config.to_dict()["rope_parameters"]["llama_4_scaling_beta"] == 0.3
    beside = {"llama_4_scaling": {"beta": 0.3, "original_max_position_embeddings": 16}, "rope_parameters": TABLE}
    assert ModelConfig.from_dict(MISTRAL | beside) == config
    for neutral in ({**TABLE, "llama_4_scaling_beta": 0}, {**TABLE, "llama_4_scaling_beta": None}, TABLE):
        assert ModelConfig.from_dict(MISTRAL | {"rope_scaling": neutral}).llama_4_scaling is None
    for plain in (config, ModelConfig.from_dict(MISTRAL | {"rope_parameters": {"rope_type": "default"}})):
        assert ModelConfig.from_dict(plain.to_dict()) == plain
    assert ModelConfig.from_dict(MISTRAL | {"partial_rotary_factor": 0.5}) == default
    assert replace(config, {"rope_scaling": None}).rope_scaling is None
    assert replace(config, {"rope_scaling.factor": 8}).rope_scaling.factor == 8.0
    assert replace(config, {"num_hidden_layers": 3}).llama_4_scaling == config.llama_4_scaling


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}}, "original_max"),
        ({"rope_parameters": {**TABLE, "llama_4_scaling_beta": "0.1"}}, "llama_4_scaling.beta"),
        ({"rope_parameters": {**TABLE, "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"llama_4_scaling": {"beta": 0.1}}, "original_max_position_embeddings"),
        ({"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8, "x": 1}}, "llama_4_scaling.*x"),
        ({"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8}}, "llama_4_scaling"),
    ],
    ids=str,
)
def test_bad_scaling_of_queries_is_named(changes, name):
    with pytest.raises(SoliError, match=name):
        ModelConfig.from_dict(MISTRAL | {"rope_parameters": {**TABLE, "llama_4_scaling_beta": 0.3}} | changes)


@pytest.mark.parametrize("heads", [None, 1, 8, 128])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe_lite", "sarvam_mla", "youtu", "axk1", "mistral4"])
def test_key_value_heads_mean_nothing_to_latent_attention(family, heads):
    config = ModelConfig.from_dict({"model_type": family, "num_key_value_heads": heads})
    assert config == ModelConfig.from_dict({"model_type": family})
    assert config.num_key_value_heads == config.num_attention_heads


def test_token_ids_of_the_large_model_are_none_of_a_small_vocabulary():
    small = ModelConfig.from_dict({"model_type": "youtu", "vocab_size": 97, "bos_token_id": 128000, "eos_token_id": 5})
    assert (small.bos_token_id, small.eos_token_id) == (None, 5)
    with pytest.raises(SoliError, match="eos_token_id is 128000"):
        ModelConfig.from_dict({"model_type": "youtu", "vocab_size": 97, "eos_token_id": 128000})


def test_glm4_moe_lite_says_its_dense_layers_by_a_list():
    bare = ModelConfig.from_dict({"model_type": "glm4_moe_lite"})
    assert (bare.v_head_dim, bare.n_routed_experts, bare.first_k_dense_replace) == (256, 64, 1)
    types = ["dense"] * 2 + ["sparse"] * 45
    config = ModelConfig.from_dict({"model_type": "glm4_moe_lite", "mlp_layer_types": types})
    assert config.first_k_dense_replace == 2 and config.to_dict()["mlp_layer_types"] == types
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert replace(config, {"num_hidden_layers": 3}).to_dict()["mlp_layer_types"] == ["dense", "dense", "sparse"]
    with pytest.raises(SoliError, match="mlp_layer_types"):
        ModelConfig.from_dict({"model_type": "glm4_moe_lite", "mlp_layer_types": ["sparse", "dense"] * 24})


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"index_topk": 0}, "index_topk is 0; it must be a whole number above 0"),
        ({"index_n_heads": "32"}, "index_n_heads is '32'; it must be a whole number"),
        ({"index_head_dim": 32}, "index_head_dim is 32; its first qk_rope_head_dim, 64, values are rotated"),
        ({"q_lora_rank": None}, "q_lora_rank is None; the indexer reads the query latent"),
        ({"indexer_types": ["full", "shared"]}, "one item for each of"),
        ({"num_hidden_layers": 3, "indexer_types": ["full"] * 4}, "one item for each of 3 layers"),
        ({"num_hidden_layers": 3, "indexer_types": ["shared", "full", "full"]}, "the first layer has none before it"),
        ({"num_hidden_layers": 3, "indexer_types": ["full", "half", "full"]}, r"indexer_types\[1\] is 'half'"),
        ({"num_hidden_layers": 3, "index_topk_pattern": "FSX"}, "index_topk_pattern is 'FSX'"),
        ({"index_topk_freq": "4"}, "index_topk_freq is '4'; it must be a whole number"),
        ({"layer_types": ["full_attention"] * 61}, "layer_types"),
    ],
    ids=str,
)
def test_an_indexer_that_cannot_be_is_rejected_by_name(model_type, changes, words):
    with pytest.raises(SoliError, match=words):
        ModelConfig.from_dict({"model_type": model_type, **changes})


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_null_and_absent_indexer_fields_are_the_familys(model_type):
    bare = ModelConfig.from_dict({"model_type": model_type})
    assert (bare.index_topk, bare.index_head_dim, bare.num_indexers()) == (2048, 128, bare.num_hidden_layers)
    names = ("index_topk", "index_n_heads", "index_head_dim", "indexer_types", "indexer_rope_interleave")
    assert ModelConfig.from_dict({"model_type": model_type, **dict.fromkeys(names)}) == bare
    types = ["deepseek_sparse_attention"] * bare.num_hidden_layers
    assert ModelConfig.from_dict(bare.to_dict() | {"layer_types": types}) == bare
    grown = replace(bare, {"num_hidden_layers": 100})
    assert grown.num_indexers(1) == 101 and grown.to_dict()["indexer_types"] == ["full"] * 100


def test_a_missing_file_and_a_bad_field_name_the_file(tmp_path):
    with pytest.raises(SoliError, match=r"config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(v3(n_group=7)))
    with pytest.raises(SoliError, match=r"config\.json: n_group is 7"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(SoliError, match=r"config\.json: not valid JSON"):
        load_config(tmp_path)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(SoliError, match="did you mean deepseek-v3"):
        preset("deepseek-v4")
    with pytest.raises(SoliError, match=r"did you mean glm-5\.2"):
        preset("GLM-5.2")
    with pytest.raises(SoliError, match="did you mean n_routed_experts"):
        replace(preset("nano"), {"n_routed_expert": 8})
    with pytest.raises(SoliError, match="moonlight"):
        resolve("zzz")


def test_replace_reaches_inside_rope_scaling_and_moves_heads_together():
    config = replace(preset("deepseek-v3"), {"rope_scaling.factor": 4, "num_attention_heads": 64})
    assert config.rope_scaling is not None and config.rope_scaling.factor == 4.0
    assert config.num_key_value_heads == 64
    grown = replace(preset("nano"), {"rope_scaling.factor": 2, "rope_scaling.original_max_position_embeddings": 512})
    assert grown.rope_scaling == RopeScaling(factor=2.0, original_max_position_embeddings=512)


@st.composite
def possible_configs(draw) -> dict:
    """Configurations that must be accepted, in either spelling, with fields that Soli has never heard of."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 8))
    surviving = draw(st.integers(1, groups))
    d = {
        "model_type": draw(st.sampled_from(["deepseek_v3", "deepseek_v2", "kimi_k2"])),
        draw(st.sampled_from(["n_routed_experts", "num_local_experts"])): groups * size,
        "n_group": groups,
        "topk_group": surviving,
        "num_experts_per_tok": draw(st.integers(1, surviving * size)),
        "topk_method": draw(st.sampled_from(["noaux_tc", "greedy", "group_limited_greedy"])),
        "scoring_func": draw(st.sampled_from(["sigmoid", "softmax"])),
        "q_lora_rank": draw(st.none() | st.integers(1, 64)),
        "num_hidden_layers": draw(st.integers(3, 9)),
        "first_k_dense_replace": draw(st.integers(0, 3)),
        "eos_token_id": draw(st.none() | st.integers(0, 99) | st.lists(st.integers(0, 99), min_size=1, max_size=3)),
        "routed_scaling_factor": draw(st.integers(1, 9) | st.floats(0.1, 9)),
    }
    yarn = {**YARN, "factor": draw(st.floats(1, 64))}
    spelling = draw(st.sampled_from(["none", "classic", "new"]))
    if spelling == "classic":
        d |= {"rope_scaling": yarn, "rope_theta": draw(st.integers(100, 10**6))}
    elif spelling == "new":
        kind = yarn.pop("type")
        d["rope_parameters"] = {**yarn, "rope_type": kind, "rope_theta": draw(st.floats(100, 1e6))}
    unknown = st.text("xyz", min_size=3, max_size=6)
    return d | draw(st.dictionaries(unknown, st.none() | st.booleans() | st.integers() | st.text(), max_size=3))


@settings(max_examples=150)
@given(possible_configs())
def test_any_possible_configuration_round_trips(d):
    config = ModelConfig.from_dict(d)
    written = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(written) == config
    assert all(written[key] == d[key] for key in d if set(key) <= set("xyz"))


def test_configuration_and_package_need_no_torch():
    script = "import soli, soli.config, sys; soli.preset('nano'); print('torch' in sys.modules, 'numpy' in sys.modules)"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.split() == ["False", "False"]
