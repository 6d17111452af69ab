"""What a checkpoint holds, and what is made of it: a run that goes on, a model, a model folder.

Everything that resuming needs, nothing pickled. Tensors have Soli's parameter names, moments `<parameter>|<moment>`,
whichever process holds which chunk (soli/train/checkpoint_storage.py). Tensor files have the digest of state.json,
which has a random id and the digest of config.json.

Rejected: a weight, bias or moment that is not finite, files of another checkpoint.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from soli.checkpoint.name_map import Slot
from soli.checkpoint.save import save_slots
from soli.checkpoint.writer import Target
from soli.config import load_config
from soli.errors import SoliError
from soli.input_files import read_object
from soli.model.transformer import Transformer
from soli.train.checkpoint_storage import StateReader, check_shapes, load, read_region
from soli.train.finite import check_finite
from soli.train.optimizer import Optimizer
from soli.train.run_folder import (
    CHECKPOINT_ID,
    CONFIG_DIGEST,
    REMOVE,
    RunProgress,
    document_digest,
    latest_checkpoints,
    read_progress,
    read_state,
    require_best_checkpoint,
)

EXPORT_ATTEMPTS = 5  # with another checkpoint each, where the run removed one while it was read
RNG = "torch_rng"  # of process 0; of process n with the suffix .n
CUDA_RNG = "cuda_rng"


def load_checkpoint(
    checkpoint: Path, model: Transformer, optimizer: Optimizer, late_mtp: bool = False
) -> RunProgress:
    """Restore model, optimizer and random state; SoliError names the tensor that does not fit.

    With `late_mtp` it may be of a time when the MTP modules were not trained yet. Any number of processes may have
    saved. One that had no counterpart then gets the random state of the first.
    """
    reader = StateReader(checkpoint, ("model", "optimizer"))
    _check_identity(reader)
    weights = _weights(reader, model)
    moments = {f"optimizer/{name}": tensor for name, tensor in _empty_moments(reader, optimizer, model).items()}
    random_states = {
        name: torch.empty(reader.tensors[name].size, dtype=torch.uint8) for name in _random_state_names(reader, model)
    }
    load(reader, weights | moments | random_states)
    check_finite(checkpoint, weights | moments)
    optimizer.load_state({name.removeprefix("optimizer/"): tensor for name, tensor in moments.items()}, late_mtp)
    for name, random_state in random_states.items():
        if name.startswith(f"optimizer/{RNG}"):
            torch.set_rng_state(random_state)
        else:
            torch.cuda.set_rng_state(random_state, model.embed_tokens.weight.device)
    return read_progress(checkpoint)


def load_weights(checkpoint: Path, model: Transformer) -> None:
    """Fill a model's parameters and router biases (fp32) from a checkpoint."""
    reader = StateReader(checkpoint, ("model",))
    _check_identity(reader)
    weights = _weights(reader, model)
    load(reader, weights)
    check_finite(checkpoint, weights)


def load_run(run: Path) -> Transformer:
    """The best model of a run, fp32 on the CPU, for export and evaluation."""
    checkpoint = require_best_checkpoint(run)
    model = Transformer(load_config(checkpoint), dtype=torch.float32)
    load_weights(checkpoint, model)
    return model


def export_run(run: Path, folder: Path, format: str, average: int | None = None) -> None:
    """Write a run's weights as a model folder, whichever number of processes saved them, tensor by tensor.

    They are those of its best checkpoint, or, with `average`, the mean of so many of its latest ones, which at a
    constant learning rate brings what lowering the rate does, or more (Izmailov et al. 2018; Li et al. 2025). MTP
    modules are then the latest ones: of the drafts of their mean, fewer are accepted (docs/log.md). The run may go on
    meanwhile; checkpoints that it removes are given up for later ones. SoliError names what does not fit or is not
    finite; nothing is left at `folder` then.
    """
    for _ in range(EXPORT_ATTEMPTS):
        sources = [require_best_checkpoint(run)] if average is None else latest_checkpoints(run, average)
        try:
            return _export_mean(sources, run, folder, format)
        except SoliError:
            if all(checkpoint.is_dir() for checkpoint in sources):
                raise
    raise SoliError(f"{run}: its process removes checkpoints before they are read; raise run.keep, or stop it first")


def _export_mean(sources: list[Path], run: Path, folder: Path, format: str) -> None:
    weights = [_StoredWeights(checkpoint) for checkpoint in sources]

    def fetch(slot: Slot) -> Tensor:
        latest = weights[-1].fetch(slot)
        if slot.soli.startswith("mtp."):
            return latest
        return sum((earlier.fetch(slot) for earlier in weights[:-1]), latest).div_(len(weights))

    source = f"{run.resolve().name}, a run of soli train"
    if len(sources) > 1:
        source += f"; the mean of its checkpoints {sources[0].name} to {sources[-1].name}, {len(sources)} in number"
    save_slots(weights[-1].config, fetch, folder, Target(format), run, source=source)


