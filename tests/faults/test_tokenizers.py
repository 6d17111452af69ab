"""A tokenizer.json is computed with: whatever its library makes of one, panics included, is one sentence, at once."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from soli.cli import main
from soli.data.tokenizer import Tokenizer
from soli.engine.text_model import TextModel
from soli.errors import SoliError, library_errors
from tests.engine.tiny import tiny_folder
from tests.serve import tiny_server

LONG = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 24}
PANIC = {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}
RETRIES = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
NESTED = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [LONG] * 6}]}


def _template(ids: list[int]) -> dict[str, Any]:
    parts = [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"x": {"id": "x", "ids": ids, "tokens": ["x"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": parts, "pair": [], "special_tokens": special}


DAMAGES: dict[str, dict[str, Any]] = {
    "an unknown token that is none": {"model": {"type": "WordLevel", "vocab": {"<|bos|>": 0}, "unk_token": "b"}},
    "no unknown token": {"model": {"type": "Unigram", "vocab": []}},
    "an endless regular expression": {"pre_tokenizer": RETRIES},
    "an empty pattern": {"normalizer": PANIC},
    "a table that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "replacements of replacements": {"normalizer": {"type": "Sequence", "normalizers": [LONG] * 6}},
    "a nested sequence": {"normalizer": NESTED},
    "replacements of what is decoded": {"decoder": {"type": "Sequence", "decoders": [LONG] * 6}},
    "a template with a token that is none": {"post_processor": _template([10**6])},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_folder(tmp_path_factory.mktemp("toy")))


@pytest.fixture
def damage(folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    file = folder / "tokenizer.json"
    text = file.read_text()
    yield lambda fields: file.write_text(json.dumps(json.loads(text) | fields))
    file.write_text(text)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_tokenizer_that_fails_is_one_sentence(folder: Path, damage: Any, name: str, capsys: Any) -> None:
    damage(DAMAGES[name])
    assert main(["generate", str(folder), "a" * 40 + "b", "--max-new-tokens", "2"]) == 1
    error = capsys.readouterr().err
    assert "tokenizer" in error and "unexpected" not in error and error.count("\n") == 1


def test_replacements_of_ordinary_models_are_read(folder: Path, damage: Any) -> None:
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    damage({"normalizer": {"type": "Sequence", "normalizers": steps}})
    assert Tokenizer.from_folder(folder).encode("a b")


def test_a_panic_in_the_server_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy: TextModel = tiny_server.tiny()
    broken = Tokenizer.train(["a"], 330)
    broken._backend.normalizer = _normalizer(PANIC)
    with tiny_server.tiny_server() as url:
        monkeypatch.setattr(healthy.tokenizer, "_backend", broken._backend)
        for stream in (False, True):
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "hello", "stream": stream}, timeout=20)
            assert answer.status_code == 400 and "tokenizer" in answer.json()["error"]["message"]
        monkeypatch.undo()
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "hello", "max_tokens": 2}).status_code == 200


def _normalizer(step: dict[str, Any]) -> Any:
    from tokenizers import normalizers

    return normalizers.Replace(step["pattern"]["String"], step["content"])


def test_interrupts_and_sentences_pass_unchanged() -> None:
    for error in (KeyboardInterrupt(), SystemExit(3), SoliError("a sentence")):
        with pytest.raises(type(error)) as raised, library_errors(lambda reason: SoliError(f"another: {reason}")):
            raise error
        assert raised.value is error
