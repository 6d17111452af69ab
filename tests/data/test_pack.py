"""`soli data pack`: a user's texts become the folder that training reads, reproducibly, and bad lines are reported."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.cli import main
from soli.data.pack import Input, PackConfig, cut, pack_inputs
from soli.data.readers import InputLayout
from soli.data.text import is_held_out
from soli.data.token_files import DTYPE_32, TokenWriter, dtype_for, inspect_folder, read_meta, stored_dtype
from soli.data.tokenizer import Tokenizer
from soli.data.tsv import read_tsv
from soli.errors import SoliError

TEXTS = [f"Text {n} has a line.\n\nAnd {n * n} more." for n in range(400)]
PAIRS = [(f"cat number {n}", f"第{n}只猫") for n in range(200)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tokenizer, texts.jsonl and pairs.tsv."""
    folder = tmp_path_factory.mktemp("texts")
    Tokenizer.train(TEXTS + [part for pair in PAIRS for part in pair], 400).save(folder / "tokenizer")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "pairs.tsv").write_text("en\tzh\n" + "".join(f"{en}\t{zh}\n" for en, zh in PAIRS))
    return folder


def packed(home, out, *, layout=None, weight=1.0, file="texts.jsonl", **fields):
    config = PackConfig((Input(home / file, weight),), layout or InputLayout(), **{"heldout_every": 10, **fields})
    return pack_inputs(config, home / "tokenizer", out, lambda name, event: None, lambda line: None)


def documents(folder, split="train"):
    """Each document's tokens as text, without bos and eos."""
    tokenizer = Tokenizer.from_folder(folder)
    tokens = np.fromfile(folder / f"{split}.bin", dtype=stored_dtype(read_meta(folder)))
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id)[1:])
    return ["".join(tokenizer.token_text(i) for i in part if i >= 16) for part in parts]


