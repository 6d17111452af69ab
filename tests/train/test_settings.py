"""A recipe is rejected by section and field, before anything is built."""

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
        ("schedule", "batch_sequences_start", 4, "lacks schedule.batch_ramp_tokens"),
        ("schedule", "batch_ramp_tokens", 400, "lacks schedule.batch_sequences_start"),
        ("schedule", "warmup_steps", -1, "schedule.warmup_steps is -1"),
        ("schedule", "constant_until_tokens", 1000, "both constant_until_tokens and constant_tokens"),
        ("optimizer", "name", "sgd", "optimizer.name is 'sgd'; it must be one of adamw, muon"),
        ("optimizer", "beta2", 1.0, "optimizer.beta2 is 1.0"),
        ("balance", "gamma", None, "balance.gamma is None"),
        ("run", "precision", "fp7", "run.precision is 'fp7'"),
        ("run", "micro_sequences", 0, "run.micro_sequences is 0"),
        ("model", "hidden_sise", 3, "hidden_sise"),
    ],
)
def test_a_bad_field_is_named(section, key, value, words):
    with pytest.raises(SoliError) as rejection:
        read_settings(
            {
                **RECIPE,
                section: {**RECIPE.get(section, {}), key: value},
                **({"model": {"preset": "nano", key: value}} if section == "model" else {}),
            }
        )
    assert words in str(rejection.value)


def test_an_unknown_section_is_named():
    with pytest.raises(SoliError, match=r"\[scedule\]; did you mean schedule"):
        read_settings({**RECIPE, "scedule": {}})


def test_a_recipe_without_tokens_is_rejected():
    with pytest.raises(SoliError, match="no tokens to train on"):
        settings(schedule={"constant_tokens": 0})


def test_whole_floats_stand_for_ints():
    assert settings(schedule={"constant_tokens": 1e6}).schedule.constant_tokens == 1_000_000


def test_the_resolved_recipe_reads_back_as_itself():
    first = settings(schedule={"tails": [[100, 1e-5]]}, run={"max_minutes": 3})
    assert read_settings(json.loads(json.dumps(as_recipe(first, {"folder": "x"})))) == first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 2}, "set either steps or tokens"),
        ({"steps": 0, "tokens": None}, "extension.steps is 0"),
        ({"sequence_length": 256}, "extension.sequence_length is 256, but model.max_position_embeddings is 128"),
        ({"batch_sequence": 3}, "extension.batch_sequence; did you mean batch_sequences"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
    ],
)
def test_a_bad_extension_is_named(change, words):
    scaling = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64}
    phase = {"sequence_length": 128, "batch_sequences": 2, "learning_rate": 1e-4, "tokens": 300}
    phase["rope_scaling"] = scaling
    good = read_settings({**RECIPE, "extension": [phase]})
    assert good.extension[0].total_steps == 2
    assert read_settings(json.loads(json.dumps(as_recipe(good, {})))) == good
    with pytest.raises(SoliError) as rejection:
        read_settings({**RECIPE, "extension": [{**phase, **change}]})
    assert words in str(rejection.value)
