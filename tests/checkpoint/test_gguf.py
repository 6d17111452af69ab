"""GGUF: tensors have their source's values, what llama.cpp cannot run is rejected, and llama.cpp computes alike."""

import json
import os
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from soli.checkpoint import load_model, save_model
from soli.checkpoint.gguf.convert import convert_to_gguf
from soli.checkpoint.gguf.vocabulary import PRE_TOKENIZERS, read_vocabulary
from soli.cli import main
from soli.data.tokenizer import Tokenizer
from soli.engine.text_model import open_text_model
from soli.errors import SoliError
from soli.model import Transformer
from tests.checkpoint.folders import FULL, edit_json
from tests.data.test_tiktoken_model import folder as tiktoken_folder
from tests.data.test_tiktoken_model import random_texts
from tests.data.test_tokenizer import bytes_folder
from tests.model.oracle import draw_config, make_model

BUNDLED = Path(__file__).parents[2] / "src/soli/models/nano"
DOCS = Path(__file__).parents[2] / "docs"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}


def sentences() -> list[str]:
    lines = [line for file in sorted(DOCS.glob("*.md")) for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if len(line) > 40]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    """Soli's own tokenizer, which splits as DeepSeek-V3's does."""
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(sentences(), 1000).save(folder)
    return folder


def model(**changes: Any) -> Transformer:
    fields = FULL | {"vocab_size": 1100, "max_position_embeddings": 128, "rope_scaling": None} | changes
    return make_model(draw_config(0, **fields)).eval()


def folder(path: Path, tokenizer_folder: Path, format: str = "fp32", **changes: Any) -> Path:
    save_model(model(**changes), path, format, tokenizer_from=tokenizer_folder)
    return path


