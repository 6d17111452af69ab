"""`soli translate`, `generate`, `routing` and `eval` as typed: what goes where, and one sentence for bad input."""

import io
import json
import re
import shutil
import sys

import pytest

from soli.cli import main
from soli.data.tokenizer import Tokenizer
from soli.engine.beam_search import BeamSearchParams
from soli.engine.text_model import open_text_model
from soli.eval.translation import Translator
from tests.engine.tiny import tiny_folder

SHORT = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("toy"))


def tiny_token(folder: str, text: str) -> int:
    return Tokenizer.from_folder(folder).encode(text)[0]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a verb with bytes on standard input; gives exit status, standard output and standard error."""

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        status = main(list(arguments))
        return status, *capsys.readouterr()

    return run


def assert_rejected(outcome: tuple[int, str, str], *words: str) -> None:
    status, out, err = outcome
    assert status != 0 and out == ""
    assert err.startswith("soli: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_the_translation_alone_is_on_standard_output(run, folder):
    status, out, err = run("translate", "hello", "--model", folder, *SHORT)
    assert (status, err, out.count("\n")) == (0, "", 1) and out.strip()


def test_lines_from_standard_input_are_those_translated_one_by_one(run, folder):
    lines = ["hello world", "", "猫坐在", "the mat"]
    status, out, _ = run("translate", "-", "--model", folder, *SHORT, stdin="\r\n".join(lines).encode())
    alone = [run("translate", line, "--model", folder, *SHORT)[1] if line else "\n" for line in lines]
    assert status == 0 and out == "".join(alone)


def test_translate_json_with_experts(run, folder):
    _, out, _ = run("translate", "hello 猫", "--to", "zh", "--model", folder, *SHORT, "--json", "--experts")
    result = json.loads(out)
    assert (result["source"], result["to"], result["finish_reason"], result["new_tokens"]) == (
        "hello 猫",
        "zh",
        "length",
        6,
    )
    tokens = result["experts"]
    assert [token["part"] for token in tokens].count("answer") == 5, "the last token was sampled and never read"
    assert len(tokens) == result["prompt_tokens"] + 5
    layer = tokens[3]["layers"][0]
    assert len(layer["selected"]) == 3 and len(layer["groups"]) == 2
    assert set(layer["selected"][0]) == {"expert", "weight", "affinity", "biased", "promoted_by_bias"}
    assert sum(expert["promoted_by_bias"] for expert in layer["selected"]) == len(layer["demoted_by_bias"])


def test_experts_come_after_the_translation_and_plain(run, folder):
    plain = run("translate", "hello", "--model", folder, *SHORT)[1]
    status, out, _ = run("translate", "hello", "--model", folder, *SHORT, "--experts")
    assert status == 0 and out.startswith(plain + "\n") and "layers.1" in out and "\x1b" not in out
    detail = run("translate", "hello", "--model", folder, *SHORT, "--experts-detail")[1]
    assert "affinity" in detail and "missed by" in detail


def test_generate_streams_the_continuation_and_stops_at_a_stop_string(run, folder):
    sampled = ["--temperature", "1", "--seed", "4", "--max-new-tokens", "20"]
    status, out, _ = run("generate", folder, "the cat", *sampled)
    assert status == 0 and out == run("generate", folder, "-", *sampled, stdin=b"the cat\n")[1]
    result = json.loads(run("generate", folder, "the cat", *sampled, "--json")[1])
    assert result["text"] + "\n" == out and result["new_tokens"] == 20
    stop = out.strip()[3:5]
    cut = json.loads(run("generate", folder, "the cat", *sampled, "--stop", stop, "--json")[1])
    assert cut["text"] == out[: out.find(stop)] and cut["finish_reason"] == "stop"
    assert "layers.1" in run("generate", folder, "the cat", "--experts", *SHORT)[1]


def test_greedy_text_is_the_same_with_speculation(run):
    text = "He drank a cup of tea."
    for verb in (["translate", text, "--beams", "1"], ["generate", "nano", text, *SHORT]):
        assert run(*verb, "--speculate")[:2] == run(*verb)[:2]


def test_translations_are_searched_as_asked_for(run, folder, tmp_path):
    plain = run("translate", "the cat", "--model", folder, *SHORT)[1]
    assert run("translate", "the cat", "--model", folder, *SHORT, "--beams", "1")[:2] == (0, plain)
    params = BeamSearchParams(4, 0.0)
    [translation] = Translator(open_text_model(folder), max_new_tokens=6, beam_search=params).translate(["the cat"])
    searched = ["translate", "the cat", "--model", folder, *SHORT, "--beams", "4", "--length-penalty", "0"]
    assert run(*searched)[:2] == (0, translation.text + "\n") and translation.text != plain.strip()
    result = json.loads(run(*searched, "--json", "--experts")[1])
    assert result["translation"] == translation.text and result["new_tokens"] == len(translation.answer.ids)
    tokens = len(result["experts"]) - result["prompt_tokens"]
    assert tokens == result["new_tokens"] - (result["finish_reason"] == "length")


def test_a_folder_s_beams_are_the_default_and_give_way(run, folder, tmp_path):
    own = tmp_path / "model"
    shutil.copytree(folder, own)
    arguments = ["translate", "the cat", "--model", str(own), *SHORT]
    greedy = run(*arguments)[1]
    (own / "generation_config.json").write_text('{"num_beams": 4, "length_penalty": 0.0}')
    searched = run(*arguments, "--beams", "4", "--length-penalty", "0")[1]
    assert run(*arguments)[1] == searched != greedy
    assert run(*arguments, "--beams", "1")[1] == run(*arguments, "--speculate")[1] == greedy
    sampled = ["--temperature", "1", "--seed", "3"]
    assert run(*arguments, *sampled)[:2] == run("translate", "the cat", "--model", folder, *SHORT, *sampled)[:2]
    before = run("generate", folder, "the cat", *SHORT)[1]
    assert run("generate", str(own), "the cat", *SHORT)[1] == before, "the file's beams are those of translate"
    (own / "generation_config.json").write_text('{"num_beams": null, "length_penalty": null, "early_stopping": null}')
    assert run(*arguments)[1] == greedy
    for text, words in (
        ('{"num_beams": 0}', "num_beams is 0"),
        ('{"num_beams": 3, "length_penalty": "x"}', "length_penalty is 'x'"),
        ('{"num_beams": 2, "early_stopping": 3}', "early_stopping is 3"),
    ):
        (own / "generation_config.json").write_text(text)
        assert_rejected(run(*arguments), "generation_config.json", words)
        assert run("generate", str(own), "the cat", *SHORT)[1] == before
        assert run(*arguments, "--beams", "1")[1] == greedy


def test_searches_that_cannot_be_are_rejected(run, folder):
    arguments = ["translate", "the cat", "--model", folder, *SHORT]
    for number in ("0", "-1", "x"):
        status, out, err = run(*arguments, "--beams", number)
        assert status == 2 and out == "" and "'--beams'" in err
    assert_rejected(run(*arguments, "--beams", "1000000"), "beam_width is 1000000", "at most 165")
    assert_rejected(run(*arguments, "--beams", "2", "--length-penalty", "nan"), "length_penalty is nan")
    assert_rejected(run(*arguments, "--length-penalty", "0.6"), "length_penalty is for several beams")
    assert_rejected(run(*arguments, "--beams", "1", "--length-penalty", "0.6"), "length_penalty is for several beams")
    evaluation = ["eval", folder, "--pairs", "pairs.tsv", "--length-penalty", "0.6"]
    assert_rejected(run(*evaluation), "--length-penalty", "--beams above 1")
    assert_rejected(run(*arguments, "--beams", "2", "--temperature", "1"), "a beam search takes no temperature")
    assert_rejected(run(*arguments, "--beams", "2", "--speculate"), "--speculate", "--beams 1")


def test_generate_takes_penalties_bias_and_filters(run, folder):
    def generate(*options: str) -> dict:
        return json.loads(run("generate", folder, "the cat", *SHORT, "--json", "--logprobs", "2", *options)[1])

    plain = generate()
    tokens = [one["token"] for one in plain["logprobs"]]
    assert len(tokens) == plain["new_tokens"] == 6
    assert all(one["top"][0]["token"] == one["token"] and len(one["top"]) == 2 for one in plain["logprobs"])
    assert all(one["top"][0]["logprob"] >= one["top"][1]["logprob"] for one in plain["logprobs"])
    second = plain["logprobs"][0]["top"][1]["token"]
    biased = generate("--logit-bias", f"{tokens[0]}=-100", "--logit-bias", f"{second}=100")
    assert {one["token"] for one in biased["logprobs"]} == {second}
    assert biased["logprobs"][0]["top"] == plain["logprobs"][0]["top"], "log-probabilities are the model's own"
    penalised = generate("--frequency-penalty", "2", "--presence-penalty", "2", "--repetition-penalty", "9")
    assert len({one["token"] for one in penalised["logprobs"]}) == 6
    assert generate("--temperature", "9", "--min-p", "1")["logprobs"] == plain["logprobs"]


def test_generate_shows_log_probabilities_after_the_text(run, folder):
    plain = run("generate", folder, "the cat", *SHORT)[1]
    status, out, _ = run("generate", folder, "the cat", *SHORT, "--logprobs", "1")
    assert status == 0 and out.startswith(plain + "\n")
    rows = out[len(plain) + 1 :].splitlines()
    assert len(rows) == 6 and all(row.split()[0].isdigit() and float(row.split()[1]) <= 0 for row in rows)


def test_generate_keeps_to_a_schema_or_an_expression(run, folder, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"名": {"enum": ["猫", 7]}}, "required": ["名"]}', encoding="utf-8"
    )
    sampled = ["--temperature", "1", "--seed", "2", "--max-new-tokens", "80", "--json"]
    result = json.loads(run("generate", folder, "the cat", "--regex", "(cat|猫)-[0-9]{3}", *sampled)[1])
    assert re.fullmatch("(cat|猫)-[0-9]{3}", result["text"]) and result["finish_reason"] == "stop"
    bias = ["--logit-bias", f"{tiny_token(folder, '}')}=100"]
    result = json.loads(run("generate", folder, "the cat", "--json-schema", str(schema), *bias, *sampled)[1])
    assert json.loads(result["text"])["名"] in ("猫", 7) and result["finish_reason"] == "stop"
    assert_rejected(run("generate", folder, "x", "--regex", "(", *SHORT), "unclosed group")
    assert_rejected(run("generate", folder, "x", "--regex", "a", "--json-schema", str(schema)), "one of them")
    assert_rejected(run("generate", folder, "x", "--json-schema", str(tmp_path / "none.json")), "none.json")
    schema.write_text('{"not": {}}', encoding="utf-8")
    assert_rejected(run("generate", folder, "x", "--json-schema", str(schema)), "'not' at /not")
    schema.write_bytes(b"\xff")
    assert_rejected(run("generate", folder, "x", "--json-schema", str(schema)), "UTF-8")
    schema.write_bytes(b" " * 300_000)
    assert_rejected(run("generate", folder, "x", "--json-schema", str(schema)), "262,144")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-p", "2"], "min_p is 2.0"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--seed", "9223372036854775808"], "seed is 9223372036854775808"),
        (["--presence-penalty", "3"], "presence_penalty is 3.0"),
        (["--frequency-penalty", "nan"], "frequency_penalty is nan"),
        (["--logit-bias", "cat=3"], "TOKEN=NUMBER"),
        (["--logit-bias", "5"], "TOKEN=NUMBER"),
        (["--logit-bias", "5=200"], "-100 to 100"),
        (["--logit-bias", "5=1", "--logit-bias", "5=2"], "twice"),
        (["--logit-bias", "999999=1"], "vocabulary ends"),
    ],
)
def test_bad_sampling_values_get_a_sentence(run, folder, options, message):
    assert_rejected(run("generate", folder, "the cat", *options), message)


def test_bad_text_gets_a_sentence(run, folder):
    model = ["--model", folder]
    assert_rejected(run("translate", "", *model), "empty")
    assert_rejected(run("translate", " \n ", *model), "empty")
    assert_rejected(run("translate", "\udcff", *model), "UTF-8")
    assert_rejected(run("translate", "mat " * 200, *model), "line 1", "96 positions")
    assert_rejected(run("translate", "-", *model, stdin=b"a" * 10_000_000), "line 1", "65,536")
    assert_rejected(run("translate", "-", *model, *SHORT, stdin=b"\xff"), "line 1", "UTF-8")
    assert_rejected(run("translate", "x", "--to", "fr"), "'fr'", "en or zh")
    assert_rejected(run("translate", "x", *model, "--top-p", "0"), "top_p")
    assert_rejected(run("translate", "x", "--model", "/no/such/place"), "/no/such/place")
    assert_rejected(run("generate", folder, "-", stdin=b"\n"), "empty")
    assert_rejected(run("generate", "/no/such/place", "x"), "/no/such/place")


def test_lines_before_a_bad_one_are_translated(run, folder):
    status, out, err = run("translate", "-", "--model", folder, *SHORT, stdin=b"the cat\n\xff\n")
    assert status == 1 and out == run("translate", "the cat", "--model", folder, *SHORT)[1]
    assert "line 2 of standard input is not valid UTF-8" in err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("texts") / "held.tsv"
    words = ["cat", "mat", "hello", "world", "the"]
    rows = [f"web\t{'猫坐在垫子上'[: 1 + i % 6]}\t{words[i % 5]} {words[i % 3]}\n" for i in range(14)]
    path.write_text("".join(rows), encoding="utf-8")
    return str(path)


def test_routing_as_table_json_and_picture(run, folder, corpus, tmp_path):
    png = tmp_path / "heat.png"
    status, out, _ = run("routing", corpus, "--model", folder, "--permutations", "200", "--png", str(png))
    assert status == 0 and "14 Chinese" in out and "14 English" in out and "max violation" in out
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    result = json.loads(run("routing", corpus, "--model", folder, "--permutations", "200", "--json")[1])
    assert len(result["loads"]) == 2 and len(result["loads"][0]["share"]) == 16 and len(result["preferences"]) == 32
    assert {"p", "prefers", "chinese", "english", "log2_ratio"} <= set(result["preferences"][0])
    few = run("routing", corpus, "--model", folder, "--limit", "8")[1]
    assert "too few texts" in few


def test_eval_as_table_and_json(run, folder, corpus):
    arguments = ["eval", folder, "--pairs", corpus, "--text", corpus, "--limit", "4"]
    status, out, _ = run(*arguments)
    assert status == 0 and "chrF" in out and "MTP acceptance" in out and "bits per byte" in out
    result = json.loads(run(*arguments, "--json")[1])
    assert result["directions"]["en-zh"]["overall"]["count"] == 4
    assert set(result["directions"]["zh-en"]["by_source"]) == {"web"}
    assert result["on_text"]["bits_per_byte"]["all"] > 0 and 0 <= result["on_pairs"]["mtp_acceptance"] <= 1


def test_bad_files_get_a_sentence(run, folder, tmp_path):
    path = tmp_path / "bad.tsv"
    path.write_text("only one column\n")
    assert_rejected(run("routing", str(path), "--model", folder), "line 1", "three")
    assert_rejected(run("eval", folder, "--pairs", str(path)), "line 1", "not a pair")
    path.write_text("\n")
    assert_rejected(run("eval", folder, "--text", str(tmp_path / "none.txt")), "none.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    assert_rejected(run("routing", str(tmp_path / "empty.txt"), "--model", folder), "no text")
    assert_rejected(run("eval", folder), "--pairs FILE")
