"""`soli export RUN DST`: a Hugging Face model folder out of a training run's best checkpoint, with tokenizer and card.

`soli export FOLDER DST --tokenizer` writes the tokenizer alone, of a run or a model, as a tokenizer.json.
"""

from pathlib import Path
from typing import Annotated

import typer

from soli.cli._shared import options


def export(
    run: Annotated[
        str, typer.Argument(metavar="SRC", help="A run of soli train; with --tokenizer also a model, by folder or ID.")
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    format: Annotated[str, typer.Option(help="fp8 (128x128 blocks), bf16, fp32, int8 or int4.")] = "fp8",
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer", help="Write the tokenizer alone, as tokenizer.json, also a tiktoken.model.")
    ] = False,
    threads: options.Threads = None,
) -> None:
    """Make a model folder out of a training run, or write a model's tokenizer."""
    options.use_threads(threads)
    if tokenizer:
        from soli.checkpoint.convert import export_tokenizer
        from soli.cli.data import tokenizer_folder

        export_tokenizer(tokenizer_folder(run), dst)
        return
    from soli.train.checkpoints import export_run

    export_run(Path(run), dst, format)
