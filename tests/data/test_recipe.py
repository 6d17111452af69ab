"""Recipes are found by path and by name, overridden field by field, and refused in a sentence."""

import pytest

from soli.data.recipe import DataConfig, data_folder, find_recipe, load_recipe
from soli.errors import SoliError


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes" / "mine"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text('[data]\nseed = 3\n[data.weights]\ncc-cedict = 0.3\n[run]\nname = "x"\n')
    return folder


def test_found_by_file_folder_and_name(recipe):
    for name in (recipe / "recipe.toml", recipe, "mine", "recipes/mine"):
        assert find_recipe(name).resolve() == recipe / "recipe.toml"


def test_the_recipe_in_the_package_is_found_from_anywhere_and_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DataConfig.from_recipe(load_recipe("nano-zh-en"))
    assert config.vocab_size == 6144 and set(config.heldout_books) == {"ruth", "jon", "phil", "james"}
    assert str(data_folder(load_recipe("nano-zh-en"))) == "data/nano-zh-en"


def test_a_name_on_no_shelf_lists_what_there_is(recipe):
    with pytest.raises(SoliError, match=r"no recipe nope: .*mine"):
        find_recipe("nope")


def test_overrides_are_toml_values_or_plain_text(recipe):
    overrides = ["data.seed=7", "data.weights.cc-cedict=0.5", "run.name=other", "run.rate = 1e-3", "run.on=true"]
    assert load_recipe("mine", overrides) == {
        "data": {"seed": 7, "weights": {"cc-cedict": 0.5}},
        "run": {"name": "other", "rate": 0.001, "on": True},
    }


def test_none_takes_a_value_out(recipe):
    whole = load_recipe("mine", ["run.first=1", "run.second=2"])["run"]
    assert load_recipe("mine", ["run.first=1", "run.second=2", "run.first=none"])["run"] == {
        name: value for name, value in whole.items() if name != "first"
    }
    assert load_recipe("mine", ["run.never=none"]) == load_recipe("mine")


@pytest.mark.parametrize(
    ("override", "message"),
    [("seed=1", "not of the form"), ("data.seed", "not of the form"), ("model.x=1", r"no section \[model\]")],
)
def test_overrides_that_lead_nowhere(recipe, override, message):
    with pytest.raises(SoliError, match=message):
        load_recipe("mine", [override])


def test_broken_toml_names_the_file(recipe):
    (recipe / "recipe.toml").write_text("[data\n")
    with pytest.raises(SoliError, match=r"recipe.toml is not valid TOML"):
        load_recipe("mine")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"vocab_size": 100}, "vocab_size is 100: write a whole number from 272 to 65536"),
        ({"vocab_size": "big"}, "vocab_size is 'big'"),
        ({"seed": True}, "seed is True"),
        ({"fim_rate": 1.5}, "fim_rate is 1.5: write a number from 0 to 1"),
        ({"heldout_every": 1}, "of at least 2"),
        ({"weights": {"a": -1}}, "weights.a is -1"),
        ({"weights": 3}, "write a table"),
        ({"caps": {"a": 0.5}}, "caps.a is 0.5"),
        ({"heldout_books": "ruth"}, "list of short names"),
        ({"folder": 3}, "write a path"),
        ({"vocab": 1}, "unknown field vocab"),
        (3, "write a table"),
    ],
)
def test_impossible_values_are_named_with_the_mend(section, message):
    with pytest.raises(SoliError, match=message):
        DataConfig.from_recipe({"data": section})


def test_nano_reads_one_corpus_on_a_cpu_and_on_a_gpu():
    assert load_recipe("nano-gpu")["data"] == load_recipe("nano-zh-en")["data"]
    assert load_recipe("nano-gpu")["model"] == load_recipe("nano-zh-en")["model"]
