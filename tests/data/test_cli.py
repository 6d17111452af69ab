"""`soli data`: a build from synthetic sources, its tables and JSON, and errors without a traceback."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from soli.cli.data import app
from soli.errors import SoliError
from soli.recipes.nano_corpus import build, corpus
from soli.recipes.nano_corpus.sources import Source, SourceRow

RECIPE = "[data]\ncorpus = 'nano_corpus'\nvocab_size = 400\nheldout_every = 10\n[data.weights]\ngames = 2.0\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    rows = [SourceRow(f"第{i}只猫坐在垫子上", f"Cat number {i} sits on the mat.") for i in range(100)]
    lines = [SourceRow("", f"The manual has a line {i}.") for i in range(50)]
    sources = (
        Source("games", "pairs", (), lambda archives: iter(rows), "none"),
        Source("manual", "en", (), lambda archives: iter(lines), "none"),
    )

    def synthetic(config, cache, report, allow_missing, extra):
        return corpus.build_corpus(config, cache, report, allow_missing, sources, extra)

    monkeypatch.setattr(build, "build_corpus", synthetic)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def test_build_and_inspect(recipe):
    out = recipe / "out"
    built = CliRunner().invoke(app, ["build", str(recipe), "--out", str(out)])
    assert built.exit_code == 0, built.output
    assert "games" in built.stdout and "manual (en)" in built.stdout and "training tokens" in built.stdout
    files = {"pairs.tsv", "mono.tsv", "heldout.tsv", "heldout_mono.tsv", "counts.json", "tokenizer.json", "meta.json"}
    assert files | {"train.bin", "valid.bin"} <= {path.name for path in out.iterdir()}
    shown = CliRunner().invoke(app, ["inspect", str(out)])
    assert shown.exit_code == 0 and "characters per token" in shown.stdout and "<|en|>Cat number" in shown.stdout
    inspection = json.loads(CliRunner().invoke(app, ["inspect", str(out), "--json", "--samples", "2"]).stdout)
    assert inspection["train_tokens"] > 0 and len(inspection["samples"]) == 2


def test_build_as_json_and_the_same_twice(recipe):
    runs = [
        CliRunner().invoke(app, ["build", str(recipe), "--out", str(recipe / name), "--json"])
        for name in ("one", "two")
    ]
    assert json.loads(runs[0].stdout)["meta"] == json.loads(runs[1].stdout)["meta"]
    assert (recipe / "one" / "train.bin").read_bytes() == (recipe / "two" / "train.bin").read_bytes()


def test_a_rejected_build_leaves_the_old_one_intact(recipe):
    out = recipe / "out"
    assert CliRunner().invoke(app, ["build", str(recipe), "--out", str(out)]).exit_code == 0
    result = CliRunner().invoke(app, ["build", str(recipe), "--out", str(out), "--set", "data.weights.nope=1"])
    assert isinstance(result.exception, SoliError)
    assert (out / "meta.json").is_file()


def test_an_unwritable_output_is_named(recipe):
    (recipe / "file").write_text("")
    result = CliRunner().invoke(app, ["build", str(recipe), "--out", str(recipe / "file")])
    assert isinstance(result.exception, SoliError) and "choose another --out" in str(result.exception)


def test_a_recipe_for_your_own_texts_is_not_built(tmp_path):
    result = CliRunner().invoke(app, ["build", "671b", "--out", str(tmp_path / "out")])
    assert "names no corpus to build: pack texts of your own with `soli data pack`" in str(result.exception)
    result = CliRunner().invoke(app, ["build", "nano-zh-en", "--set", "data.corpus=nano_corpse"])
    assert str(result.exception).endswith("which is no corpus step; did you mean nano_corpus?")
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "soli", "data", "inspect", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1
    assert (
        process.stderr.startswith("soli: ")
        and "soli data build" in process.stderr
        and "Traceback" not in process.stderr
    )
