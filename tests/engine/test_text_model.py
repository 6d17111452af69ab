"""Between text and tokens: how a text begins and ends, and how half a character is shown."""

import json
from pathlib import Path

import pytest
import torch

from soli.data.tokenizer import Tokenizer
from soli.engine.text_model import open_text_model, text_model
from soli.errors import SoliError
from tests.engine.tiny import tiny_folder, tiny_model, tiny_text_model, tiny_tokenizer


def test_a_plain_text_begins_as_in_training_and_special_tokens_in_it_stay_text():
    tiny = tiny_text_model()
    assert tiny.text_prompt("the")[:2] == [0, 5]
    assert not set(tiny.text_prompt("<|eos|><|zh|>")[2:]) & set(range(16))


def test_tokens_as_a_person_reads_them():
    tiny = tiny_text_model()
    label = [tiny.label(token) for token in tiny.tokenizer.encode("the 鼠")]
    assert label[0].startswith("t") and "".join(label).endswith("⟨e9⟩⟨bc⟩⟨a0⟩")
    assert tiny.label(4) == "<|zh|>"
    assert tiny.label(10_000) == ""


def test_a_folder_says_how_texts_begin_and_end(tmp_path):
    folder = tiny_folder(tmp_path)
    opened = open_text_model(folder)
    assert opened.stop_ids == {1} and opened.text_prefix == (0, 5)
    assert str(opened.model.lm_head.weight.dtype) == "torch.float32" and not len(opened.model.mtp)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    assert open_text_model(folder).stop_ids == {1, 4}


def test_as_is_leaves_fp8_in_its_file_and_computes_the_same():
    quantized, dequantized = (open_text_model("nano", dtype=dtype).model for dtype in ("as-is", "bfloat16"))
    assert quantized.layers[0].mlp.up_proj.quantized.format == "fp8"
    assert quantized.embed_tokens.weight.dtype == torch.bfloat16
    assert dequantized.layers[0].mlp.up_proj.quantized is None
    ids = torch.arange(40, 72)[None]
    with torch.no_grad():
        actual, expected = quantized(ids).float(), dequantized(ids).float()
    assert float((actual - expected).norm() / expected.norm()) < 0.03


def test_other_tokenizers_begin_as_their_files_say(tmp_path, monkeypatch):
    folder = Path(tiny_folder(tmp_path))
    monkeypatch.setattr(Tokenizer, "has_token", lambda self, token: token != "<|text|>")
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(document | {"post_processor": None}))
    assert open_text_model(str(folder)).text_prefix == ()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    assert open_text_model(str(folder)).text_prefix == (0,)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    opened = open_text_model(str(folder))
    assert opened.text_prefix == () and opened.text_prompt("the") == opened.tokenizer.encode("the")
    with pytest.raises(SoliError, match="prompt is empty"):
        opened.text_prompt("")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(SoliError, match=r"tokenizer_config\.json: not valid JSON"):
        open_text_model(str(folder))


def test_tokens_around_a_text_belong_to_the_model(monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "text_affixes", ((0,), (99_999,)))
    with pytest.raises(SoliError, match=r"the tokens \[0, 99999\] around a text, but the model's vocab_size is 330"):
        text_model(tiny_model(vocab_size=330), tokenizer)


def test_parts_that_do_not_belong_together_are_rejected(tmp_path):
    with pytest.raises(SoliError, match="do not belong together"):
        text_model(tiny_model(), tiny_tokenizer())
    with pytest.raises(SoliError, match="choose auto, as-is, float32 or bfloat16"):
        open_text_model("nano", dtype="int8")
    with pytest.raises(SoliError, match="choose cpu or cuda"):
        open_text_model("nano", device="tpu")
    with pytest.raises(SoliError, match="device is 'cuda:99', but PyTorch sees"):
        open_text_model("nano", device="cuda:99")
    with pytest.raises(SoliError, match="96 positions"):
        tiny_text_model().remaining_tokens([5] * 96, "the prompt")
