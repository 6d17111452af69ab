"""`--set` reads the same values for every verb: TOML, null and none, else plain text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.cli import main
from soli.config import preset
from soli.data.recipe import load_recipe
from soli.errors import SoliError
from soli.sections import parse_assignments
from soli.train.settings import read_settings


def test_values_are_toml_or_plain_text():
    values = parse_assignments(["a=1", "b=null", "c=None", "d=True", "e=x=y", "f=[1, 2]", "g=", "h=1e-3", "i=none"])
    assert values == {
        "a": 1, "b": None, "c": None, "d": True, "e": "x=y", "f": [1, 2], "g": "", "h": 0.001, "i": None,
    }  # fmt: skip
    more = parse_assignments(["a=1_000", 'b="none"', "c=2026-11-29", "d=1\nother=2", "e = true ", "f={x = 1}"])
    assert more == {"a": 1000, "b": "none", "c": "2026-11-29", "d": "1\nother=2", "e": True, "f": {"x": 1}}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [(["=1"], "FIELD=VALUE"), (["a"], "FIELD=VALUE"), (["a=1", "a=2"], "a twice"), ([""], "FIELD=VALUE")],
)
def test_malformed_assignments_are_rejected(assignments, message):
    with pytest.raises(SoliError, match=message):
        parse_assignments(assignments)


@given(st.text())
def test_any_value_is_read(text):
    assert list(parse_assignments([f"a={text}"])) == ["a"]


@pytest.mark.parametrize("word", ["null", "none"])
@pytest.mark.parametrize("field", ["q_lora_rank", "n_shared_experts"])
def test_count_and_train_unset_a_field_alike(capsys, word, field):
    assert main(["count", "nano", "--set", f"{field}={word}", "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    config = read_settings(load_recipe("nano-zh-en", [f"model.{field}={word}"])).model
    from soli.analysis.parameters import count

    assert count(config).total == total != count(preset("nano")).total