def test_every_text_occurs_once_on_its_side_of_the_split(home, tmp_path):
    meta = packed(home, tmp_path / "out")
    held = [text for text in TEXTS if is_held_out(text, 10)]
    assert documents(tmp_path / "out", "valid") == held and 10 < len(held) < 80
    train = documents(tmp_path / "out")
    rest = [text for text in TEXTS if text not in held]
    assert Counter(train) == Counter(rest) and train != rest
    assert meta["sources"][str(home / "texts.jsonl")]["documents"] == len(train)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {
        *("train.bin", "valid.bin", "meta.json", "tokenizer.json", "tokenizer_config.json", "bad_lines.jsonl")
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_pairs_are_packed_both_ways_with_their_heldout_table(home, tmp_path):
    meta = packed(home, tmp_path / "out", layout=InputLayout(("en", "zh")), file="pairs.tsv")
    heldout = list(read_tsv(tmp_path / "out" / "heldout.tsv", 3))
    assert [(en, zh) for _, zh, en in heldout] == [pair for pair in PAIRS if is_held_out(pair[0], 10)]
    assert documents(tmp_path / "out", "valid") == [text for _, zh, en in heldout for text in (en + zh, zh + en)]
    assert sum(row["documents"] for row in meta["sources"].values()) == 2 * (len(PAIRS) - len(heldout))
    inspection = inspect_folder(tmp_path / "out", 3, 0)
    assert set(inspection["characters_per_token"]) == {"en", "zh"}
    assert all(sample["text"].startswith(("<|en|>", "<|zh|>")) for sample in inspection["samples"])


def test_weights_draw_copies_and_the_seed_decides(home, tmp_path):
    runs = {
        name: packed(home, tmp_path / name, weight=2.5, seed=seed, fim_rate=0.3)
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    }
    train = {name: (tmp_path / name / "train.bin").read_bytes() for name in runs}
    assert runs["one"] == runs["same"] and train["one"] == train["same"] != train["other"]
    times = Counter(documents(tmp_path / "one"))
    assert set(times.values()) == {2, 3} and 2.3 < np.mean(list(times.values())) < 2.7
    gaps = np.fromfile(tmp_path / "one" / "train.bin", dtype="<u2") == 6
    assert 0.2 < gaps.sum() / sum(times.values()) < 0.4


def test_a_weight_of_zero_leaves_nothing_to_train_on(home, tmp_path):
    with pytest.raises(SoliError, match="no document remains to train on"):
        packed(home, tmp_path / "out", weight=0.0)
    assert not list(tmp_path.iterdir())


@given(text=st.text(alphabet="a .\n。", max_size=300), longest=st.integers(50, 120))
def test_parts_join_to_the_text(text, longest):
    parts = list(cut(text, longest))
    assert "".join(parts) == text and all(len(part) <= longest for part in parts)
    assert all(len(part) >= longest // 2 for part in parts[:-1])


def test_long_texts_are_cut_after_paragraphs(home, tmp_path):
    assert list(cut("a" * 40 + ".\n\n" + "b" * 30, 50)) == ["a" * 40 + ".\n\n", "b" * 30]
    assert list(cut("a" * 500, None)) == ["a" * 500]
    (home / "long.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    packed(home, tmp_path / "out", file="long.txt", layout=InputLayout(lines=True), longest_document=50)
    assert all(len(text) <= 50 for text in documents(tmp_path / "out"))


def test_training_reads_the_folder(home, tmp_path):
    from soli.train.setup import prepare
    from tests.train.toy import MODEL, settings

    packed(home, tmp_path / "out")
    run = prepare(settings(model=MODEL | {"vocab_size": 400}), {}, tmp_path / "out", tmp_path / "run")
    assert run.stage.batches.take(0, 3).shape == (3, 18) and run.sentences == []


def test_a_large_vocabulary_takes_32_bits(tmp_path):
    assert dtype_for(65536).itemsize == 2 and dtype_for(65537) == DTYPE_32 == stored_dtype({"dtype": DTYPE_32.name})
    with TokenWriter(tmp_path / "t.bin", DTYPE_32) as writer:
        writer.write("a", [0, 129279])
    assert np.fromfile(tmp_path / "t.bin", dtype=DTYPE_32).tolist() == [0, 129279]


def test_a_vocabulary_without_the_special_tokens_packs_plain_texts_only(home, tmp_path):
    content = json.loads((home / "tokenizer" / "tokenizer.json").read_text())
    written = json.dumps(content).replace("<|text|>", "<|other|>").replace("<|fim_prefix|>", "<|another|>")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "tokenizer.json").write_text(written)
    config = PackConfig((Input(home / "texts.jsonl"),), heldout_every=10)
    quiet = (lambda name, event: None, lambda line: None)
    pack_inputs(config, tmp_path / "foreign", tmp_path / "out", *quiet)
    assert inspect_folder(tmp_path / "out", 1, 0)["samples"][0]["text"].startswith("Text ")
    gaps = PackConfig(config.inputs, fim_rate=0.5)
    with pytest.raises(SoliError, match="no token <\\|fim_prefix\\|>"):
        pack_inputs(gaps, tmp_path / "foreign", tmp_path / "gaps", *quiet)


def test_bad_lines_are_printed_counted_and_listed(home, tmp_path, capfd):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join("{\n" if n % 4 == 1 else json.dumps({"text": text}) + "\n" for n, text in enumerate(TEXTS)))
    args = ["--tokenizer", str(home / "tokenizer"), "--out", str(tmp_path / "out"), "--heldout-every", "10"]
    assert main(["data", "pack", str(bad), *args, "--json"]) == 0
    shown = capfd.readouterr()
    printed = shown.err.splitlines()
    assert [line.split(": ")[0] for line in printed[:5]] == [f"{bad}:{n}" for n in (2, 6, 10, 14, 18)]
    assert printed[5:] == [f"{bad}: 95 more bad lines"]
    assert json.loads(shown.out)["bad_lines"] == {str(bad): 100}
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_lines.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == list(range(2, 402, 4)) and listed[0]["file"] == str(bad)
    assert listed[0]["excerpt"] == "{" and listed[0]["why"].startswith("not JSON")


def test_a_file_that_is_mostly_bad_is_an_error_that_leaves_nothing(home, tmp_path, capfd):
    lines = ["{"] * 11 + [json.dumps({"text": text}) for text in TEXTS[:10]]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    args = ["--tokenizer", str(home / "tokenizer"), "--out", str(tmp_path / "out")]
    assert main(["data", "pack", str(home / "texts.jsonl"), str(tmp_path / "bad.jsonl"), *args]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"soli: {tmp_path / 'bad.jsonl'}: 11 of 21 lines are bad, more than half")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_blank_lines_and_one_bad_file_of_many_are_not_fatal(home, tmp_path):
    (home / "airy.txt").write_text("\n\n\n".join(TEXTS).replace("\n\nAnd", " And"))
    assert packed(home, tmp_path / "out", file="airy.txt", layout=InputLayout(lines=True))["bad_lines"]
    for n, text in enumerate(TEXTS[:40]):
        (home / "many").mkdir(exist_ok=True)
        (home / "many" / f"{n}.txt").write_bytes(b"\xff" if n == 7 else text.encode())
    assert packed(home, tmp_path / "other", file="many")["bad_lines"] == {str(home / "many" / "7.txt"): 1}


def test_the_command_shows_a_table(home, tmp_path, capfd):
    args = ["--tokenizer", str(home / "tokenizer"), "--out", str(tmp_path / "out"), "--pair", "en,zh"]
    assert main(["data", "pack", f"{home / 'pairs.tsv'}=2", *args, "--heldout-every", "10"]) == 0
    shown = capfd.readouterr()
    assert "training tokens" in shown.out and "100.0%" in shown.out and "200 texts" in shown.err


@pytest.mark.parametrize(
    ("extra", "status", "words"),
    [
        (["--pair", "en"], 2, "name two fields"),
        (["--heldout-every", "1"], 1, "heldout_every is 1"),
        (["--fim-rate", "1.5"], 1, "fim_rate is 1.5"),
        (["--longest", "3"], 1, "longest_document is 3"),
        (["--pair", "a,b", "--longest", "300"], 1, "neither cut nor rearranged"),
        (["--heldout-every", "1000000000"], 1, "no document is held out"),
        (["--field", "body"], 1, "400 of 400 lines are bad"),
        (["--format", "xml"], 1, "choose one of"),
    ],
)
def test_wrong_options_are_rejected_in_a_sentence(home, tmp_path, capfd, extra, status, words):
    args = ["--tokenizer", str(home / "tokenizer"), "--out", str(tmp_path / "out"), *extra]
    assert main(["data", "pack", str(home / "texts.jsonl"), *args]) == status
    assert words in " ".join(capfd.readouterr().err.replace("│", " ").split()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["{}=x"], "is not a weight"),
        (["{}=-1"], "is -1.0; it must be a number from 0 to 100"),
        (["{}=nan"], "is nan; it must be finite, a number from 0 to 100"),
        (["{}", "{}=2"], "is given twice"),
    ],
)
def test_wrong_inputs_are_rejected_in_a_sentence(home, tmp_path, capfd, inputs, words):
    args = ["--tokenizer", str(home / "tokenizer"), "--out", str(tmp_path / "out")]
    assert main(["data", "pack", *(item.format(home / "texts.jsonl") for item in inputs), *args]) != 0
    assert words in " ".join(capfd.readouterr().err.replace("│", " ").split())


def test_a_folder_that_is_not_empty_is_not_touched(home, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SoliError, match="exists already"):
        packed(home, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"
