"""What goes along with weights: a tokenizer that transformers reads as Soli does, and a model card."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from soli.checkpoint import save_model
from soli.checkpoint.convert import convert_checkpoint, export_tokenizer
from soli.checkpoint.model_card import CardSource, read_source, render_card
from soli.checkpoint.writer import Target
from soli.cli import main
from soli.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from soli.errors import SoliError
from tests.checkpoint.folders import full_config, full_model
from tests.data.test_tiktoken_model import MOONLIGHT, WHOLE, added, folder, random_texts, ranks
from tests.data.test_tokenizer import BYTE_LEVEL, bytes_folder, template

TEXTS = ["", "hi", "The cat's 中文 123\n\n  x", "<|bos|> and <b> and [EOS]", *random_texts(60, 3)]


def same_tokens(written: Path, original: Path, special: tuple[str, ...]) -> None:
    """transformers encodes texts, and special tokens spelled in them, as Soli does with the original folder."""
    theirs, ours = AutoTokenizer.from_pretrained(written), Tokenizer.from_folder(original)
    prefix, suffix = ours.text_affixes
    rng = random.Random(0)
    for text in [*TEXTS, *(rng.choice(special) + text + rng.choice(special) for text in TEXTS)]:
        plain = theirs(text, split_special_tokens=True).input_ids  # a special token's name stays text, as in Soli
        assert plain == [*prefix, *ours.encode(text), *suffix], ascii(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))
    assert [theirs.convert_tokens_to_ids(token) for token in special] == [ours.token_id(token) for token in special]
    assert Tokenizer.from_folder(written).text_affixes == ours.text_affixes


@pytest.mark.parametrize("post_processor", [None, BYTE_LEVEL, template("<b> $A"), template("$A <e>")], ids=str)
@pytest.mark.parametrize("add_bos", [True, False, None])
def test_exported_tokenizers_encode_in_transformers_as_in_soli(tmp_path, post_processor, add_bos) -> None:
    (tmp_path / "source").mkdir()
    source = bytes_folder(tmp_path / "source", post_processor, add_bos_token=add_bos)
    export_tokenizer(source, tmp_path / "out")
    same_tokens(tmp_path / "out", source, ("<b>", "<e>"))


def test_a_trained_tokenizer_begins_texts_in_transformers_too(tmp_path) -> None:
    Tokenizer.train(TEXTS, 300).save(tmp_path / "t")
    same_tokens(tmp_path / "t", tmp_path / "t", SPECIAL_TOKENS)


def test_the_bundled_model_s_tokenizer_is_exported_whole(tmp_path) -> None:
    assert main(["export", "nano", str(tmp_path / "out"), "--tokenizer"]) == 0
    bundled = Path(__file__).parents[2] / "src/soli/models/nano"
    same_tokens(tmp_path / "out", bundled, SPECIAL_TOKENS)
    same_tokens(bundled, bundled, SPECIAL_TOKENS)


def moonlight(path: Path) -> Path:
    path.mkdir()
    first = len(ranks())
    tokens = added(first, _0={"content": "[BOS]", "special": True}, _1={"content": "[EOS]", "special": True})
    config = MOONLIGHT | tokens | {"bos_token": "[BOS]", "eos_token": "[EOS]", "chat_template": "{{ bos_token }}"}
    return folder(path, config)


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_tokenizer_json_is_written_from_tiktoken_model(tmp_path, add_bos) -> None:
    source = moonlight(tmp_path / "source")
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"add_bos_token": add_bos}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "tokenization_moonshot.py").write_text("raise SystemExit")
    assert main(["export", str(source), str(tmp_path / "out"), "--tokenizer"]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    same_tokens(tmp_path / "out", source, ("[BOS]", "[EOS]"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.chat_template == "{{ bos_token }}" and all(theirs.encode(text) for text in WHOLE)


def test_converted_folders_have_a_tokenizer_json(tmp_path) -> None:
    source = moonlight(tmp_path / "tokenizer")
    save_model(full_model(vocab_size=2000), tmp_path / "m", "fp32", tokenizer_from=source)
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    convert_checkpoint(tmp_path / "m", tmp_path / "again", Target("bf16"))
    same_tokens(tmp_path / "again", source, ("[BOS]", "[EOS]"))


def test_a_tokenizer_that_cannot_be_read_does_not_keep_the_weights_from_conversion(tmp_path) -> None:
    save_model(full_model(), tmp_path / "m", "fp32")
    (tmp_path / "m" / "tiktoken.model").write_text("x")
    notes = convert_checkpoint(tmp_path / "m", tmp_path / "again", Target("bf16")).notes
    assert any("the tokenizer is copied as it is" in note and "tiktoken.model" in note for note in notes)
    assert (tmp_path / "again" / "tiktoken.model").read_text() == "x"
    with pytest.raises(SoliError, match=r"tiktoken\.model"):
        export_tokenizer(tmp_path / "m", tmp_path / "out")
    with pytest.raises(SoliError, match="has no tokenizer"):
        export_tokenizer(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


CARD = "---\nlicense: mit  # as the code\nlanguage: [en]\n---\n# A model\n\nTrained by someone.\n"


def test_a_card_goes_along_and_keeps_what_the_source_says(tmp_path) -> None:
    save_model(full_model(), tmp_path / "m", "fp32")
    (tmp_path / "m" / "README.md").write_text(CARD)
    convert_checkpoint(tmp_path / "m", tmp_path / "a", Target("bf16"))
    convert_checkpoint(tmp_path / "a", tmp_path / "b", Target("int8"))
    first, second = ((tmp_path / name / "README.md").read_text() for name in "ab")
    assert first.startswith(CARD.rstrip()) and second.startswith(CARD.rstrip())
    for words in ("source | m |", "licence | mit, by", "format | bfloat16", "soli generate", "AutoTokenizer"):
        assert words in first, words
    assert second.count("## These files") == 1 and "source | a |" in second and "8-bit integers" in second
    assert "AutoTokenizer" not in second


def test_a_source_without_a_card_gets_one(tmp_path) -> None:
    save_model(full_model(), tmp_path / "m", "fp32")
    assert not (tmp_path / "m" / "README.md").exists()
    (tmp_path / "m" / "LICENSE").write_text("free")
    convert_checkpoint(tmp_path / "m", tmp_path / "a", Target("fp8"))
    card = (tmp_path / "a" / "README.md").read_text()
    assert "# m\n" in card and "licence | see LICENSE" in card and "FP8 E4M3" in card
    assert str(tmp_path) not in card


def test_a_snapshot_of_the_hub_is_named_by_its_id(tmp_path) -> None:
    snapshot = tmp_path / "models--moonshotai--Moonlight-16B-A3B" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert read_source(snapshot).name == "moonshotai/Moonlight-16B-A3B"


def test_a_card_that_is_no_text_is_copied(tmp_path) -> None:
    save_model(full_model(), tmp_path / "m", "fp32")
    (tmp_path / "m" / "README.md").write_bytes(b"\xff\xfe")
    notes = convert_checkpoint(tmp_path / "m", tmp_path / "a", Target("bf16")).notes
    assert any("the model card is copied as it is" in note for note in notes)
    assert (tmp_path / "a" / "README.md").read_bytes() == b"\xff\xfe"


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8", "int8", "int4", "gguf-f32", "gguf-bf16"])
def test_every_format_has_words_in_the_card(format) -> None:
    card = render_card(CardSource("x"), full_config(), format, "x.gguf" if format.startswith("gguf") else ".")
    assert "none stated" in card and ("llama-cli --model x.gguf" in card) == format.startswith("gguf")
