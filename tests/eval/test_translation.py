"""Lines in, lines out: order, empty lines, directions, windows, and the error for a line that cannot be translated."""

import pytest

from soli.data.text import language_of
from soli.errors import SoliError
from soli.eval.translation import Translator, one_line
from tests.engine.oracle import continuation
from tests.engine.tiny import tiny_text_model

LINES = ["the cat", "", "猫坐在垫子上", "  ", "hello world the mat", "123"]


def test_lines_come_back_in_order_in_any_window_and_batch():
    text_model = tiny_text_model()
    whole = [translation.text for translation in Translator(text_model, max_new_tokens=8).translate(LINES)]
    assert [bool(text) for text in whole] == [True, False, True, False, True, True]
    for window, batch_size in ((1, 1), (2, 4), (5, 2)):
        parts = Translator(text_model, max_new_tokens=8, batch_size=batch_size).translate(LINES, window)
        assert [translation.text for translation in parts] == whole
    assert [translation.to for translation in Translator(text_model, max_new_tokens=1).translate(LINES)] == [
        "zh",
        None,
        "en",
        None,
        "zh",
        "zh",
    ]


def test_a_translation_is_the_greedy_continuation_of_its_prompt():
    text_model = tiny_text_model()
    [translation] = Translator(text_model, to="en").translate(["猫 坐\t在"])
    prompt = text_model.tokenizer.translation_prompt("猫 坐 在", "en")
    expected = continuation(text_model.model, prompt, 32 + 3 * len(prompt), stop_ids={1})
    assert translation.answer.prompt_ids == tuple(prompt) and translation.answer.ids == expected.ids
    assert translation.text == one_line(text_model.tokenizer.decode(expected.ids))


def test_lines_before_a_bad_one_are_translated():
    translations = []
    with pytest.raises(SoliError, match=r"line 3 has .* tokens, but the model has 96 positions"):
        translator = Translator(tiny_text_model(), max_new_tokens=2)
        for translation in translator.translate(["the", "cat", "mat " * 100, "sat"]):
            translations.append(translation)
    assert [translation.source for translation in translations] == ["the", "cat"]


def test_more_new_tokens_than_fit_are_rejected():
    with pytest.raises(SoliError, match="lower max_new_tokens to 9"):
        list(Translator(tiny_text_model(), max_new_tokens=96).translate(["the"]))


def test_a_model_cannot_control_the_terminal():
    assert one_line(" a\x1b[31m\n b\x07\u202e猫 ") == "a[31m b猫"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("打开 Settings 页面", "zh"),
        ("the word 猫 means cat", "en"),
        ("42 %", None),
        ("鼠", "zh"),
        ("Ça va", "en"),
        ("", None),
    ],
)
def test_language_by_script(text, language):
    assert language_of(text) == language
