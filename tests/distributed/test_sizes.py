"""[parallel] and what the environment says: every size that does not fit is refused by name, in one sentence."""

import pytest

from soli.cli import main
from soli.data.recipe import load_recipe
from soli.errors import SoliError
from soli.parallel.ranks import ALONE, Ranks, launched_ranks
from soli.train.settings import as_recipe, read_settings
from tests.train.toy import settings


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 0}, r"parallel\.data is 0; it must be a whole number above 0"),
        ({"expert": 1.5}, r"parallel\.expert is 1\.5"),
        ({"context": 2}, r"parallel\.context is 2; context parallelism is not built"),
        ({"expert": 3}, r"parallel\.expert is 3; it must divide the model's 8 routed experts"),
        ({"data": 3}, r"schedule\.batch_sequences is 8; the 3 processes .* must divide it"),
        ({"data": 2, "expert": 2, "replicate": 4}, r"schedule\.batch_sequences is 8; the 16 processes"),
        ({"tensor": 2}, r"there is no field parallel\.tensor"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(sizes, words):
    with pytest.raises(SoliError, match=words):
        settings(parallel=sizes)


def test_the_start_of_a_batch_ramp_and_extension_phases_must_be_divisible_too():
    ramp = {"batch_sequences_start": 6, "batch_ramp_tokens": 1024}
    with pytest.raises(SoliError, match=r"schedule\.batch_sequences_start is 6; the 4 processes"):
        settings(parallel={"data": 4}, schedule=ramp)
    phase = {"sequence_length": 32, "batch_sequences": 6, "steps": 1, "learning_rate": 1e-3}
    recipe = as_recipe(settings(parallel={"data": 4}), {}) | {"extension": [phase]}
    with pytest.raises(SoliError, match=r"batch_sequences is 6; the 4 processes"):
        read_settings(recipe)


def test_dense_models_have_no_experts_to_share():
    dense = {"n_routed_experts": 0, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1}
    with pytest.raises(SoliError, match=r"parallel\.expert is 2; it must divide the model's 0 routed experts"):
        settings(model=dense, parallel={"expert": 2})


@pytest.mark.parametrize("option", ["cuda_graph", "compile"])
def test_options_for_one_process_are_refused(option):
    with pytest.raises(SoliError, match=rf"run\.{option} is true, but .* for 2 processes"):
        settings(run={option: True}, parallel={"data": 2})


def test_recipes_without_the_section_are_for_one_process():
    assert settings().parallel.world == 1
    assert read_settings(as_recipe(settings(parallel={"data": 2, "expert": 4}), {})).parallel.world == 8


@pytest.mark.parametrize(
    ("world", "words"),
    [(1, "for 8 processes .data 2 x expert 4 x replicate 1., but there are 1; start it with soli train --processes 8"),
     (2, "parallel.data=2")],
)
def test_another_number_of_processes_is_refused(world, words):
    with pytest.raises(SoliError, match=words):
        settings(parallel={"data": 2, "expert": 4}).parallel.require_world(world)


def test_ranks_come_from_the_environment():
    assert launched_ranks({}) == ALONE
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert launched_ranks(environment) == Ranks(3, 4, 1, 2)
    for wrong in ({"RANK": "4"}, {"RANK": "-1"}, {"WORLD_SIZE": "four"}):
        with pytest.raises(SoliError, match="start several processes with torchrun, or unset these"):
            launched_ranks(environment | wrong)


def test_one_rank_is_all_there_is():
    assert ALONE.is_first and ALONE.any(2) == 2 and ALONE.of_first("x") == "x" and ALONE.all_objects(1) == [1]


def test_sizes_may_be_set_for_a_recipe_without_the_section():
    recipe = load_recipe("671b", ["parallel.data=4", "parallel.expert=8"])
    assert read_settings(recipe).parallel.world == 32


def test_processes_are_for_runs(capsys):
    assert main(["train", "nano-zh-en", "--dry-run", "--processes", "2"]) == 2
    assert "with --dry-run say --devices" in " ".join(capsys.readouterr().err.split())


def test_processes_must_be_those_of_the_recipe(capsys):
    recipe = ["train", "nano-zh-en", "--processes", "2"]
    assert main(recipe) == 1
    error = capsys.readouterr().err
    assert "[parallel] is for 1 processes" in error or "has no meta.json" in error


def test_a_run_says_how_tokens_travel(monkeypatch):
    from soli.parallel.dispatch import dispatch_note

    sentence = "4 ranks share the experts; tokens travel by torch.distributed's all-to-all"
    assert dispatch_note(4) == f"{sentence} (DeepEP is not used)"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert dispatch_note(4) == f"{sentence} (DeepEP is installed, but not used)"
