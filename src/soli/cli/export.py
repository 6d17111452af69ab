"""`soli export RUN DST`: a Hugging Face model folder out of a training run's best checkpoint, with tokenizer and card.

`--average N` takes the mean of the N latest checkpoints instead.

`soli export FOLDER DST --tokenizer` writes the tokenizer alone, of a run or a model, as a tokenizer.json.
"""

from pathlib import Path
from typing import Annotated

import typer

from soli.cli._shared import options
from soli.errors import SoliError


def export(
    run: Annotated[
        str, typer.Argument(metavar="SRC", help="A run of soli train; with --tokenizer also a model, by folder or ID.")
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    format: Annotated[
        str, typer.Option("--to", "--format", help="fp8 (128x128 blocks), bf16, fp32, int8 or int4.")
    ] = "fp8",
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer", help="Write the tokenizer alone, as tokenizer.json, also a tiktoken.model.")
    ] = False,
    average: Annotated[
        int | None, typer.Option(min=1, help="The mean of so many of the run's latest checkpoints, not the best one.")
    ] = None,
    threads: options.Threads = None,
) -> None:
    """Make a model folder out of a training run, or write a model's tokenizer."""
    options.use_threads(threads)
    if tokenizer and average is not None:
        raise SoliError("--average is of weights, and --tokenizer writes none; leave one out")
    if tokenizer:
        from soli.checkpoint.convert import export_tokenizer
        from soli.cli.data import tokenizer_folder

        export_tokenizer(tokenizer_folder(run), dst)
        return
    from soli.train.checkpoints import export_run

    export_run(Path(run), dst, format, average)
