"""Trap 15: a checkpoint holds all experts, step, tokens, random state, biases, data position and phase of the schedule;
resuming is bit-identical on a CPU; another world size is refused.

Here the state itself; whole runs, stopped in every stage and between them, are in tests/train/test_stages.py.
"""

from dataclasses import asdict

import pytest
import torch

from soli.errors import SoliError
from soli.train.setup import prepare
from soli.train.trainer import take_step, train
from tests.train.test_stages import extended
from tests.train.toy import write_data


@pytest.mark.parametrize("steps", [2, 6])  # in pretraining, in the first extension phase
def test_everything_is_restored(tmp_path, steps):
    data = write_data(tmp_path / "data")
    settings = extended(run={"max_minutes": 1e-9})
    for _ in range(steps):  # each session ends after its first step
        run = prepare(settings, {}, data, tmp_path / "run")
        torch.manual_seed(run.progress.step + 99)
        assert train(run) == "time"
    random_state = torch.get_rng_state()
    resumed = prepare(settings, {}, data, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert asdict(resumed.progress) == asdict(run.progress)
    progress = resumed.progress
    assert (progress.step, progress.stage, progress.position) == ((2, 0, 16) if steps == 2 else (6, 1, 4))
    assert progress.tokens == (256 if steps == 2 else 768)
    assert len(progress.losses) == 2  # of the stage, for anomaly detection
    for one, other in (
        (run.model.state_dict(), resumed.model.state_dict()),
        (run.optimizer.state(), resumed.optimizer.state()),
    ):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    biases = [layer.gate.e_score_correction_bias for _, layer in resumed.model.moe_layers()]
    assert all(bias.any() for bias in biases)
    assert "layers.1.mlp.experts.down_proj" in resumed.model.state_dict()
    assert resumed.model.config == run.model.config
    first, second = take_step(run), take_step(resumed)
    assert (first.loss, first.norm, first.learning_rate) == (second.loss, second.norm, second.learning_rate)
    assert torch.equal(first.counts_LE, second.counts_LE)


def test_another_number_of_processes_than_the_recipe_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SoliError, match=r"\[parallel\] is for 1 processes .* but there are 2; .*parallel.data=2"):
        prepare(extended(), {}, write_data(tmp_path / "data"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
