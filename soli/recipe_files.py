"""Where a recipe lies: a file, a folder, or the name of one that comes with Soli (`nano-zh-en`)."""

from __future__ import annotations

import difflib
from pathlib import Path

from soli.errors import SoliError

PACKAGE = Path(__file__).parent
SHIPPED = (PACKAGE / "recipes", PACKAGE.parent / "recipes")  # inside an installed package; beside it in a checkout


def find_recipe(name: str | Path) -> Path:
    """The `recipe.toml` that `name` means. SoliError names the recipes there are."""
    places = [Path(name), *(folder / name for folder in SHIPPED if Path(name).name == str(name))]
    for place in places:
        if place.is_file():
            return place
        if (place / "recipe.toml").is_file():
            return place / "recipe.toml"
    known = sorted({file.parent.name for folder in SHIPPED for file in folder.glob("*/recipe.toml")})
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"recipes that come with Soli: {', '.join(known) or 'none'}"
    raise SoliError(f"there is no recipe {str(name)!r}; {hint}")
