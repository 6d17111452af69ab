"""Recipes: TOML files with every number of a corpus and a training run, and `--set` overrides of single fields.

A recipe is named by the path of its folder or file, or by a bare name looked up in ./recipes and then in the package.
Rejects an unknown name, TOML that does not parse, and an override without a section.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from soli.errors import SoliError
from soli.input_files import is_nested_too_deeply, read_text
from soli.sections import (
    TOML_DOTS,
    Bounds,
    NonNegativeInt,
    Section,
    Share,
    annotations_of,
    parse_assignments,
    reject_unknown,
)

RECIPE_FOLDERS = (Path("recipes"), Path(__file__).resolve().parents[1] / "recipes")

RECIPE_BYTES = 2**20

# Corpus fields of recipes written before they named their corpus step: a run that has them still resumes.
UNNAMED_CORPUS_FIELDS = (
    "vocab_size", "heldout_books", "most_renderings", "one_word_weight", "tokenizer_characters", "weights", "caps",
)  # fmt: skip

OPTIONAL_SECTIONS = ("parallel",)  # that a recipe may leave out and --set may still change


def find_recipe(name: str | Path) -> Path:
    """The TOML file that `name` means: a file, a folder with recipe.toml, or a bare name in RECIPE_FOLDERS."""
    for candidate in (Path(name), *(folder / name for folder in RECIPE_FOLDERS)):
        if candidate.is_dir() and (candidate / "recipe.toml").is_file():
            return candidate / "recipe.toml"
        if candidate.exists() and not candidate.is_dir():  # a FIFO or a device is rejected when it is read
            return candidate
    known = sorted({file.parent.name for folder in RECIPE_FOLDERS for file in folder.glob("*/recipe.toml")})
    raise SoliError(
        f"no recipe {name}: give a folder with recipe.toml, a TOML file, or one of: {', '.join(known) or 'none'}"
    )


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe as a dictionary of sections, with `section.field=value` overrides applied."""
    path = find_recipe(name)
    try:
        recipe = tomllib.loads(_toml_text(path))
    except ValueError as error:  # no TOML, or an integer of thousands of digits
        raise SoliError(f"{path} is not valid TOML ({error}): correct it") from error
    except RecursionError:
        raise SoliError(f"{path} is not valid TOML (nested too deeply): correct it") from None
    if is_nested_too_deeply(recipe):
        raise SoliError(f"{path} is nested too deeply: correct it")
    for place, value in parse_assignments(overrides).items():
        _override(recipe, place, value, path)
    return recipe


def _part(table: Any, name: str) -> Any:
    """A section of a table; of a list of sections the one of that number."""
    if isinstance(table, list):
        return table[int(name)] if name.isascii() and name.isdecimal() and int(name) < len(table) else None
    return table.get(name)


def _toml_text(path: Path) -> str:
    """The text of a TOML file, without what tomllib takes quadratic time for: keys of thousands of parts."""
    text = read_text(path, RECIPE_BYTES)
    if any(line.count(".") > TOML_DOTS for line in text.splitlines()):
        raise SoliError(f"{path} has a line with more than {TOML_DOTS} dots: write it as several")
    return text


def _override(recipe: dict[str, Any], place: str, value: Any, path: Path) -> None:
    """Set one field. None removes it, so that its default holds, except in [model], where null is a value."""
    *sections, name = place.split(".")
    if not sections or not name:
        raise SoliError(f"--set {place} is not of the form SECTION.FIELD=VALUE, as in --set run.seed=2")
    table: Any = recipe
    if sections[0] in OPTIONAL_SECTIONS:
        recipe.setdefault(sections[0], {})
    for section in sections:
        part = _part(table, section)
        if not isinstance(part, dict | list):
            raise SoliError(f"--set {place}: {path} has no section [{'.'.join(sections)}]; use one that it has")
        table = part
    if not isinstance(table, dict):
        raise SoliError(f"--set {place}: {path} has several [[{'.'.join(sections)}]]; say which, as in {sections[0]}.0")
    if value is None and sections != ["model"]:
        table.pop(name, None)
    else:
        table[name] = value


def data_folder(recipe: dict[str, Any]) -> Path:
    """Where the recipe's packed tokens are: its `data.folder`, below the current folder unless absolute."""
    return Path(DataConfig.from_recipe(recipe).folder)


@dataclass(frozen=True)
class DataConfig(Section, section="data"):
    """What every recipe's [data] section may hold; the corpus step that it names may have more fields."""

    folder: str = "data/corpus"  # where the data step writes and training reads
    corpus: str | None = None  # the step of soli.recipes that builds it; None: packed from your own files
    seed: NonNegativeInt = 1
    heldout_every: Annotated[int, Bounds(at_least=2)] = 200  # one text in so many is held out, by a hash of it
    fim_rate: Share = 0.0  # share of plain documents rearranged as prefix, suffix, middle
    longest_document: Annotated[int, Bounds(at_least=50)] = 2000  # characters; longer texts are cut

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> "DataConfig":
        """These fields of a loaded recipe's [data] section; the ones of its corpus step are for that step to check."""
        table = recipe.get("data", {})
        if isinstance(table, dict):
            own = annotations_of(DataConfig)
            if table.get("corpus") is None:
                reject_unknown(cls.section, table, [*own, *UNNAMED_CORPUS_FIELDS])
            table = {name: value for name, value in table.items() if name in own}
        return DataConfig.from_dict(table)
