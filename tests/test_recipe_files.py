"""Recipes are found by name, folder or file, in a checkout and in an installed package."""

import pytest

from soli import recipe_files
from soli.errors import SoliError
from soli.recipe_files import find_recipe


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "recipes" / "small-one"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text("")
    monkeypatch.setattr(recipe_files, "SHIPPED", (tmp_path / "nowhere", tmp_path / "recipes"))
    monkeypatch.chdir(tmp_path)
    return folder / "recipe.toml"


def test_found_by_name_folder_and_file(shipped):
    assert find_recipe("small-one") == shipped
    assert find_recipe(shipped.parent) == shipped
    assert find_recipe(shipped) == shipped


def test_a_local_folder_comes_before_a_shipped_name(shipped, tmp_path):
    (tmp_path / "small-one").mkdir()
    (tmp_path / "small-one" / "recipe.toml").write_text("")
    assert find_recipe("small-one").resolve() == tmp_path / "small-one" / "recipe.toml"


def test_an_unknown_name_is_answered_with_what_there_is(shipped):
    with pytest.raises(SoliError, match="did you mean small-one"):
        find_recipe("small-on")
    with pytest.raises(SoliError, match="small-one"):
        find_recipe("zzz/../zzz")


def test_the_repository_ships_the_recipe_of_the_model_in_the_box():
    assert find_recipe("nano-zh-en").parent.name == "nano-zh-en"
