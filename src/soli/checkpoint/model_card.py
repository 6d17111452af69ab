"""README.md beside weights that Soli writes: where they come from, their licence and format, how to run them.

A card of the source stays as it is, front matter included, and gets a section at its end; converted once more, that
section is replaced.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soli import __version__
from soli.analysis.parameters import count
from soli.config import ModelConfig
from soli.input_files import read_text

CARD: Final = "README.md"
SECTION: Final = re.compile(r"\n*<!-- soli -->.*?<!-- /soli -->\n*", re.DOTALL)
FRONT_MATTER: Final = re.compile(r"---\n.*?\n---(\n|$)", re.DOTALL)
LICENCE: Final = re.compile(r"^license(?:_name)?:[ \t]*([^\s#][^\n#]*)", re.MULTILINE)
FORMATS: Final = {
    "fp32": "float32",
    "bf16": "bfloat16, router biases float32",
    "fp8": "FP8 E4M3 in blocks of 128x128 with `weight_scale_inv`; embedding, head, router and norms bfloat16",
    "int8": "8-bit integers of Soli's own, a float16 scale for each group of inputs",
    "int4": "4-bit integers of Soli's own, a float16 scale for each group of inputs",
    "as stored": "as in the source",
    "gguf-f32": "GGUF, float32",
    "gguf-bf16": "GGUF, bfloat16; norms and routers float32",
}


@dataclass(frozen=True)
class CardSource:
    """What a card says of where weights come from: the name, the text of the source's own card, the licence by its
    identifier, such as mit, and in words."""

    name: str
    card: str | None = None
    licence_id: str | None = None
    licence: str = "none stated; add that of the training data"


def read_source(folder: Path) -> CardSource:
    """The source that a folder is: its ID where it is in the hub's cache, else its name; SoliError for a card that is
    no UTF-8."""
    card = read_text(folder / CARD) if (folder / CARD).is_file() else None
    front = FRONT_MATTER.match(card) if card is not None else None
    stated = LICENCE.search(front[0]) if front else None
    files = sorted(file.name for file in folder.glob("LICENSE*"))
    if stated is not None:
        licence_id = stated[1].strip()
        return CardSource(_name(folder), card, licence_id, f"{licence_id}, by the source's card")
    return CardSource(_name(folder), card, None, f"see {files[0]}" if files else "the source states none")


def render_card(source: CardSource, config: ModelConfig, format: str, file: str = ".") -> str:
    """The content of README.md. `file`: what to give to the commands that run the model."""
    section = _section(source, config, format, file)
    if source.card is not None:
        return f"{SECTION.sub('', source.card).rstrip()}\n\n{section}"
    title = source.name.rpartition("/")[2]
    return f"---\nlibrary_name: soli\ntags: [{config.model_type}]\n---\n# {title}\n\n{section}"


def _section(source: CardSource, config: ModelConfig, format: str, file: str) -> str:
    counts = count(config)
    parameters = f"{counts.total / 1e6:,.1f} M parameters, {counts.activated / 1e6:,.1f} M activated"
    return f"""<!-- soli -->
## These files

Written by Soli {__version__}.

| | |
|---|---|
| source | {source.name} |
| licence | {source.licence} |
| format | {FORMATS[format]} |
| architecture | {config.model_type}, {parameters} |

{_how_to_run(format, file)}<!-- /soli -->
"""


def _how_to_run(format: str, file: str) -> str:
    if format.startswith("gguf"):
        return f"""```console
$ llama-cli --model {file}
```
"""
    commands = f"""```console
$ soli generate {file} "Once upon a time"
$ soli serve {file}
```
"""
    if format == "as stored":
        return commands
    if format not in ("bf16", "fp32", "fp8"):
        return f"{commands}\nNo other program reads this format; `soli convert --to bf16` writes one that they read.\n"
    return f"""{commands}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("{file}"), AutoModelForCausalLM.from_pretrained("{file}")
```
"""


def _name(folder: Path) -> str:
    """`ORG/NAME` of a snapshot in the hub's cache, the name of any other folder."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name or "a folder"
