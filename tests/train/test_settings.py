"""A recipe is refused by section and key, before anything is built."""

import json
import math

import pytest

from soli.errors import SoliError
from soli.train.settings import as_recipe, read_settings
from tests.train.toy import RECIPE, settings


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("schedule", "learning_rat", 1, "schedule.learning_rat; did you mean learning_rate"),
        ("schedule", "learning_rate", "fast", "schedule.learning_rate is 'fast'"),
        ("schedule", "learning_rate", -1, "schedule.learning_rate is -1"),
        ("schedule", "learning_rate", math.nan, "schedule.learning_rate is nan"),
        ("schedule", "batch_sequences", 2.5, "schedule.batch_sequences is 2.5; it must be a whole number"),
        ("schedule", "batch_sequences", True, "schedule.batch_sequences is True"),
        ("schedule", "sequence_length", 128, "max_position_embeddings is 64"),
        ("schedule", "tails", 3, "schedule.tails is 3"),
        ("schedule", "tails", [[1, 2, 3]], "schedule.tails"),
        ("optimizer", "name", "sgd", "optimizer.name is 'sgd'; it must be one of adamw, muon"),
        ("optimizer", "beta2", 1.0, "optimizer.beta2 is 1.0"),
        ("balance", "gamma", None, "balance.gamma is None"),
        ("run", "precision", "fp7", "run.precision is 'fp7'"),
        ("run", "micro_sequences", 0, "run.micro_sequences is 0"),
        ("model", "hidden_sise", 3, "hidden_sise"),
    ],
)
def test_a_bad_field_is_named(section, key, value, words):
    with pytest.raises(SoliError) as refusal:
        read_settings(
            {
                **RECIPE,
                section: {**RECIPE.get(section, {}), key: value},
                **({"model": {"preset": "nano", key: value}} if section == "model" else {}),
            }
        )
    assert words in str(refusal.value)


def test_an_unknown_section_is_named():
    with pytest.raises(SoliError, match=r"\[scedule\]; did you mean schedule"):
        read_settings({**RECIPE, "scedule": {}})


def test_a_recipe_without_tokens_is_refused():
    with pytest.raises(SoliError, match="no tokens to train on"):
        settings(schedule={"constant_tokens": 0})


def test_whole_floats_stand_for_ints():
    assert settings(schedule={"constant_tokens": 1e6}).schedule.constant_tokens == 1_000_000


def test_the_resolved_recipe_reads_back_as_itself():
    first = settings(schedule={"tails": [[100, 1e-5]]}, run={"max_minutes": 3})
    assert read_settings(json.loads(json.dumps(as_recipe(first, {"folder": "x"})))) == first
