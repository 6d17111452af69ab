"""Values that are not finite in a run's state: found, named, and what to do about them."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from soli.errors import SoliError
from soli.train.checkpoint_storage import StateReader
from soli.train.run_folder import checkpoints


class NotFinite(SoliError):
    """A tensor of a run's state holds NaN or infinity."""


def reject_nonfinite(state: Iterable[tuple[str, Tensor]]) -> None:
    """NotFinite with the name of the first floating-point tensor that holds NaN or infinity."""
    for name, tensor in state:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not local.is_floating_point() or not local.numel():
            continue
        lowest, highest = local.detach().aminmax()  # NaN where there is one; no copy of the tensor
        if not (lowest.isfinite() and highest.isfinite()):
            raise NotFinite(f"{name} holds values that are not finite")


def resume_advice(run: Path) -> str:
    """The last checkpoint whose tensors are all finite, and how to resume from it; the end of a sentence."""
    later: list[Path] = []
    for checkpoint in reversed(checkpoints(run)):
        if _is_finite(checkpoint):
            removed = f"remove {' and '.join(map(str, reversed(later)))}, then " if later else ""
            return (
                f"the last finite checkpoint is {checkpoint}: to resume from it {removed}run soli train again with a "
                "lower schedule.learning_rate (--set)"
            )
        later.append(checkpoint)
    return "there is no finite checkpoint: start again in another --out with a lower schedule.learning_rate (--set)"


def _is_finite(checkpoint: Path) -> bool:
    try:
        reader = StateReader(checkpoint, ("model", "optimizer"))
        reject_nonfinite((name, shard.tensor(name)) for shard in set(reader.shards.values()) for name in shard.entries)
    except SoliError:
        return False
    return True


def check_finite(checkpoint: Path, state: dict[str, Tensor]) -> None:
    try:
        reject_nonfinite(state.items())
    except NotFinite as error:
        raise SoliError(f"{checkpoint}: {error}; {resume_advice(checkpoint.parent.parent)}") from None
