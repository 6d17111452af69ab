"""`soli export RUN DST`: a Hugging Face model folder, tokenizer included, out of a training run's best checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from soli.cli._shared import options


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run of soli train.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    format: Annotated[str, typer.Option(help="fp8 (128x128 blocks), bf16, fp32, int8 or int4.")] = "fp8",
    threads: options.Threads = None,
) -> None:
    """Make a model folder out of a training run."""
    from soli.checkpoint import save_model
    from soli.train.checkpoints import load_run

    options.use_threads(threads)
    save_model(load_run(run), dst, format=format, tokenizer_from=run)
