"""A toy run of some steps on any number of ranks, and everything about it that must not depend on that number."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from soli.train.checkpoint_storage import StateReader, load
from soli.train.checkpoints import run_state
from soli.train.run_folder import checkpoints
from soli.train.setup import prepare
from soli.train.trainer import take_step
from tests.train.toy import settings

# A quarter of each is a vector register: torch's fused AdamW rounds what is left over of one otherwise.
VECTORS = {"hidden_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64}


@dataclass
class Trained:
    """What some steps measured, and the state after them, whole."""

    losses: list[tuple[float, float, float]]
    norms: list[float]
    counts: list[Tensor]
    state: dict[str, Tensor]

    def differing(self, other: "Trained") -> list[str]:
        """Names of the tensors that are not bit-identical."""
        assert self.state.keys() == other.state.keys()
        return [name for name, tensor in self.state.items() if not torch.equal(tensor, other.state[name])]

    def distance(self, other: "Trained") -> float:
        """The largest difference of a weight, relative to the largest weight of its tensor."""
        return max(
            float((tensor - other.state[name]).abs().max() / tensor.abs().max().clamp_min(1e-6))
            for name, tensor in self.state.items()
            if name.startswith("model/")
        )


def train_steps(data: Path, folder: Path, steps: int, sections: dict[str, dict[str, Any]]) -> Trained:
    """Train `steps` steps of the toy with some fields of some sections changed."""
    run = prepare(settings(**sections), {}, data, folder)
    results = [take_step(run) for _ in range(steps)]
    state = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in run_state(run.model, run.optimizer).items()
        if "rng" not in name
    }
    return Trained(
        losses=[(step.loss, step.mtp, step.balance) for step in results],
        norms=[step.norm for step in results],
        counts=[step.counts_LE for step in results],
        state=state,
    )


def train_each(data: Path, folder: Path, steps: int, recipes: list[dict[str, dict[str, Any]]]) -> list[Trained]:
    """`train_steps` of several recipes, one after another in the same processes: starting them takes longest."""
    return [train_steps(data, folder / str(number), steps, recipe) for number, recipe in enumerate(recipes)]


def saved_state(run: Path) -> dict[str, Tensor]:
    """The weights, biases and moments of a run's last checkpoint, whole, whichever number of ranks wrote it."""
    reader = StateReader(checkpoints(run)[-1], ("model", "optimizer"))
    state = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.tensors.items()
        if "rng" not in name
    }
    load(reader, state)
    return state
