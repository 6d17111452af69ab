"""Whether a folder's model fits in memory: counted from the headers of its files, before a weight is read."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from soli.checkpoint.name_map import Kind, Slot
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.shard import TORCH_DTYPE
from soli.checkpoint.writer import Target
from soli.errors import SoliError
from soli.machine import available_memory


@dataclass(frozen=True)
class Storage:
    """How weights are to be in memory: of `dtype` on `device`; `quantized` ones as stored, or dequantized; `in_place`:
    those that have the dtype are used from the files where they are, on a CPU."""

    dtype: torch.dtype
    device: torch.device
    quantized: bool
    in_place: bool

    def bytes_of(self, checkpoint: Checkpoint, experts: bool = True) -> tuple[int, int]:
        """(allocated, mapped): bytes of weights that loading allocates, and those used from the files; of all weights,
        or of those that are no routed `experts`."""
        allocated = mapped = 0
        for slot in checkpoint.slots:
            if slot.copy or (slot.expert is not None and not experts):
                continue
            entry = checkpoint.entries[slot.name]
            dtype = torch.float32 if slot.kind is Kind.ROUTER_BIAS else self.dtype
            layout = checkpoint.layout(slot)
            if layout is not None and self.quantized:
                is_mapped = layout.is_mapped
                size = checkpoint.bytes_in_files(slot) if is_mapped else checkpoint.bytes_as_stored(slot)
            else:
                is_mapped = self.in_place and TORCH_DTYPE.get(entry.dtype) == dtype
                size = prod(slot.shape) * dtype.itemsize
            if is_mapped and self.device.type == "cpu":
                mapped += size
            else:
                allocated += size
        return allocated, mapped


def choose_storage(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    quantized: bool | None,
    in_place: bool,
    experts: bool = True,
    available: int | None = None,
) -> tuple[Storage, str | None]:
    """How a model is loaded, and a note for the user where that is not what is usual for its files.

    `quantized` None: FP8 and FP4 are dequantized where that fits, and stay as stored where only that fits. True: mapped
    weights may exceed the memory, for they are read from the disk again when they are used again. `experts` false:
    routed experts are not loaded. `available`: bytes that the weights may take, those that are mapped included; None:
    what the machine has. SoliError with the bytes needed and available, and what would fit.
    """
    from_disk = quantized is True and available is None
    if available is None:
        available = _available(device)
    usual = quantized if quantized is not None else checkpoint.quantization.has_integers
    storage = Storage(dtype, device, usual, in_place)
    allocated, mapped = storage.bytes_of(checkpoint, experts)
    if allocated + (0 if from_disk else mapped) <= available:
        return storage, None
    form = "as stored" if usual and checkpoint.is_quantized else f"in {str(dtype).removeprefix('torch.')}"
    needed = f"{_gigabytes(allocated + (0 if from_disk else mapped))} of memory {form}"
    if quantized is None and not usual:
        as_stored = Storage(dtype, device, True, in_place)
        total = sum(as_stored.bytes_of(checkpoint))
        if total <= available:
            names = checkpoint.quantization.names
            return as_stored, (
                f"{checkpoint.folder}: its {names} weights stay {names}, in {_gigabytes(total)}, because dequantized "
                f"the model needs {needed}, but {_gigabytes(available)} are available"
            )
    options = "; ".join(_what_fits(checkpoint, storage, available)) or "use a machine with more memory"
    raise SoliError(
        f"{checkpoint.folder}: the model needs {needed}, but {_gigabytes(available)} are available: {options}"
    )


def _what_fits(checkpoint: Checkpoint, storage: Storage, available: int) -> Iterator[str]:
    if storage.dtype == torch.float32:
        low = Storage(torch.bfloat16, storage.device, storage.quantized, storage.in_place)
        if (size := sum(low.bytes_of(checkpoint))) <= available:
            yield f"--dtype bfloat16 needs {_gigabytes(size)}"
    allocated, mapped = Storage(checkpoint.natural_dtype, storage.device, True, True).bytes_of(checkpoint)
    if allocated + mapped <= available:
        yield f"--dtype as-is needs {_gigabytes(allocated + mapped)}"
    elif allocated <= available:
        yield f"--dtype as-is needs {_gigabytes(allocated)} and reads the weights from the disk as they are used"
    if not checkpoint.is_integer:
        for format in ("int8", "int4"):
            if (size := _converted_bytes(checkpoint, Target(format))) <= available:
                yield f"soli convert --to {format} makes a folder that needs {_gigabytes(size)}"


def _converted_bytes(checkpoint: Checkpoint, target: Target) -> int:
    slots: list[Slot] = [slot for slot in checkpoint.slots if not slot.copy]
    return sum(target.bytes_of(slot) for slot in slots)


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def _gigabytes(size: int) -> str:
    return f"{size:,} bytes ({size / 1e9:.1f} GB)"
