"""Errors of a run on several ranks: one sentence, and connections that are closed before a process ends."""

import re

import pytest
import torch
import torch.distributed as dist

from soli.cli import main
from soli.errors import SoliError
from soli.parallel.ranks import join_ranks, joined, launched_ranks
from tests.distributed.ranks import run_ranks
from tests.distributed.test_kill import recipe_file, start

NOISE = re.compile(r"Traceback|terminate called|SIGABRT|\[rank|Error:", re.IGNORECASE)


def fail_alone(failing: int) -> tuple[str, bool]:
    """What a rank says when one of them has an error, and whether it is still connected then."""
    ranks = launched_ranks()
    with pytest.raises(SoliError) as stop, joined(ranks):
        join_ranks(ranks, torch.device("cpu"))
        if ranks.rank == failing:
            raise SoliError("its own error")
        dist.all_reduce(torch.zeros(1))
    return str(stop.value), dist.is_initialized()


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_connections_are_closed_at_an_error(tmp_path, failing):
    by_rank = run_ranks(fail_alone, 2, tmp_path, failing)
    assert by_rank[failing] == ("its own error", False)
    sentence, is_connected = by_rank[1 - failing]
    assert sentence.startswith("the connection to another rank was lost") and not is_connected


def errors_of(*arguments: object) -> tuple[int, list[str], str]:
    """Exit status, Soli's sentences and all that was printed as errors."""
    agent = start(*arguments)
    _, error = agent.communicate(timeout=120)
    return agent.returncode, [line for line in error.splitlines() if line.startswith("soli: ")], error


def test_an_error_of_all_ranks_is_one_sentence(tmp_path, data):
    """Found in the data, when the ranks are connected."""
    command = ["-m", "soli", "train", recipe_file(tmp_path, data, 4), "--processes", "2", "--out", tmp_path / "run"]
    status, sentences, error = errors_of(*command, "--set", "schedule.sequence_length=100000", "--set",
                                         "model.max_position_embeddings=100000")  # fmt: skip
    assert status == 1 and len(sentences) == 1, error
    assert sentences[0].startswith("soli: rank 0: ") and "too few for windows of 100002" in sentences[0]
    assert not NOISE.search(error), error


@pytest.mark.slow
def test_an_anomaly_ends_all_ranks_with_one_sentence(tmp_path, data):
    command = ["-m", "soli", "train", recipe_file(tmp_path, data, 50), "--processes", "2", "--out", tmp_path / "run"]
    status, sentences, error = errors_of(*command, "--set", "schedule.learning_rate=1e30")
    assert status == 1 and len(sentences) == 1, error
    assert sentences[0].startswith("soli: rank 0: ") and "training stopped" in sentences[0]
    assert not NOISE.search(error), error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "changes", "words"),
    [
        ("3", [], r"\[parallel\] is for 2 processes \(data 2 x .*\), but there are 3; start it with soli train"),
        ("2", ["parallel.expert=3"], r"parallel\.expert is 3; it must divide the model's 8 routed experts"),
        ("2", ["parallel.data=-1"], r"parallel\.data is -1; it must be a whole number above 0"),
        ("2", ["parallel.schedule=2F2B"], r"parallel\.schedule is '2F2B'"),
    ],
)
def test_torchrun_with_other_sizes_is_refused_in_one_sentence(tmp_path, data, processes, changes, words):
    """Whatever torchrun prints about its processes, Soli says what is wrong once."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--standalone"]
    sets = [f"--set={change}" for change in changes]
    command = [*torchrun, "-m", "soli", "train", recipe_file(tmp_path, data, 4), "--out", tmp_path / "run", *sets]
    status, sentences, error = errors_of(*command)
    assert status != 0 and len(sentences) == 1, error
    assert re.search(words, sentences[0]) and "SIGABRT" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "3"], r"\[parallel\] is for 2 processes"),
        (["--processes", "2", "--set", "parallel.pipeline=2"], r"needs at least 2 micro-batches"),
        (["--processes", "2", "--set", "parallel.expert=2"], r"is for 4 processes .* but there are 2"),
        (["--processes", "2", "--set", "parallel.data=3"], r"batch_sequences is 8; the 3 processes"),
        (["--dry-run", "--devices", "2", "--device", "h80"], r"--device h80 is not known; did you mean h800"),
        (["--dry-run", "--device", "tpu"], r"--device tpu is not known"),
        (["--dry-run", "--devices", "2", "--set", "parallel.expert=3"], r"parallel\.expert is 3; it must divide"),
    ],
)
def test_sizes_that_do_not_fit_are_one_sentence(tmp_path, data, arguments, words, capsys):
    assert main(["train", str(recipe_file(tmp_path, data, 4)), "--out", str(tmp_path / "run"), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("soli: ") and error.count("\n") == 1 and re.search(words, error), error
    assert not (tmp_path / "run").exists()
