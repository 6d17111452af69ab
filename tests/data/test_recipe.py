"""Recipes are found by path and by name, overridden field by field, and rejected in a sentence."""

import pytest

from soli.data.recipe import data_folder, find_recipe, load_recipe
from soli.errors import SoliError
from soli.recipes import corpus_builder, read_data_config


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes" / "mine"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text('[data]\nseed = 3\n[data.weights]\ncc-cedict = 0.3\n[run]\nname = "x"\n')
    return folder


def test_a_recipe_is_found_by_file_folder_and_name(recipe):
    for name in (recipe / "recipe.toml", recipe, "mine", "recipes/mine"):
        assert find_recipe(name).resolve() == recipe / "recipe.toml"


def test_the_recipe_in_the_package_is_found_from_anywhere_and_is_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_data_config(load_recipe("nano-zh-en"))
    assert config.vocab_size == 6144 and set(config.heldout_books) == {"ruth", "jon", "phil", "james"}
    assert str(data_folder(load_recipe("nano-zh-en"))) == "data/nano-zh-en"


def test_an_unknown_name_lists_the_known_ones(recipe):
    with pytest.raises(SoliError, match=r"no recipe nope: .*mine"):
        find_recipe("nope")


def test_overrides_are_toml_values_or_plain_text(recipe):
    overrides = ["data.seed=7", "data.weights.cc-cedict=0.5", "run.name=other", "run.rate = 1e-3", "run.on=true"]
    assert load_recipe("mine", overrides) == {
        "data": {"seed": 7, "weights": {"cc-cedict": 0.5}},
        "run": {"name": "other", "rate": 0.001, "on": True},
    }


def test_none_and_null_unset_a_value(recipe):
    for word in ("none", "null"):
        assert load_recipe("mine", ["run.first=1", f"run.name={word}"])["run"] == {"first": 1}
        assert load_recipe("mine", [f"run.never={word}"]) == load_recipe("mine")


@pytest.mark.parametrize(
    ("override", "message"),
    [("seed=1", "not of the form"), ("data.seed", "not of the form"), ("model.x=1", r"no section \[model\]")],
)
def test_overrides_of_no_section_are_rejected(recipe, override, message):
    with pytest.raises(SoliError, match=message):
        load_recipe("mine", [override])


def test_broken_toml_names_the_file(recipe):
    (recipe / "recipe.toml").write_text("[data\n")
    with pytest.raises(SoliError, match=r"recipe.toml is not valid TOML"):
        load_recipe("mine")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"vocab_size": 100}, "data.vocab_size is 100; it must be a whole number from 272 to 65536"),
        ({"vocab_size": "big"}, "vocab_size is 'big'"),
        ({"seed": True}, "seed is True"),
        ({"fim_rate": 1.5}, "fim_rate is 1.5; it must be a number from 0 to 1"),
        ({"heldout_every": 1}, "of at least 2"),
        ({"weights": {"a": -1}}, "weights.a is -1"),
        ({"weights": 3}, "must be a table"),
        ({"caps": {"a": 0.5}}, "caps.a is 0.5"),
        ({"heldout_books": "ruth"}, "it must be a list, each item text"),
        ({"folder": 3}, "folder is 3; it must be text"),
        ({"vocab": 1}, "no field data.vocab; did you mean vocab_size"),
    ],
)
def test_bad_values_are_named_with_a_remedy(section, message):
    with pytest.raises(SoliError, match=message):
        read_data_config({"data": {"corpus": "nano_corpus", **section}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (3, "write a table"),
        ({"seed": True}, "data.seed is True"),
        ({"vocab": 1}, "no field data.vocab"),
        ({"corpus": "nano_corpse"}, "data.corpus is 'nano_corpse', which is no corpus step; did you mean nano_corpus"),
        ({"corpus": "os.path"}, "which is no corpus step; choose one of nano_corpus"),
    ],
)
def test_a_data_section_without_a_known_corpus_is_checked_too(section, message):
    with pytest.raises(SoliError, match=message):
        read_data_config({"data": section})


def test_a_recipe_written_before_corpora_were_named_still_trains_but_cannot_be_built():
    recipe = {"data": {"folder": "x", "vocab_size": 400, "weights": {"games": 2.0}, "one_word_weight": 0.3}}
    config = read_data_config(recipe)
    assert (config.folder, config.corpus) == ("x", None) and data_folder(recipe).name == "x"
    with pytest.raises(SoliError, match="soli data pack"):
        corpus_builder(config)


@pytest.mark.parametrize("name", ["16b", "671b"])
def test_recipes_for_your_own_tokens_name_no_corpus(name):
    assert read_data_config(load_recipe(name)).corpus is None


@pytest.mark.parametrize("name", ["nano-zh-en", "nano-gpu", "one-gpu"])
def test_recipes_name_their_corpus_step(name):
    config = read_data_config(load_recipe(name))
    assert config.corpus == "nano_corpus" and corpus_builder(config).__module__ == "soli.recipes.nano_corpus.build"


def test_nano_reads_one_corpus_on_a_cpu_and_on_a_gpu():
    assert load_recipe("nano-gpu")["data"] == load_recipe("nano-zh-en")["data"]
    assert load_recipe("nano-gpu")["model"] == load_recipe("nano-zh-en")["model"]
