"""Write a Transformer as a Hugging Face folder that transformers, vLLM and the rest read."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from soli.arguments import checks_arguments
from soli.checkpoint.model_card import CardSource
from soli.checkpoint.name_map import Slot, slots
from soli.checkpoint.side_files import TOKENIZER_FILES, SideFiles, collect
from soli.checkpoint.writer import SHARD_BYTES, Target, write
from soli.config import ModelConfig
from soli.errors import SoliError
from soli.model import Transformer


@checks_arguments(
    "soli.save_model",
    expected={"model": ((Transformer,), "a soli.model.Transformer"), "folder": ((str, Path), "a new folder's path")},
)
def save_model(
    model: Transformer,
    folder: str | Path,
    format: str = "bf16",
    tokenizer_from: str | Path | None = None,
    *,
    ue8m0: bool = False,
    mtp_copies: bool = True,
    source: str = "a model in Python",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` to the new folder `folder` as "bf16", "fp32", "fp8" (128x128 blocks, `ue8m0` scales on request),
    "int8" or "int4".

    `tokenizer_from` is a folder whose tokenizer goes along, with a model card that names `source` for the weights.
    MTP modules carry copies of embedding and head, as the official files do, unless `mtp_copies` is false; other
    programs may need them, Soli does not. Router biases are fp32 in every format. Memory beyond the model: one tensor.
    Raises SoliError for a folder that is not empty, a model without weights or with quantized ones, and values that the
    format cannot hold; nothing is left on the disk then.
    """
    state = model.state_dict()
    empty = next((name for name, tensor in state.items() if tensor.is_meta), None)
    if empty is not None:
        raise SoliError(f"this model has shapes but no weights ({empty} is on the meta device); load it from a folder")
    if any(getattr(module, "quantized", None) is not None for module in model.modules()):
        raise SoliError(
            "this model computes with quantized weights, which are not saved; copy its folder, rewrite it with "
            "soli convert, or load it with quantized=False"
        )
    target = Target(format, ue8m0, shard_bytes)
    save_slots(
        model.config,
        lambda slot: slot_view(state, slot),
        folder,
        target,
        tokenizer_from,
        mtp_copies=mtp_copies,
        source=source,
    )


def save_slots(
    config: ModelConfig,
    fetch: Callable[[Slot], Tensor],
    folder: str | Path,
    target: Target,
    tokenizer_from: str | Path | None = None,
    *,
    mtp_copies: bool = True,
    source: str,
) -> None:
    """As `save_model`, of weights that `fetch` gives for one file tensor at a time: no model needs to be in memory."""
    written_slots = [slot for slot in slots(config) if not slot.copy or (mtp_copies and slot.layer is not None)]
    side_files: SideFiles = {}
    if tokenizer_from is not None:
        folder_with_tokenizer = _existing_folder(tokenizer_from)
        side_files, _ = collect(folder_with_tokenizer, TOKENIZER_FILES, config, target.format, CardSource(source))
    write(Path(folder), config, written_slots, target, lambda slot: target.encode(slot, fetch(slot)), side_files)


def slot_view(state: Mapping[str, Tensor], slot: Slot) -> Tensor:
    """The view of a Soli state dict that one file tensor fills: a whole tensor, or rows of one expert in a stack."""
    tensor = state[slot.soli]
    if slot.expert is None:
        return tensor
    return tensor[slot.expert, slot.first_row : slot.first_row + slot.shape[0]]


def _existing_folder(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise SoliError(f"{folder}: there is no such folder to take a tokenizer from")
    return Path(folder)
