"""What goes along with weights: tokenizer, generation defaults, licence, model card; copied, or written anew.

The tokenizer that is written encodes in transformers as it does in Soli: transformers goes by tokenizer.json alone, so
what else decides in Soli, `tiktoken.model` and `add_bos_token`, is put into one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from soli.checkpoint.model_card import CARD, CardSource, read_source, render_card
from soli.config import ModelConfig
from soli.data import tiktoken_model
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.hub.cache import CONFIG, QUANTIZATION
from soli.input_files import TABLE_BYTES, read_object_if_present
from soli.links import matching_files

# Copied with the weights: tokenizer, generation defaults, model card, licence, code (which is never run).
SIDE_FILES: Final = (
    "*.json", "*.txt", "*.md", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
TOKENIZER_FILES: Final = (
    "tokenizer*", "tokenization*.py", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.tiktoken", "tiktoken.model", "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip

SideFiles = Mapping[str, Path | str]  # by name: a file to copy, or the text to write


def files_beside(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Files of `folder` by name that match `patterns`, without configurations and the index, which are rewritten.
    SoliError naming a symlink out of the folder, or a file that is too large for one of them."""
    matches = matching_files(folder, patterns).items()
    rewritten = (CONFIG, QUANTIZATION)  # what is written says in config.json how it is quantized
    files = {name: file for name, file in matches if name not in rewritten and not name.endswith(".index.json")}
    for name, file in files.items():
        size = file.stat().st_size
        if size > TABLE_BYTES:
            raise SoliError(f"{folder / name}: is {size:,} bytes long, but such a file has at most {TABLE_BYTES:,}")
    return files


def collect(
    folder: Path, patterns: Sequence[str], config: ModelConfig, format: str, source: CardSource | None = None
) -> tuple[SideFiles, list[str]]:
    """What to write beside weights that come from `folder`, or from another `source` with the tokenizer of `folder`,
    and notes for the user on what stays as it is."""
    files: dict[str, Path | str] = {**files_beside(folder, patterns)}
    notes = []
    try:
        files |= tokenizer_texts(folder)
    except SoliError as error:  # the weights are worth converting all the same
        notes.append(f"the tokenizer is copied as it is: {error}")
    try:
        files[CARD] = render_card(source or read_source(folder), config, format)
    except SoliError as error:
        notes.append(f"the model card is copied as it is: {error}")
    return files, notes


def tokenizer_texts(folder: Path) -> dict[str, str]:
    """The tokenizer files of `folder`, by name, that transformers would not read as Soli does, as they must be."""
    is_tiktoken = not (folder / "tokenizer.json").exists() and (folder / tiktoken_model.FILE).exists()
    if not is_tiktoken and not (folder / "tokenizer.json").exists():
        return {}
    tokenizer = Tokenizer.from_folder(folder)
    texts = {}
    if is_tiktoken or not tokenizer.has_template:
        texts["tokenizer.json"] = tokenizer.to_json_with_template()
    if is_tiktoken:
        config = read_object_if_present(folder / "tokenizer_config.json")
        config.pop("auto_map", None)  # code that reads tiktoken.model
        config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
        texts["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return texts
