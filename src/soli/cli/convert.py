"""`soli convert SRC DST --to bf16|fp8|fp32|int8|int4`: rewrite a model folder in another weight format."""

from typing import Annotated

import typer

from soli.cli._shared import options
from soli.errors import SoliError


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model folder in Hugging Face layout, or nano.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="New folder; it appears when it is complete.")],
    to: Annotated[str, typer.Option(help="bf16, fp32, fp8 (128x128 blocks), int8, int4; as-is with --pack.")],
    ue8m0: Annotated[bool, typer.Option("--ue8m0", help="Round FP8 scales up to powers of two.")] = False,
    group: Annotated[int | None, typer.Option(help="int8, int4: inputs that share a scale, 32, 64 or 128.")] = None,
    int8: Annotated[
        list[str] | None,
        typer.Option("--int8", "--wide", help="int4: 8 bits for weights of this name, such as self_attn; repeatable."),
    ] = None,
    shard_gb: Annotated[float, typer.Option(help="Largest size of one file, in GB.")] = 5.0,
    pack: Annotated[
        bool,
        typer.Option(
            "--pack",
            help="Order the files for reading experts from disk (--memory), each in one piece with a checksum. Run "
            "again after an interruption, it continues. With --to as-is weights stay as they are.",
        ),
    ] = False,
    threads: options.Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Rewrite a model folder as bf16, fp32, fp8, int8 or int4, tensor by tensor, MTP modules and tokenizer included."""
    from soli.checkpoint.convert import convert_checkpoint
    from soli.checkpoint.writer import Target
    from soli.cli._shared.console import print_json, stderr_console
    from soli.cli._shared.progress import ProgressBar

    options.use_threads(threads)
    if not shard_gb <= 1e6:  # nor NaN
        raise SoliError(f"--shard-gb is {shard_gb}; it must be a number of at most 1,000,000")
    if to == "as-is" and not pack:
        raise SoliError("--to as-is changes nothing without --pack: give bf16, fp32, fp8, int8 or int4")
    target = None if to == "as-is" else Target(to, ue8m0, int(shard_gb * 1e9), group, tuple(int8 or ()))
    with ProgressBar(f"writing {to}", unit="bytes") as bar:
        conversion = convert_checkpoint(source, destination, target, bar.update, pack=pack)
    for note in conversion.notes:
        stderr_console().print(note, soft_wrap=True, markup=False)
    if as_json:
        result = {"folder": destination, "format": to, "ue8m0": ue8m0, "tensors": conversion.tensors}
        print_json(result | {"bytes_read": conversion.bytes_read, "bytes_written": conversion.bytes_written})
    else:
        sizes = f"{conversion.bytes_read / 1e6:,.1f} MB to {conversion.bytes_written / 1e6:,.1f} MB"
        print(f"{destination}: {conversion.tensors:,} tensors as {to}, {sizes}")
