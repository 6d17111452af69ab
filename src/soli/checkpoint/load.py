"""Make a Transformer from a folder, from the model in the box, or, without weights, from a preset."""

import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from soli.checkpoint.name_map import Slot
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.save import part
from soli.config import PRESETS, resolve
from soli.errors import SoliError
from soli.formats.quantized import plain
from soli.kernels import QuantizedExperts, QuantizedWeight
from soli.model import Transformer
from soli.model.layers import Linear
from soli.model.moe import RoutedExperts

BOX: Final = Path(__file__).parent.parent / "models"  # models that ship inside the package, by name


def load_model(
    name_or_folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    mtp: bool = True,
    quantized: bool | None = None,
) -> Transformer:
    """A model in evaluation mode, its parameters trainable, every tensor checked before the first is used.

    `name_or_folder` is a Hugging Face folder or "nano", the model in the box; with `device="meta"` also any preset,
    which gives the shapes without weights or files. `dtype` None keeps the files' own, bf16 where weights are
    quantized; router biases are fp32 always. `mtp=False` leaves the MTP modules out. Nothing is downloaded.

    `quantized` True leaves FP8, int8 and int4 weights as they lie in the files, mapped from disk and read when a
    product needs them: loading takes neither time nor memory for them, and they are no parameters. False writes them
    out in `dtype`. None leaves int8 and int4 as they lie and writes FP8 out.

    Memory: the model once, save for what is quantized, and one tensor. Raises SoliError naming file and tensor; warns
    when the files lack the MTP modules that their config.json announces.
    """
    if torch.device(device).type == "meta":
        config = resolve(name_or_folder)
        config = config if mtp else replace(config, num_nextn_predict_layers=0)
        return Transformer(config, device="meta", dtype=dtype or torch.bfloat16).eval()
    checkpoint = open_checkpoint(name_or_folder, mtp)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    checkpoint.check_copies()
    model = Transformer(checkpoint.config, device="meta", dtype=dtype or checkpoint.natural_dtype)
    if quantized if quantized is not None else "F8_E4M3" not in checkpoint.quantized_dtypes:
        _set_quantized(model, checkpoint, device)
    _fill(model, checkpoint, device)
    return model.eval()


def open_checkpoint(name_or_folder: str | Path, mtp: bool = True) -> Checkpoint:
    """Open and check a folder, or the model in the box by name, without reading a weight. SoliError says what to do."""
    name, folder = str(name_or_folder), Path(name_or_folder)
    if name in PRESETS:
        folder = BOX / name
        if not folder.is_dir():
            raise SoliError(f"{name} is a preset, a shape without weights; load it with device='meta' or give a folder")
    if not folder.is_dir():
        raise SoliError(f"{name}: there is no such folder{_how_to_fetch(name)}")
    return Checkpoint(folder, mtp)


def _how_to_fetch(name: str) -> str:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        return ""
    short = name.split("/")[1]
    return f"; for the model of that name run `hf download {name} --local-dir {short}` and give the folder {short}"


def _set_quantized(model: Transformer, checkpoint: Checkpoint, device: torch.device | str) -> None:
    """Give every layer whose weights are quantized in the files these weights as they lie."""
    sources = _sources(checkpoint)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            weight = checkpoint.quantized(sources[f"{name}.weight"][0]) if f"{name}.weight" in sources else None
            if weight is not None:
                module.set_quantized(weight.to(device))
        elif isinstance(module, RoutedExperts):
            gates_ups, downs = sources[f"{name}.gate_up_proj"], sources[f"{name}.down_proj"]
            if any(checkpoint.quantized(slot) for slot in (*gates_ups[:1], *downs[:1])):
                weights = [_as_it_lies(checkpoint, slot).to(device) for slot in (*gates_ups, *downs)]
                E = len(downs)
                parts = weights[: 2 * E : 2], weights[1 : 2 * E : 2], weights[2 * E :]
                module.set_quantized(QuantizedExperts(*(tuple(part) for part in parts)))


def _as_it_lies(checkpoint: Checkpoint, slot: Slot) -> QuantizedWeight:
    """A slot as a quantized weight, plain where its file has floats."""
    quantized = checkpoint.quantized(slot)
    if quantized is not None:
        return quantized
    is_bf16 = checkpoint.entries[slot.name].dtype == "BF16"
    return plain(checkpoint.values(slot, torch.bfloat16 if is_bf16 else torch.float32))


def _sources(checkpoint: Checkpoint) -> dict[str, list[Slot]]:
    """The slots that fill each tensor of Soli, copies left out."""
    sources: dict[str, list[Slot]] = defaultdict(list)
    for slot in checkpoint.slots:
        if not slot.copy:
            sources[slot.soli].append(slot)
    return sources


def _fill(model: Transformer, checkpoint: Checkpoint, device: torch.device | str) -> None:
    """Give every parameter and buffer its memory on `device` and its values from the files, one after another."""
    sources = _sources(checkpoint)
    filled: dict[str, Tensor] = {}
    for name, empty in model.state_dict().items():
        if name not in sources:  # the head of a model with tied embeddings
            continue
        filled[name] = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        for slot in sources[name]:
            part(filled, slot).copy_(checkpoint.values(slot, empty.dtype, device))
    tied = checkpoint.config.tie_word_embeddings
    missing, unknown = model.load_state_dict(filled, strict=not tied, assign=True)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    left += [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left and not unknown, (left, missing, unknown)
