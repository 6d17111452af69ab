"""Make a Transformer from a folder, from the bundled model, or, without weights, from a preset."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Final

import torch
from torch import Tensor

from soli.arguments import checks_arguments
from soli.checkpoint.memory import Storage, choose_storage
from soli.checkpoint.name_map import Slot
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.save import slot_view
from soli.checkpoint.shard import TORCH_DTYPE
from soli.checkpoint.writer import ProgressCallback
from soli.config import PRESETS, resolve
from soli.errors import SoliError
from soli.formats.quantized import plain
from soli.hub.cache import find_folder, how_to_fetch
from soli.kernels import QuantizedExperts, QuantizedWeight
from soli.links import matching_files
from soli.model import Transformer
from soli.model.layers import Linear
from soli.model.moe import RoutedExperts

CACHE_LINE: Final = 64  # bytes
BUNDLED: Final = Path(__file__).parent.parent / "models"  # models that ship inside the package, by name


@checks_arguments(
    "soli.load_model",
    {"torch_dtype": "its name is dtype", "device_map": "its name is device"},
    expected={
        "name_or_folder": ((str, Path), "a folder, an ID or nano"),
        "dtype": ((torch.dtype, NoneType), "a torch.dtype, such as torch.float32"),
        "device": ((str, torch.device), "cpu, cuda or meta"),
        "mtp": ((bool,), "True or False"),
        "quantized": ((bool, NoneType), "True, False or None"),
        "progress": ((Callable,), "a function of two numbers"),  # type: ignore[dict-item]
    },
)
def load_model(
    name_or_folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    mtp: bool = True,
    quantized: bool | None = None,
    in_place: bool = False,
    progress: ProgressCallback = lambda read, total: None,
) -> Transformer:
    """A model in evaluation mode, its parameters trainable, every tensor checked before the first is used.

    `name_or_folder` is a Hugging Face folder, the ID of a downloaded model or "nano", the bundled one; with
    `device="meta"` also any preset, which gives the shapes without weights or files. `dtype` None keeps the files' own,
    bf16 where weights are quantized; router biases are fp32 always. `mtp=False` leaves the MTP modules out. Nothing is
    downloaded.

    `quantized` True keeps quantized weights as stored; they are no parameters. FP8 blocks and Soli's int8 and int4 are
    mapped from the files and read when they are used: loading takes neither time nor memory for them. Other programs'
    weights may be copied, without loss. False dequantizes them to `dtype`. None keeps integers, and dequantizes FP8 and
    FP4 where that fits in memory.

    `in_place` maps on a CPU also what the files hold in `dtype`, so that loading copies nothing: writable, and what is
    written stays in this process. Experts, which are separate tensors in files, are no parameters then. The files must
    stay as they are while a model is used that has mapped weights.

    `progress` is called with the bytes read and those in all. Memory: the model once, without mapped weights, and one
    tensor. Raises SoliError naming file and tensor, and before a weight is read for a model that does not fit in
    memory; warns when the files lack the MTP modules that their config.json announces.
    """
    if _checked_device(device).type == "meta":
        config = resolve(name_or_folder)
        config = config if mtp else replace(config, num_nextn_predict_layers=0)
        return Transformer(config, device="meta", dtype=dtype or torch.bfloat16).eval()
    return load_checkpoint(
        open_checkpoint(name_or_folder, mtp),
        torch.device(device),
        dtype,
        quantized=quantized,
        in_place=in_place,
        progress=progress,
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    quantized: bool | None = None,
    in_place: bool = False,
    paged: Mapping[str, QuantizedExperts] | None = None,
    available: int | None = None,
    reshape: Callable[[Transformer], None] = lambda model: None,
    progress: ProgressCallback = lambda read, total: None,
) -> Transformer:
    """`load_model` of an open folder.

    `paged` has the routed experts of each module, by its name, in a model whose experts stay in the files
    (soli.experts.load); nothing of them is loaded. The checkpoint must not be mapped then. `available`: bytes that the
    weights may take, by default what the machine has. `reshape`: gives the model, which is on the meta device, the
    shapes of a checkpoint that is a part.
    """
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=4)
    model_dtype = dtype or checkpoint.natural_dtype
    storage, storage_note = choose_storage(
        checkpoint, model_dtype, device, quantized, in_place, experts=paged is None, available=available
    )
    if storage_note is not None:
        warnings.warn(storage_note, stacklevel=4)
    checkpoint.check_router_biases()
    checkpoint.check_copies()
    model = Transformer(checkpoint.config, device="meta", dtype=storage.dtype)
    reshape(model)
    sources = slots_by_tensor(checkpoint)
    _set_as_stored(model, checkpoint, sources, storage, paged or {})
    _fill(model, checkpoint, sources, storage, progress)
    return model.eval()


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        checked = torch.device(device)
    except RuntimeError:
        raise SoliError(f"device is {device!r}; give cpu, cuda or meta") from None
    if checked.type == "cuda" and (checked.index or 0) >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise SoliError(f"device is {str(device)!r}, but PyTorch sees {gpus} GPUs on this machine: use cpu")
    return checked


def open_checkpoint(
    name_or_folder: str | Path, mtp: bool = True, mapped: bool = True, follow_links: bool = True
) -> Checkpoint:
    """Open and check a folder, the bundled model by name, or a downloaded one by ID, without reading a weight.
    SoliError says what to do.

    `follow_links` false rejects a symlink out of the folder (soli.links) before anything is read.
    """
    folder = model_folder(name_or_folder)
    if not follow_links:
        matching_files(folder, ("*.json", "*.safetensors"))
    return Checkpoint(folder, mtp, mapped)


def model_folder(name_or_folder: str | Path) -> Path:
    """A folder, that of the bundled model by name, or of a downloaded one by ID. SoliError says what to do."""
    name = str(name_or_folder)
    folder = Path(name_or_folder)
    if name in PRESETS:
        folder = BUNDLED / name
        if not folder.is_dir():
            raise SoliError(f"{name} is a preset, a shape without weights; load it with device='meta' or give a folder")
    if not folder.exists():
        folder = find_folder(name) or folder
    if not folder.is_dir():
        raise SoliError(f"{name}: there is no such folder{how_to_fetch(name)}")
    return folder


def _set_as_stored(
    model: Transformer,
    checkpoint: Checkpoint,
    sources: dict[str, list[Slot]],
    storage: Storage,
    paged: Mapping[str, QuantizedExperts],
) -> None:
    """Give every layer whose weights stay as stored these weights, mapped from disk; `paged`: experts by module."""
    device = storage.device
    for name, module in model.named_modules():
        if isinstance(module, Linear) and storage.quantized:
            weight = checkpoint.quantized(sources[f"{name}.weight"][0]) if f"{name}.weight" in sources else None
            if weight is not None:
                module.set_quantized(weight.to(device))
        elif name in paged:
            assert isinstance(module, RoutedExperts)
            module.set_quantized(paged[name])
        elif isinstance(module, RoutedExperts):
            gates_ups, downs = sources[f"{name}.gate_up_proj"], sources[f"{name}.down_proj"]
            first = (*gates_ups[:1], *downs[:1])
            quantized = storage.quantized and any(checkpoint.layout(slot) for slot in first)
            dtypes = {TORCH_DTYPE[checkpoint.entries[slot.name].dtype] for slot in (*gates_ups, *downs)}
            plain_in_place = storage.in_place and device.type == "cpu" and dtypes == {storage.dtype}
            if quantized or plain_in_place:
                gates, ups, downs_as_stored = (
                    tuple(_as_stored(checkpoint, slot).to(device) for slot in slots)
                    for slots in (gates_ups[::2], gates_ups[1::2], downs)
                )
                module.set_quantized(QuantizedExperts(gates, ups, downs_as_stored))


def _as_stored(checkpoint: Checkpoint, slot: Slot) -> QuantizedWeight:
    """A slot as a quantized weight, of the plain format where its file has floats."""
    weight = checkpoint.quantized(slot)
    if weight is not None:
        return weight
    is_bf16 = checkpoint.entries[slot.name].dtype == "BF16"
    return plain(checkpoint.values(slot, torch.bfloat16 if is_bf16 else torch.float32))


def _allocate(shape: torch.Size, dtype: torch.dtype, device: torch.device, offset: int) -> Tensor:
    """Memory for a tensor, aligned to a cache line as one at byte `offset` of a mapped file: torch's products may round
    otherwise where memory is aligned otherwise, and a model has the same bits mapped and read into memory."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    memory = torch.empty(shape.numel() * dtype.itemsize + CACHE_LINE, dtype=torch.uint8)
    start = (offset - memory.data_ptr()) % CACHE_LINE
    if (memory.data_ptr() + start) % dtype.itemsize:
        start = -memory.data_ptr() % CACHE_LINE
    return memory[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def whole_tensor(
    checkpoint: Checkpoint, slots: list[Slot], name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The tensor `name` of Soli, read from the slots that fill it, dequantized."""
    tensor = _allocate(shape, dtype, device, checkpoint.entries[slots[0].name].start)
    for slot in slots:
        slot_view({name: tensor}, slot).copy_(checkpoint.values(slot, dtype, device))
    return tensor


def slots_by_tensor(checkpoint: Checkpoint) -> dict[str, list[Slot]]:
    """The slots that fill each tensor of Soli, without copies."""
    sources: dict[str, list[Slot]] = defaultdict(list)
    for slot in checkpoint.slots:
        if not slot.copy:
            sources[slot.soli].append(slot)
    return sources


def _fill(
    model: Transformer,
    checkpoint: Checkpoint,
    sources: dict[str, list[Slot]],
    storage: Storage,
    progress: ProgressCallback,
) -> None:
    """Map every parameter and buffer from the files, or allocate it and read its values."""
    filled: dict[str, Tensor] = {}
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    bytes_read = 0
    for name, empty in model.state_dict().items():
        if name not in sources:  # the head of a model with tied embeddings
            continue
        parameter = None
        if storage.in_place and storage.device.type == "cpu" and sources[name][0].expert is None:
            parameter = checkpoint.parameter(sources[name][0], empty.dtype)
        if parameter is None:
            parameter = whole_tensor(checkpoint, sources[name], name, empty.shape, empty.dtype, storage.device)
        filled[name] = parameter
        bytes_read += empty.nbytes
        progress(bytes_read, total)
    tied = checkpoint.config.tie_word_embeddings
    missing, unknown = model.load_state_dict(filled, strict=not tied, assign=True)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    tensors = [*model.state_dict().items(), *model.named_buffers()]
    empty_names = [name for name, tensor in tensors if tensor.is_meta]
    assert not empty_names and not unknown, (empty_names, missing, unknown)
