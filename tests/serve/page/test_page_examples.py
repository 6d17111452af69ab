"""The examples that the page offers: the bundled model's translation is the one stated beside each.

After another model is bundled, this test names what to change in src/soli/serve/page/examples.js.
"""

import json
import re

from soli.engine.text_model import open_text_model
from soli.eval.translation import Translator
from soli.serve.app import PAGE_FOLDER


def test_the_bundled_model_translates_every_example_as_stated():
    source = (PAGE_FOLDER / "examples.js").read_text(encoding="utf-8")
    table = json.loads(re.search(r"TRANSLATIONS = (\[.*?\]);", source, re.S)[1])
    assert len(table) >= 4 and {tuple(entry) for entry in table} == {("text", "translation")}
    translator = Translator(open_text_model("nano"))
    texts = [entry["text"] for entry in table]
    translations = [answer.text for answer in translator.translate(texts)]
    stated = [entry["translation"] for entry in table]
    assert dict(zip(texts, translations, strict=True)) == dict(zip(texts, stated, strict=True))