class _StoredWeights:
    """The weights of one checkpoint, by published tensor. SoliError where its files do not fit each other."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.reader = StateReader(checkpoint, ("model",))
        _check_identity(self.reader)
        self.config = load_config(checkpoint)
        check_shapes(
            self.reader, _weights(self.reader, Transformer(self.config, device="meta", dtype=torch.float32))
        )

    def fetch(self, slot: Slot) -> Tensor:
        """fp32; SoliError where a value is not finite."""
        name = f"model/{slot.soli}"
        if name not in self.reader.tensors and self.config.tie_word_embeddings:
            name = "model/embed_tokens.weight"
        size = self.reader.tensors[name].size
        if slot.expert is None:
            values = read_region(self.reader, name, [0] * len(size), size)
        else:
            region = [slot.expert, slot.first_row, 0], [1, slot.shape[0], size[2]]
            values = read_region(self.reader, name, *region)[0]
        check_finite(self.checkpoint, {slot.soli: values})
        return values


def model_state(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors as `model/name`, parameters and persistent buffers; a tied head is left out."""
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("model/lm_head.weight", None)
    return state


def run_state(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything but the progress, by full name: the model, the optimizer's moments, this process's random state."""
    state = model_state(model) | {f"optimizer/{name}": tensor for name, tensor in optimizer.state().items()}
    state[f"optimizer/{RNG}{_rank_suffix()}"] = torch.get_rng_state()
    device = model.embed_tokens.weight.device
    if device.type == "cuda":
        state[f"optimizer/{CUDA_RNG}{_rank_suffix()}"] = torch.cuda.get_rng_state(device)
    return state


def _check_identity(reader: StateReader) -> None:
    """SoliError when tensors, state.json and config.json are not of one checkpoint; older versions' have no digests."""
    state = read_state(reader.folder)
    expected = document_digest(state) if CHECKPOINT_ID in state else None
    for file, digest in reader.state_digests.items():
        if digest != expected:
            raise SoliError(f"{reader.folder / 'state.json'} does not belong to {file.name} beside it; {REMOVE}")
    config_file = reader.folder / "config.json"
    if expected is not None and state.get(CONFIG_DIGEST) != document_digest(read_object(config_file)):
        raise SoliError(f"{config_file} is not the one that was saved with this checkpoint; {REMOVE}")


def _weights(reader: StateReader, model: Transformer) -> dict[str, Tensor]:
    state = model_state(model)
    stored = {name for name in reader.tensors if name.startswith("model/")}
    if unknown := stored - state.keys():
        unknown -= model_state(_skeleton(model)).keys()  # of the layers that another process has
    if unknown:
        name = next(name for name in reader.tensors if name in unknown)
        raise SoliError(f"{reader.folder} has {name}, which the recipe's model lacks")
    return state


def _skeleton(model: Transformer) -> Transformer:
    """The whole model of which this process may have some layers, without memory."""
    return Transformer(model.config, device="meta", dtype=torch.float32)


def _empty_moments(reader: StateReader, optimizer: Optimizer, model: Transformer) -> dict[str, Tensor]:
    """An empty tensor per moment of the checkpoint that this process needs: a shard where the parameter is one, else
    whole, on the CPU."""
    parameters = {name: p for p, name in optimizer.names.items()}
    of_others = {name for name, _ in _skeleton(model).named_parameters()} - parameters.keys()
    moments: dict[str, Tensor] = {}
    for full, stored in reader.tensors.items():
        part, _, name = full.partition("/")
        if part == "optimizer" and not name.startswith((RNG, CUDA_RNG)):
            parameter = name.rpartition("|")[0]
            if parameter in of_others:
                continue
            p = parameters.get(parameter)
            if isinstance(p, DTensor) and p.shape == stored.size:
                moments[name] = torch.empty_like(p, dtype=stored.properties.dtype)
            else:
                moments[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    return moments


def _random_state_names(reader: StateReader, model: Transformer) -> list[str]:
    """Full names of the random states that this process restores."""
    kinds = (RNG, CUDA_RNG) if model.embed_tokens.weight.device.type == "cuda" else (RNG,)
    candidates = ((f"optimizer/{kind}{_rank_suffix()}", f"optimizer/{kind}") for kind in kinds)
    return [next(name for name in pair if name in reader.tensors) for pair in candidates if pair[1] in reader.tensors]


def _rank_suffix() -> str:
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return f".{rank}" if rank else ""