def tensors(file: Path) -> dict[str, np.ndarray]:
    values = {}
    for tensor in gguf.GGUFReader(file).tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        values[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return values


def keys(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("type", ["f32", "bf16"])
@pytest.mark.parametrize("format", ["fp32", "fp8"])
def test_every_tensor_has_the_values_of_its_source(tmp_path, tokenizer_folder, type, format) -> None:
    source = folder(tmp_path / "m", tokenizer_folder, format)
    conversion = convert_to_gguf(source, tmp_path / "m.gguf", type)
    state = load_model(source, dtype=torch.float32, mtp=False).state_dict()
    low = torch.float32 if type == "f32" else torch.bfloat16

    def rounded(values: torch.Tensor) -> np.ndarray:
        return values.to(low).float().numpy()

    actual = tensors(tmp_path / "m.gguf")
    assert len(actual) == conversion.tensors
    assert not any(name.startswith("blk.2.") for name in actual)  # the MTP module
    config = load_model(source, device="meta").config
    nope, width = config.qk_nope_head_dim, config.moe_intermediate_size
    kv_b = rounded(state["layers.1.self_attn.kv_b_proj.weight"])
    kv_b = kv_b.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    gate_up = rounded(state["layers.1.mlp.experts.gate_up_proj"])
    expected = {
        "token_embd.weight": rounded(state["embed_tokens.weight"]),
        "output.weight": rounded(state["lm_head.weight"]),
        "output_norm.weight": state["norm.weight"].float().numpy(),
        "blk.0.ffn_up.weight": rounded(state["layers.0.mlp.up_proj.weight"]),
        "blk.1.attn_k_b.weight": kv_b[:, :nope].transpose(0, 2, 1),
        "blk.1.attn_v_b.weight": kv_b[:, nope:],
        "blk.1.ffn_gate_exps.weight": gate_up[:, :width],
        "blk.1.ffn_up_exps.weight": gate_up[:, width:],
        "blk.1.ffn_down_exps.weight": rounded(state["layers.1.mlp.experts.down_proj"]),
        "blk.1.ffn_gate_inp.weight": state["layers.1.mlp.gate.weight"].float().numpy(),
        "blk.1.exp_probs_b.bias": state["layers.1.mlp.gate.e_score_correction_bias"].numpy(),
    }
    for name, values in expected.items():
        assert np.array_equal(actual[name], values), name


def test_the_keys_say_what_the_configuration_says(tmp_path, tokenizer_folder) -> None:
    source = folder(tmp_path / "m", tokenizer_folder, rope_scaling=YARN)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# m\n")
    edit_json(source / "config.json", lambda config: config.update(eos_token_id=[1, 4]))
    convert_to_gguf(source, tmp_path / "m.gguf", "f32")
    values = keys(tmp_path / "m.gguf")
    config = load_model(source, device="meta").config
    assert values["deepseek2.attention.key_length_mla"] == config.qk_head_dim
    assert values["deepseek2.rope.scaling.type"] == "yarn" and values["deepseek2.rope.scaling.factor"] == 4.0
    assert values["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert values["deepseek2.expert_gating_func"] == 2 and values["deepseek2.expert_weights_norm"] is True
    assert values["tokenizer.ggml.pre"] == "deepseek-v3"
    assert (values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.eot_token_id"]) == (1, 4)
    assert values["tokenizer.ggml.add_bos_token"] is True and values["general.license"] == "mit"
    assert len(values["tokenizer.ggml.tokens"]) == 1100 and values["tokenizer.ggml.tokens"][1050] == "[PAD1050]"
    assert values["tokenizer.ggml.token_type"][:1] == [3] and values["tokenizer.ggml.token_type"][1050] == 5


def test_a_folder_gets_a_card_and_the_licence(tmp_path, tokenizer_folder, capsys) -> None:
    source = folder(tmp_path / "m", tokenizer_folder, "bf16")
    (source / "LICENSE").write_text("free")
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "gguf"]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["LICENSE", "README.md", "m-f32.gguf"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama-cli --model m-f32.gguf" in card and "GGUF, float32" in card and "see LICENSE" in card
    assert "write <|text|> into a text prompt" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "gguf"]) == 1
    capsys.readouterr()
    assert main(["convert", str(source), str(tmp_path / "x.gguf"), "--to", "gguf", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "gguf" and result["bytes_written"] == sum(
        tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors
    )


REJECTED = {
    "attention_bias": {"attention_bias": True},
    "rope_interleave": {"rope_interleave": False},
    "n_shared_experts": {"n_shared_experts": 0},
    "moe_layer_freq": {"moe_layer_freq": 2, "num_hidden_layers": 3},
    "topk_method": {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "model_type": "deepseek_v2"},
    "rope_scaling.mscale": {"rope_scaling": {**YARN, "mscale": 0.7}},
    "model_type": {"model_type": "axk1"},
    "llama_4_scaling": {
        "model_type": "mistral4",
        "rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8},
    },
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_llama_cpp_does_not_compute_is_rejected_by_name(tmp_path, tokenizer_folder, name) -> None:
    source = folder(tmp_path / "m", tokenizer_folder, **REJECTED[name])
    with pytest.raises(SoliError, match=rf"config\.json: {name} is .*llama\.cpp"):
        convert_to_gguf(source, tmp_path / "out.gguf", "f32")
    assert os.listdir(tmp_path) == ["m"]


def test_a_tokenizer_without_a_pre_tokenizer_is_rejected_by_name(tmp_path, tokenizer_folder) -> None:
    source = folder(tmp_path / "m", tokenizer_folder)
    for changes in (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFC"}},
    ):
        original = (source / "tokenizer.json").read_text()
        edit_json(source / "tokenizer.json", lambda document, changes=changes: document.update(changes))
        with pytest.raises(SoliError, match=r"llama\.cpp has no pre-tokenizer that splits text as this tokenizer"):
            convert_to_gguf(source, tmp_path / "out.gguf", "f32")
        (source / "tokenizer.json").write_text(original)
    assert os.listdir(tmp_path) == ["m"]


def test_bad_options_leave_nothing(tmp_path, tokenizer_folder) -> None:
    source = folder(tmp_path / "m", tokenizer_folder)
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(SoliError, match="is there already"):
        convert_to_gguf(source, tmp_path / "there.gguf")
    with pytest.raises(SoliError, match="choose auto, f32 or bf16"):
        convert_to_gguf(source, tmp_path / "x.gguf", "q4_0")
    assert main(["convert", str(source), str(tmp_path / "x"), "--to", "gguf", "--ue8m0"]) == 1
    assert main(["convert", str(source), str(tmp_path / "x"), "--to", "bf16", "--gguf-type", "f32"]) == 1
    assert sorted(os.listdir(tmp_path)) == ["m", "there.gguf"] and (tmp_path / "there.gguf").read_text() == "mine"


def test_a_failure_leaves_nothing(tmp_path, tokenizer_folder, monkeypatch) -> None:
    source = folder(tmp_path / "m", tokenizer_folder)

    def interrupt(written: int, total: int) -> None:
        if written > total / 2:
            raise KeyboardInterrupt

    for name in ("x.gguf", "x"):
        with pytest.raises(KeyboardInterrupt):
            convert_to_gguf(source, tmp_path / name, "f32", interrupt)
    assert os.listdir(tmp_path) == ["m"]


def test_tokens_have_llama_cpp_s_types(tmp_path) -> None:
    assert set(PRE_TOKENIZERS.values()) == {"deepseek-v3", "kimi-k2"}
    table = {"1161": {"content": "[EOS]", "special": True}, "1163": {"content": "<|tool|>", "special": False}}
    source = tiktoken_folder(tmp_path, {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": table})
    vocabulary = read_vocabulary(source, 1170)
    assert vocabulary.types[1161:1165] == [3, 3, 4, 5] and vocabulary.tokens[1162] == "<|reserved_token_1162|>"
    assert vocabulary.pre_tokenizer == "kimi-k2" and any("no merges lead to" in note for note in vocabulary.notes)
    with pytest.raises(SoliError, match="do not belong together"):
        read_vocabulary(source, 1000)
    with pytest.raises(SoliError, match="no pre-tokenizer"):
        read_vocabulary(bytes_folder(tmp_path), 300)


def llama(file: Path, positions: int) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(
        str(file), n_ctx=positions, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False, flash_attn=False
    )


VARIANTS = {
    "v3": {},
    "v3 with yarn": {"rope_scaling": YARN},
    "v3 with the v2 way of yarn": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "yarn without mscales": {"rope_scaling": {**YARN, "mscale_all_dim": 0.0}},
    "no q_lora, one group": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "softmax, greedy": {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "n_group": 1},
    "tied": {"tie_word_embeddings": True},
    "not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "dense": {"n_routed_experts": 0, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
    "glm": {"model_type": "glm4_moe_lite", "n_group": 1, "topk_group": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_llama_cpp_computes_the_same_logits(tmp_path, tokenizer_folder, name) -> None:
    source = folder(tmp_path / "m", tokenizer_folder, **VARIANTS[name])
    convert_to_gguf(source, tmp_path / "m.gguf", "f32")
    theirs = llama(tmp_path / "m.gguf", 128)
    ids = [random.Random(1).randrange(1000) for _ in range(60)]
    theirs.eval(ids)
    with torch.no_grad():
        ours = load_model(source, mtp=False)(torch.tensor([ids]))[0].numpy()
    difference = np.abs(theirs.scores[: len(ids)] - ours).max() / np.abs(ours).max()
    assert difference < 1e-3, difference


@pytest.mark.slow
def test_llama_cpp_tokenizes_and_answers_as_the_bundled_model_does(tmp_path) -> None:
    """200 texts, and 32 greedy tokens after each of 20 prompts, in float32."""
    convert_to_gguf(BUNDLED, tmp_path / "m.gguf", "f32")
    text_model = open_text_model(str(BUNDLED), dtype="float32")
    theirs = llama(tmp_path / "m.gguf", text_model.positions)
    texts = [*random.Random(2).sample(sentences(), 100), *random_texts(100, 4)]
    for text in texts:
        tokens = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert tokens == text_model.tokenizer.encode(text), ascii(text)
    for text in texts[:20]:
        ids = text_model.text_prompt(text)[:100]
        theirs.reset()
        theirs.eval(ids)
        for _ in range(32):
            token = int(theirs.scores[theirs.n_tokens - 1].argmax())
            with torch.no_grad():
                assert int(text_model.model(torch.tensor([ids]))[0, -1].argmax()) == token, (text, len(ids))
            ids.append(token)
            theirs.eval([token])
