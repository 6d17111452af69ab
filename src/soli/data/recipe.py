"""Recipes: TOML files with every number of a corpus and a training run, and `--set` overrides of single fields.

A recipe is named by the path of its folder or file, or by a bare name looked up in ./recipes and then in the package.
Refuses a name that leads nowhere, TOML that does not parse, and an override without a section.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from soli.errors import SoliError

_INCLUDED = Path(__file__).resolve().parents[1] / "recipes"


def find_recipe(name: str | Path) -> Path:
    """The TOML file that `name` means: a file, a folder with recipe.toml, or a bare name on one of the shelves."""
    given = Path(name)
    for candidate in (given, *(shelf / given for shelf in (Path("recipes"), _INCLUDED))):
        if candidate.is_dir() and (candidate / "recipe.toml").is_file():
            return candidate / "recipe.toml"
        if candidate.is_file():
            return candidate
    known = sorted(
        {found.parent.name for shelf in (Path("recipes"), _INCLUDED) for found in shelf.glob("*/recipe.toml")}
    )
    raise SoliError(
        f"no recipe {name}: give a folder with recipe.toml, a TOML file, or one of: {', '.join(known) or 'none'}"
    )


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe as a dictionary of sections, with `section.field=value` overrides applied in order."""
    path = find_recipe(name)
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SoliError(f"{path} is not valid TOML ({error}): correct it") from error
    except OSError as error:
        raise SoliError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    for override in overrides:
        _apply(recipe, override, path)
    return recipe


def _apply(recipe: dict[str, Any], override: str, path: Path) -> None:
    """Set one field; its value is read as TOML, and as a plain string where it is not TOML. `none` takes it out."""
    place, equals, written = override.partition("=")
    *sections, name = place.strip().split(".")
    if not equals or not sections or not name:
        raise SoliError(f"--set {override!r} is not of the form section.field=value, as in --set run.seed=2")
    target = recipe
    for section in sections:
        if not isinstance(target.get(section), dict):
            raise SoliError(f"--set {override!r}: {path} has no section [{'.'.join(sections)}]; use one that it has")
        target = target[section]
    if written.strip() in ("none", "null"):
        target.pop(name, None)  # so that its default, often None, holds
        return
    try:
        target[name] = tomllib.loads(f"value = {written.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        target[name] = written.strip()


def data_folder(recipe: dict[str, Any]) -> Path:
    """Where the recipe's corpus lies: its `data.folder`, below the current folder unless absolute."""
    return Path(DataConfig.from_recipe(recipe).folder)


@dataclass(frozen=True)
class DataConfig:
    """The [data] section: what goes into a corpus, how much of it, and what is kept aside. Checked at construction."""

    folder: str = "data/corpus"  # where the data step writes and training reads
    vocab_size: int = 6144
    seed: int = 1
    heldout_every: int = 200  # one pair (or line) in so many is held out, by a hash of its text
    heldout_books: tuple[str, ...] = ()  # short names of Bible books held out whole
    most_renderings: int = 3  # Chinese renderings kept of one English text
    one_word_weight: float = 1.0  # an upper bound on the weight of pairs whose English is one word
    fim_rate: float = 0.0  # share of plain documents rearranged as prefix, suffix, middle
    longest_document: int = 2000  # characters; longer paragraphs are cut at a sentence's end
    tokenizer_characters: int = 20_000_000  # how much text the vocabulary is learnt from
    weights: dict[str, float] = field(default_factory=dict)  # copies per epoch of a source's documents; 1 if unnamed
    caps: dict[str, int] = field(default_factory=dict)  # characters at most of a source of one language

    def __post_init__(self) -> None:
        for name, lowest, highest in _RANGES:
            _require_number(name, getattr(self, name), lowest, highest)
        for name, weight in _table("weights", self.weights).items():
            _require_number(f"weights.{name}", weight, 0.0, 100.0)
        for name, cap in _table("caps", self.caps).items():
            _require_number(f"caps.{name}", cap, 0, 1 << 60)

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> DataConfig:
        """The [data] section of a loaded recipe."""
        section = dict(_table("data", recipe.get("data", {})))
        known = {item.name for item in fields(cls)}
        for name in section:
            if name not in known:
                raise SoliError(f"[data] has an unknown field {name}: use one of {', '.join(sorted(known))}")
        if not isinstance(section.get("folder", ""), str):
            raise SoliError(f'[data] folder is {section["folder"]!r}: write a path, as in "data/corpus"')
        books = section.get("heldout_books", [])
        if not isinstance(books, list) or not all(isinstance(book, str) for book in books):
            raise SoliError(f'[data] heldout_books is {books}: write a list of short names, as in ["ruth", "jon"]')
        return cls(**{**section, "heldout_books": tuple(books)})


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("vocab_size", 272, 65536),  # tokens are 16 bits wide
    ("seed", 0, 1 << 60),
    ("heldout_every", 2, 1 << 60),
    ("most_renderings", 1, 1 << 60),
    ("one_word_weight", 0.0, 100.0),
    ("fim_rate", 0.0, 1.0),
    ("longest_document", 50, 1 << 60),
    ("tokenizer_characters", 1, 1 << 60),
)
"""Field, lowest and highest value; a float as the lowest value means that any number will do."""


def _require_number(name: str, value: object, lowest: float, highest: float) -> None:
    kinds = (int, float) if isinstance(lowest, float) else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not lowest <= value <= highest:  # type: ignore[operator]
        noun = "a number" if isinstance(lowest, float) else "a whole number"
        limit = f"from {lowest:g} to {highest:g}" if highest < 1 << 60 else f"of at least {lowest:g}"
        raise SoliError(f"[data] {name} is {value!r}: write {noun} {limit}")


def _table(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        section = name if name == "data" else f"data.{name}"
        raise SoliError(f"[{section}] is {value!r}: write a table")
    return value
