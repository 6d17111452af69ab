"""A recipe's fim_rate reaches the tokens: so many documents are prefix, suffix, middle, by `build` and by `pack`."""

import json

import numpy as np
import pytest

from soli.cli import main
from soli.data.documents import Pair
from soli.data.recipe import load_recipe
from soli.data.token_files import read_meta, stored_dtype
from soli.data.tokenizer import Tokenizer
from soli.recipes import read_data_config
from soli.recipes.nano_corpus.build import write_token_files
from soli.recipes.nano_corpus.corpus import Corpus, Line

TEXTS = [f"Line {n} of the manual says {n * n}." for n in range(2000)]
FRAME = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def fim_share(folder, split="train"):
    """Share of plain documents that are rearranged; each must be PSM and hold one of TEXTS."""
    tokenizer = Tokenizer.from_folder(folder)
    tokens = np.fromfile(folder / f"{split}.bin", dtype=stored_dtype(read_meta(folder)))
    prefix, suffix, middle = (tokenizer.token_id(token) for token in FRAME)
    plain = rearranged = 0
    for document in np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id)[1:]):
        plain += document[1] == tokenizer.token_id("<|text|>")
        if prefix in document:
            rearranged += 1
            (b,), (c,) = np.flatnonzero(document == suffix), np.flatnonzero(document == middle)
            assert document[1] == prefix and b < c and document[-1] == tokenizer.eos_id
            parts = (document[2:b], document[c + 1 :], document[b:c])
            assert "".join(tokenizer.decode(part) for part in parts) in TEXTS
    return rearranged / (plain + rearranged)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fim")
    Tokenizer.train(TEXTS, 400).save(folder / "tokenizer")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_build_rearranges_documents_at_the_recipes_rate(tmp_path, rate):
    config = read_data_config({"data": {"corpus": "nano_corpus", "vocab_size": 400, "fim_rate": rate}})
    pairs = [Pair("games", f"第{n}只猫", f"cat number {n}") for n in range(50)]
    lines = [Line("en", "manual", text) for text in TEXTS]
    write_token_files(Corpus(pairs, pairs[:1], lines, lines[:100]), config, tmp_path, lambda name, event: None)
    assert fim_share(tmp_path) == pytest.approx(rate, abs=0.02 if rate else 0)
    assert fim_share(tmp_path, "valid") == 0


def packed(home, out, *options):
    arguments = ["data", "pack", str(home / "texts.jsonl"), "--tokenizer", str(home / "tokenizer"), "--out", str(out)]
    assert main([*arguments, *options, "--json"]) == 0
    return fim_share(out)


def test_pack_uses_the_rate_of_a_recipe_unless_an_option_overrides_it(home, tmp_path):
    assert load_recipe("671b")["data"]["fim_rate"] == load_recipe("16b")["data"]["fim_rate"] == 0.1
    assert packed(home, tmp_path / "recipe", "--recipe", "671b") == pytest.approx(0.1, abs=0.02)
    assert fim_share(tmp_path / "recipe", "valid") == 0
    assert packed(home, tmp_path / "option", "--recipe", "671b", "--fim-rate", "0.5") == pytest.approx(0.5, abs=0.04)
    assert packed(home, tmp_path / "neither") == 0


def test_pack_uses_the_other_numbers_of_a_recipe_too(home, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[data]\nheldout_every = 5\nseed = 7\n")
    packed(home, tmp_path / "out", "--recipe", str(file))
    meta = read_meta(tmp_path / "out")
    held = sum(row["documents"] for row in meta["valid_sources"].values())
    assert meta["seed"] == 7 and 300 < held < 500  # of 2,000, one in five
