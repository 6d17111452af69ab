"""Peak memory of one rank's training step, by torch's own memory tracker, and the bytes that it sends."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from soli.model.transformer import Transformer
from soli.parallel.mesh import build_meshes
from soli.parallel.ranks import join_ranks, launched_ranks, local_tensor
from soli.parallel.sharding import init_shards, shard_model
from soli.train.losses import compute_losses, count_targets
from soli.train.model_options import apply_block_options
from soli.train.optimizer import Optimizer
from soli.train.settings import TrainSettings, read_settings
from tests.train.toy import EOS, windows

SENDING = ("all_gather_single", "all_gather_into_tensor", "all_to_all_single")


class SentBytes:
    """Bytes that this rank sends in the collectives of shards and experts."""

    def __init__(self) -> None:
        self.bytes = 0
        for name in SENDING:
            if hasattr(dist, name):
                setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            ranks = (kwargs.get("group") or dist.group.WORLD).size()
            size = tensor.numel() * tensor.element_size()
            self.bytes += size * (ranks - 1) // (ranks if name == "all_to_all_single" else 1)
            return collective(output, tensor, *args, **kwargs)

        return call


class PeakTracker(MemTracker):
    """The tracker without its statistics by module, which do not take a module that is called twice (the embedding)."""

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None: ...

    def _post_fw_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> None: ...

    def _pre_bw_hook(self, module: nn.Module, args: Any) -> None: ...

    def _post_bw_hook(self, module: nn.Module, args: Any) -> None: ...


def tracked_step(recipe: dict[str, Any]) -> dict[str, int]:
    """Bytes by kind of the second step: weights, moments, gradients after it, the peak within it, and bytes sent."""
    settings: TrainSettings = read_settings(recipe)
    ranks, sizes = launched_ranks(), settings.parallel
    join_ranks(ranks, torch.device("cpu"))
    model = Transformer(settings.model, device="meta", dtype=torch.float32)
    apply_block_options(model, settings.run)
    shard_model(model, build_meshes(sizes.data, sizes.expert, 1, "cpu"))
    init_shards(model, torch.device("cpu"), torch.Generator().manual_seed(0))
    optimizer = Optimizer(model, settings.optimizer, torch.float32, ranks)
    batch_BW = windows(settings.schedule.batch_sequences, settings.schedule.sequence_length + 2)
    ids_BW = batch_BW.chunk(ranks.world)[ranks.rank]
    totals = count_targets(ids_BW, 1, EOS, ranks)
    counter = SentBytes()

    def step() -> None:
        compute_losses(model, ids_BW, totals, EOS).total(0.3, 1e-4).backward()

    step()
    optimizer.step(1e-3)
    weights = [local_tensor(parameter) for parameter in model.parameters()]
    moments = [local_tensor(value) for value in optimizer.state().values() if value.ndim]
    counter.bytes = 0
    tracker = PeakTracker()
    tracker.track_external(*weights, *moments)
    with tracker:
        step()
        gradients = sum(local_tensor(p.grad).nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step(1e-3)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return {
        "weights": sum(weight.nbytes for weight in weights),
        "moments": sum(moment.nbytes for moment in moments),
        "gradients": gradients,
        "peak": int(peak),
        "sent": counter.bytes,
    }


def tracked_steps(recipes: list[dict[str, Any]]) -> list[dict[str, int]]:
    """`tracked_step` of several recipes, one after another in the same processes."""
    return [tracked_step(recipe) for recipe in recipes]
