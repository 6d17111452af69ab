"""A model with its tokenizer: prompts from texts, stop tokens, tokens as readable text.

Text from a person is always encoded as text: an added token spelled out in it stays text, unless the caller says that
the prompt was rendered elsewhere. Rejects prompts that leave
no position for an answer.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from soli.checkpoint import Checkpoint, open_checkpoint
from soli.checkpoint.load import load_checkpoint, model_folder
from soli.checkpoint.memory import Storage
from soli.checkpoint.writer import ProgressCallback
from soli.config import TOKEN_FIELDS, check_token_ids
from soli.data.tokenizer import Tokenizer
from soli.engine.beam_search import BeamSearchParams
from soli.engine.constraint import Constraints
from soli.engine.sampling_defaults import read_beam_search, read_sampling_defaults
from soli.errors import SoliError
from soli.experts.budget import MemoryBudget, default_memory
from soli.experts.load import least_bytes_of, load_within
from soli.experts.sources import sources_of
from soli.input_files import read_object_if_present
from soli.machine import available_memory
from soli.model.transformer import Transformer
from soli.parallel.ranks import Ranks, launched_ranks
from soli.quantities import scaled

if TYPE_CHECKING:
    from soli.parallel.calls import Leader

FLOAT32_LIMIT = 512 * 2**20  # bytes of weight files
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TextModel:
    """A loaded model and its tokenizer. `stop_ids` end a text; a prompt is a text between `text_prefix` and
    `text_suffix`. `budget`: of a model whose experts are read from disk as they are needed. `leader`: of one whose
    parts several ranks hold; `free_bytes`: what the weights leave of a rank's limit of memory, if it has one."""

    model: Transformer
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    text_prefix: tuple[int, ...]
    text_suffix: tuple[int, ...] = ()
    budget: MemoryBudget | None = None
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)  # of generation_config.json
    leader: "Leader | None" = None
    free_bytes: int | None = None
    generation_config: Path | None = None  # the folder's, which may be absent

    @property
    def positions(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self.model.config.max_position_embeddings

    @property
    def beam_search(self) -> BeamSearchParams | None:
        """The beam search that the folder's generation_config.json asks for, which `translate` uses; SoliError for a
        value out of its range."""
        return None if self.generation_config is None else read_beam_search(self.generation_config)

    def text_prompt(self, text: str, parse_special: bool = False) -> list[int]:
        """The tokens of `text` with those that the tokenizer's files put around it. `parse_special`: the names of added
        tokens in it are these tokens, and what it begins or ends with already is not put there again."""
        return self.text_prompts([text], parse_special)[0]

    def text_prompts(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        """`text_prompt` of many texts at once."""
        if parse_special:
            prompts = [self._with_affixes(self.tokenizer.encode_spelled(text)) for text in texts]
        else:
            prompts = [[*self.text_prefix, *ids, *self.text_suffix] for ids in self.tokenizer.encode_batch(texts)]
        if not all(prompts):
            raise SoliError("the prompt is empty and this model has no token that begins a text: give it some text")
        return prompts

    def _with_affixes(self, ids: list[int]) -> list[int]:
        """Tokens of a text with its affixes, but for those that it has."""
        prefix = () if ids[:1] == list(self.text_prefix[:1]) else self.text_prefix
        suffix = () if ids[-1:] == list(self.text_suffix[-1:]) else self.text_suffix
        return [*prefix, *ids, *suffix]

    def remaining_tokens(self, prompt: Sequence[int], where: str) -> int:
        """How many tokens may follow a prompt: at least 1, or a SoliError that names the limit and, by `where`, the
        prompt."""
        if len(prompt) >= self.positions:
            raise SoliError(
                f"{where} has {len(prompt)} tokens, but the model has {self.positions} positions for it and the answer "
                f"together: shorten it, or give it in parts"
            )
        return self.positions - len(prompt)

    def constraints(self) -> Constraints:
        """What opens constraints on its answers; a large vocabulary takes time and memory."""
        return Constraints(self.tokenizer, self.model.config.vocab_size, self.stop_ids)

    def label(self, token: int) -> str:
        """A token as text; bytes of an incomplete character as ⟨e4b8⟩."""
        text = self.tokenizer.token_text(token)
        if "\ufffd" not in text:
            return text
        escaped = self.tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")
        return re.sub(r"(?:\\x[0-9a-f]{2})+", lambda match: f"⟨{match[0].replace(chr(92) + 'x', '')}⟩", escaped)


def open_text_model(
    name_or_folder: str,
    device: str = "cpu",
    dtype: str = "auto",
    mtp: bool = False,
    progress: ProgressCallback = lambda read, total: None,
    memory: int | None = None,
) -> TextModel:
    """Loads a folder, or "nano", the bundled model; its MTP modules only when `mtp`.

    dtype "auto": float32 for weight files of up to 512 MB, so that rounding does not matter there; else that of the
    files, with FP8 weights dequantized where that fits in memory. "as-is": that of the files, and FP8 weights stay in
    their format, mapped from disk, even where they are larger than the memory. On a CPU weights that need no other
    dtype are used from the files where they are.

    `memory`: bytes that the model may take. Its weights are as stored then, and the routed experts that do not fit are
    read from disk as they are needed; an Engine divides the bytes (soli.experts.budget). None: all experts in memory,
    or where they do not fit as stored, what the machine has less a margin, with a warning that says so.

    Under torchrun every rank holds a part of the model, in `memory` bytes each. Only the first rank returns from here;
    the others compute with it until it ends, and then end the process.
    """
    ranks = launched_ranks()
    if ranks.world > 1:
        return _open_shared(name_or_folder, ranks, device, dtype, mtp, progress, memory)
    _check_dtype(dtype)
    check_device(device)
    checkpoint = open_checkpoint(name_or_folder, mtp)
    folder = checkpoint.folder
    if memory is None and device == "cpu" and dtype in ("auto", "as-is"):
        memory = _memory_for_paging(checkpoint)
    if memory is not None:
        if device != "cpu" or dtype not in ("auto", "as-is"):
            raise SoliError(
                f"with a limit of memory experts are computed on the CPU as they are stored, not on {device} in "
                f"{dtype}: leave out device and dtype, or the limit"
            )
        model, budget = load_within(name_or_folder, memory, mtp=mtp, progress=progress)
        return replace(text_model(model, Tokenizer.from_folder(folder), folder), budget=budget)
    dtype = _resolved_dtype(dtype, folder)
    quantized = True if dtype == "as-is" else None
    model = load_checkpoint(
        checkpoint,
        torch.device(device),
        DTYPES.get(dtype),
        quantized=quantized,
        in_place=True,
        progress=progress,
    )
    return text_model(model, Tokenizer.from_folder(folder), folder)


def _open_shared(
    name_or_folder: str,
    ranks: Ranks,
    device: str,
    dtype: str,
    mtp: bool,
    progress: ProgressCallback,
    memory: int | None,
) -> TextModel:
    from soli.parallel.inference import PartSettings, open_part, weight_bytes

    if device == "cuda":
        device = f"cuda:{ranks.local}"
        check_device(device)

    def choose_settings() -> PartSettings:
        _check_dtype(dtype)
        check_device(device)
        folder = model_folder(name_or_folder)
        resolved = "as-is" if memory is not None and dtype == "auto" else _resolved_dtype(dtype, folder)
        return PartSettings(DTYPES.get(resolved), True if resolved == "as-is" else None, mtp, memory)

    is_known = device == "cpu" or device.startswith("cuda:")
    place = torch.device(device if is_known else "cpu")  # an unknown one is an error of all ranks together
    model, leader = open_part(name_or_folder, ranks, place, choose_settings, progress)
    free_bytes = None if memory is None else memory - weight_bytes(model)
    folder = model_folder(name_or_folder)
    whole = text_model(model, Tokenizer.from_folder(folder), folder)
    return replace(whole, leader=leader, free_bytes=free_bytes)


def _check_dtype(dtype: str) -> None:
    if dtype not in ("auto", "as-is", *DTYPES):
        raise SoliError(f"dtype is {dtype!r}: choose auto, as-is, {' or '.join(DTYPES)}")


def _resolved_dtype(dtype: str, folder: Path) -> str:
    """The one of "auto" for small files."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return "float32" if dtype == "auto" and size <= FLOAT32_LIMIT else dtype


def _memory_for_paging(checkpoint: Checkpoint) -> int | None:
    """Bytes to use for a model whose experts do not fit in memory as they are stored; None for one that fits, and for
    one of which even the rest does not, which loading rejects."""
    stored = sum(Storage(checkpoint.natural_dtype, torch.device("cpu"), True, True).bytes_of(checkpoint))
    memory, margin = default_memory()
    if stored <= available_memory() or not checkpoint.config.n_routed_experts:
        return None
    try:
        sources = sources_of(checkpoint)
    except SoliError as error:
        raise SoliError(
            f"the model takes {scaled(stored, 'B')}, more than is available, and cannot be read from disk as it is "
            f"needed: {error}"
        ) from None
    if sum(least_bytes_of(checkpoint, sources)) > memory:
        return None
    warnings.warn(
        f"the model takes {scaled(stored, 'B')}, more than is available, so its experts are read from disk as they are "
        f"needed, with {scaled(memory, 'B')} of memory: what is available less {scaled(margin, 'B')}",
        stacklevel=3,
    )
    return memory


def check_device(name: str) -> None:
    """Rejects a device that cannot run a model here."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise SoliError(f"device is {name!r}: choose cpu or cuda")
    if name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise SoliError(f"device is {name!r}, but PyTorch sees {gpus} GPUs on this machine: use cpu")


def text_model(model: Transformer, tokenizer: Tokenizer, folder: Path | None = None) -> TextModel:
    """Joins a model and a tokenizer; stop tokens by config.json and the folder's generation_config.json, which also
    has the sampling defaults."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise SoliError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is {model.config.vocab_size}: "
            "they do not belong together"
        )
    stop_ids = check_token_ids("eos_token_id", model.config.eos_token_id, model.config.vocab_size)
    if folder is not None:
        stop_ids |= _generation_stop_ids(folder / "generation_config.json", model.config.vocab_size)
    prefix, suffix = tokenizer.text_affixes
    if any(not 0 <= token < model.config.vocab_size for token in (*prefix, *suffix)):
        raise SoliError(
            f"the tokenizer puts the tokens {[*prefix, *suffix]} around a text, but the model's vocab_size is "
            f"{model.config.vocab_size}: they do not belong together"
        )
    file = None if folder is None else folder / "generation_config.json"
    defaults = {} if file is None else read_sampling_defaults(file)
    return TextModel(
        model, tokenizer, stop_ids, prefix, suffix, sampling_defaults=defaults, generation_config=file
    )


def _generation_stop_ids(file: Path, vocab_size: int) -> frozenset[int]:
    """The eos ids of a generation_config.json, which may be absent; its other ids are checked as well."""
    document = read_object_if_present(file)
    try:
        ids = {name: check_token_ids(name, document.get(name), vocab_size) for name in TOKEN_FIELDS}
    except SoliError as error:
        raise SoliError(f"{file}: {error}") from None
    return ids["eos_token_id"]
