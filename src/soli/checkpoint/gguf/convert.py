"""Write a folder as one GGUF file of float32 or bfloat16, tensor by tensor, MTP modules left out.

The file has a hidden name until it is complete; one that is there already is never overwritten. Memory: one tensor of
the source. Needs the gguf package for the header.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import torch

from soli.atomic_file import check_space
from soli.checkpoint.convert import Conversion
from soli.checkpoint.gguf.metadata import ARCHITECTURE, add_shape, check_config, read_chat_template
from soli.checkpoint.gguf.tensors import GgufTensor, plan
from soli.checkpoint.gguf.vocabulary import Vocabulary, read_vocabulary
from soli.checkpoint.load import open_checkpoint
from soli.checkpoint.model_card import CARD, CardSource, read_source, render_card
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.side_files import SIDE_FILES, files_beside
from soli.checkpoint.writer import ProgressCallback, new_folder, write_side_files
from soli.errors import SoliError

TYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16}
FILE_TYPES: Final = {"f32": 0, "bf16": 32}  # llama.cpp's numbers
ALIGNMENT: Final = 32  # bytes, of each tensor; the format's default
FLOAT32_LIMIT: Final = 512 * 2**20  # bytes of weight files up to which "auto" is float32
SUFFIX: Final = ".gguf"
LICENCES: Final = ("LICENSE", "NOTICE")  # how their names begin


def convert_to_gguf(
    source: str | Path,
    destination: str | Path,
    type: str = "auto",
    progress: ProgressCallback = lambda written, total: None,
) -> Conversion:
    """Write the folder `source` as GGUF: to the file `destination` where that ends in .gguf, else to the new folder of
    that name, with a model card and the licence.

    `type` "f32" or "bf16"; "auto" is f32 for weight files of up to 512 MB. Norms and routers are float32 always.
    Raises SoliError naming the field, the tokenizer or the tensor that llama.cpp does not know; nothing is left then.
    """
    checkpoint = open_checkpoint(source, mtp=False, mapped=False, follow_links=False)
    type = _resolve_type(type, checkpoint)
    try:
        check_config(checkpoint.config)
    except SoliError as error:
        raise SoliError(f"{checkpoint.folder / 'config.json'}: {error}") from None
    checkpoint.check_router_biases()
    beside = files_beside(checkpoint.folder, SIDE_FILES)  # rejects symlinks out of the folder
    vocabulary = read_vocabulary(checkpoint.folder, checkpoint.config.vocab_size)
    tensors = list(plan(checkpoint.config, checkpoint.slots))
    total = sum(_bytes_of(tensor, type) for tensor in tensors)
    card_source, notes = _card_source(checkpoint.folder)
    destination = Path(destination)

    def write(file: Path) -> None:
        _write_header(file, checkpoint, vocabulary, tensors, type, card_source)
        with file.open("ab") as stream:
            _write_tensors(stream, checkpoint, tensors, type, lambda written: progress(written, total))
            os.fsync(stream.fileno())

    if destination.suffix == SUFFIX:
        with new_file(destination, total) as partial:
            write(partial)
    else:
        name = f"{_file_name(card_source)}-{type}{SUFFIX}"
        with new_folder(destination, total) as folder:
            write(folder / name)
            card = render_card(card_source, checkpoint.config, f"gguf-{type}", name)
            licences = {file: path for file, path in beside.items() if file.startswith(LICENCES)}
            write_side_files(folder, {**licences, CARD: card})
    read = sum(entry.end - entry.start for entry in checkpoint.entries.values())
    return Conversion(len(tensors), read, total, [*checkpoint.notes, *notes, *vocabulary.notes])


def _resolve_type(type: str, checkpoint: Checkpoint) -> str:
    if type not in ("auto", *TYPES):
        raise SoliError(f"the type is {type!r}; choose auto, {' or '.join(TYPES)}")
    if type != "auto":
        return type
    size = sum(file.stat().st_size for file in {entry.file for entry in checkpoint.entries.values()})
    return "f32" if size <= FLOAT32_LIMIT else "bf16"


def _card_source(folder: Path) -> tuple[CardSource, list[str]]:
    try:
        return read_source(folder), []
    except SoliError as error:
        return CardSource(folder.resolve().name, licence="see the source"), [f"the source's card is left out: {error}"]


def _file_name(source: CardSource) -> str:
    return source.name.rpartition("/")[2]


def _bytes_of(tensor: GgufTensor, type: str) -> int:
    return prod(tensor.shape) * (4 if tensor.is_high else TYPES[type].itemsize)


def _write_header(
    file: Path,
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    tensors: list[GgufTensor],
    type: str,
    source: CardSource,
) -> None:
    """Everything before the first tensor's values."""
    import gguf

    writer = gguf.GGUFWriter(str(file), ARCHITECTURE)
    writer.add_name(_file_name(source))
    writer.add_description(f"{source.name}, written by Soli")
    if source.licence_id is not None:
        writer.add_license(source.licence_id)
    writer.add_file_type(FILE_TYPES[type])
    add_shape(writer, checkpoint.config)
    _add_vocabulary(writer, checkpoint, vocabulary)
    for tensor in tensors:
        is_bf16 = TYPES[type] == torch.bfloat16 and not tensor.is_high
        kind = gguf.GGMLQuantizationType.BF16 if is_bf16 else gguf.GGMLQuantizationType.F32
        dtype = np.dtype(np.uint16 if is_bf16 else np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, _bytes_of(tensor, type), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_vocabulary(writer: Any, checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    stops = checkpoint.config.eos_token_id
    ends = [stops] if isinstance(stops, int) else [*(stops or ())]
    eos = vocabulary.eos if vocabulary.eos is not None else next(iter(ends), None)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    if eos is not None:
        writer.add_eos_token_id(eos)
    for other in [end for end in ends if end != eos][:1]:
        writer.add_eot_token_id(other)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    template = read_chat_template(checkpoint.folder)
    if template is not None:
        writer.add_chat_template(template)


def _write_tensors(
    stream: BinaryIO, checkpoint: Checkpoint, tensors: list[GgufTensor], type: str, progress: Any
) -> None:
    written = 0
    _pad(stream)
    for tensor in tensors:
        dtype = torch.float32 if tensor.is_high else TYPES[type]
        for slot in tensor.parts:
            values = tensor.select(checkpoint.values(slot, dtype)).contiguous()
            stream.write(values.view(-1).view(torch.uint8).numpy().data)
            written += values.nbytes
            progress(written)
        _pad(stream)


def _pad(stream: BinaryIO) -> None:
    stream.write(b"\0" * (-stream.tell() % ALIGNMENT))


@contextmanager
def new_file(file: Path, size: int) -> Iterator[Path]:
    """A hidden file to fill, renamed to `file` on success and removed on any failure, an interrupt included."""
    if os.path.lexists(file):
        raise SoliError(f"{file}: is there already; choose a new name")
    partial = file.absolute().parent / f".{file.name}.partial-{os.getpid()}"
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        check_space(file, partial.parent, size)
        yield partial
        partial.rename(file)
    except OSError as error:
        raise SoliError(f"{file}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
