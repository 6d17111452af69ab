"""Recipes of training runs, one folder each, and the corpus steps that they name (`[data] corpus = "nano_corpus"`).

A corpus step is a package here with `config.py` (a DataConfig with its own fields, `CorpusConfig`) and `build.py`
(`build_data`). This module and the command line are the only ones that know the steps.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from soli.data.recipe import DataConfig
from soli.errors import SoliError
from soli.sections import suggest

CORPUS_STEPS = ("nano_corpus",)


def read_data_config(recipe: dict[str, Any]) -> DataConfig:
    """The [data] section of a loaded recipe, with the fields of the corpus step that it names, all checked."""
    shared = DataConfig.from_recipe(recipe)
    if shared.corpus is None:
        return shared
    config: DataConfig = _step_module(shared.corpus, "config").CorpusConfig.from_dict(recipe["data"])
    return config


def corpus_builder(config: DataConfig) -> Callable[..., dict[str, Any]]:
    """`build_data(config, out, cache, report, allow_missing, extra)` of the corpus step that `config` names."""
    if config.corpus is None:
        raise SoliError(
            "this recipe names no corpus to build: pack texts of your own with `soli data pack`, or set [data] corpus "
            f"to {' or '.join(CORPUS_STEPS)}"
        )
    builder: Callable[..., dict[str, Any]] = _step_module(config.corpus, "build").build_data
    return builder


def _step_module(corpus: str, module: str) -> ModuleType:
    if corpus not in CORPUS_STEPS:
        raise SoliError(f"data.corpus is {corpus!r}, which is no corpus step; {suggest(corpus, CORPUS_STEPS)}")
    return importlib.import_module(f"soli.recipes.{corpus}.{module}")
