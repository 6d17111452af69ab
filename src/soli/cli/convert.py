"""`soli convert SRC DST --to bf16|fp8|fp32|int8|int4|gguf`: rewrite a model folder in another weight format."""

from typing import Annotated

import typer

from soli.cli._shared import options
from soli.errors import SoliError


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model folder in Hugging Face layout, or nano.")],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="New folder, or FILE.gguf; it appears when it is complete.")
    ],
    to: Annotated[
        str, typer.Option(help="bf16, fp32, fp8 (128x128 blocks), int8, int4; as-is with --pack; gguf for llama.cpp.")
    ],
    ue8m0: Annotated[bool, typer.Option("--ue8m0", help="Round FP8 scales up to powers of two.")] = False,
    group: Annotated[int | None, typer.Option(help="int8, int4: inputs that share a scale, 32, 64 or 128.")] = None,
    int8: Annotated[
        list[str] | None,
        typer.Option("--int8", "--wide", help="int4: 8 bits for weights of this name, such as self_attn; repeatable."),
    ] = None,
    gguf_type: Annotated[
        str, typer.Option(help="gguf: f32, bf16, or auto, which is f32 for weight files of up to 512 MB.")
    ] = "auto",
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
    """Rewrite a model folder as bf16, fp32, fp8, int8 or int4, tensor by tensor, MTP modules and tokenizer included; or
    as gguf, which llama.cpp runs, without MTP modules."""
    from soli.checkpoint.convert import convert_checkpoint
    from soli.checkpoint.gguf.convert import convert_to_gguf
    from soli.checkpoint.writer import Target
    from soli.cli._shared.console import print_json, stderr_console
    from soli.cli._shared.progress import ProgressBar

    options.use_threads(threads)
    if not shard_gb <= 1e6:  # nor NaN
        raise SoliError(f"--shard-gb is {shard_gb}; it must be a number of at most 1,000,000")
    if to == "gguf":
        if ue8m0 or group is not None or int8 or pack:
            raise SoliError("--ue8m0, --group, --int8 and --pack do not go with --to gguf, which writes f32 or bf16")
    elif gguf_type != "auto":
        raise SoliError(f"--gguf-type goes with --to gguf, not with --to {to}")
    elif to == "as-is" and not pack:
        raise SoliError("--to as-is changes nothing without --pack: give bf16, fp32, fp8, int8 or int4")
    no_target = to in ("as-is", "gguf")
    target = None if no_target else Target(to, ue8m0, int(shard_gb * 1e9), group, tuple(int8 or ()))
    with ProgressBar(f"writing {to}", unit="bytes") as bar:
        if to == "gguf":
            conversion = convert_to_gguf(source, destination, gguf_type, bar.update)
        else:
            conversion = convert_checkpoint(source, destination, target, bar.update, pack=pack)
    for note in conversion.notes:
        stderr_console().print(note, soft_wrap=True, markup=False)
    if as_json:
        result = {"folder": destination, "format": to, "ue8m0": ue8m0, "tensors": conversion.tensors}
        print_json(result | {"bytes_read": conversion.bytes_read, "bytes_written": conversion.bytes_written})
    else:
        sizes = f"{conversion.bytes_read / 1e6:,.1f} MB to {conversion.bytes_written / 1e6:,.1f} MB"
        form = "stored" if to == "as-is" else to
        print(f"{destination}: {conversion.tensors:,} tensors as {form}, {sizes}")
