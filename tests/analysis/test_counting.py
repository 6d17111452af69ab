"""soli.count: the numbers of `soli count` as an object."""

import json

import pytest

import soli
from soli.cli import main
from soli.errors import SoliError


def test_it_has_the_numbers_of_the_command(capsys):
    assert main(["count", "deepseek-v3", "--mtp", "--context", "1000", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    counted = soli.count("deepseek-v3", mtp=True, context=1000)
    assert (counted.total, counted.activated) == (report["total"], report["activated"])
    assert counted.flops.decode == report["flops_per_token"]["decode"]
    assert counted.cache_bytes_per_token == report["cache_bytes_per_token"]
    assert [vars(one) for one in counted.components] == report["components"]


def test_presets_folders_and_configurations_count_alike(tmp_path):
    config = soli.preset("nano")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert soli.count("nano") == soli.count(tmp_path) == soli.count(str(tmp_path)) == soli.count(config)


def test_a_what_if():
    counted = soli.count("deepseek-v3", {"n_routed_experts": 10, "num_experts_per_tok": 2})
    assert counted.config.n_routed_experts == 10 and "without groups" in counted.note


def test_its_repr_is_its_headline():
    assert repr(soli.count("deepseek-v3")).startswith("<671.0 B parameters, 37.6 B activated for each token: 5.6 %; ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deepseek-v4",), "there is no preset and no folder 'deepseek-v4'; did you mean deepseek-v"),
        ((None,), "model is None"),
        (("nano", {"n_routed_expert": 3}), "did you mean n_routed_experts"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(SoliError, match=message):
        soli.count(*arguments)


@pytest.mark.parametrize("context", [0, "many", 2**63, True])
def test_a_bad_context(context):
    with pytest.raises(SoliError, match="context is"):
        soli.count("nano", context=context)
