"""The example of back-translation: what the bundled model can translate back becomes pairs."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from soli.recipes.nano_corpus.sources.extra import read_extra

EXAMPLE = Path(__file__).parents[1] / "examples" / "back_translate.py"
SENTENCES = ["谢谢你。", "你是谁？", "  谢谢你。 ", "", "汤姆现在不在家。"]

TranslateBack = Callable[..., list[tuple[str, str, str]]]


@pytest.fixture
def translate_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TranslateBack:
    """Runs the example with options on SENTENCES and returns its pairs as (source, Chinese, English)."""

    def run(*options: str) -> list[tuple[str, str, str]]:
        sentences, pairs = tmp_path / "sentences.txt", tmp_path / "pairs.tsv"
        sentences.write_text("\n".join(SENTENCES), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(sentences), str(pairs), *options])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return [(source, row.zh, row.en) for source, row in read_extra([pairs])]

    return run


def test_each_sentence_that_is_found_again_is_a_pair_once(
    translate_back: TranslateBack, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = translate_back("--beams", "2", "--least", "-100", "--source", "mine")
    assert [row[:2] for row in rows] == [("mine", "谢谢你。"), ("mine", "你是谁？"), ("mine", "汤姆现在不在家。")]
    assert all(english and english.isascii() for _, _, english in rows)
    assert capsys.readouterr().err == "3 of 3 sentences\n"


def test_nothing_is_as_likely_as_is_asked_for(translate_back: TranslateBack) -> None:
    assert translate_back("--beams", "1", "--least", "0") == []


def test_bad_input_is_one_sentence_and_leaves_no_pairs(
    tmp_path: Path, translate_back: TranslateBack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"back_translate\.py: .*nowhere"):
        translate_back("--model", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"back_translate\.py: .*beam"):
        translate_back("--beams", "0")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path / "none.txt"), str(tmp_path / "pairs.tsv")])
    with pytest.raises(SystemExit, match=r"back_translate\.py: .*none\.txt"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert not (tmp_path / "pairs.tsv").exists()
