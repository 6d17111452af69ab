"""Options that several verbs share, spelled once."""

import os
from pathlib import Path
from typing import Annotated

import typer

from soli.quantities import parse_bytes

MAX_THREADS = max(256, os.cpu_count() or 1)  # OpenMP ends the process when the system has no more

Temperature = Annotated[float, typer.Option(help="0 selects the most likely token; higher values sample more evenly.")]
TopK = Annotated[int, typer.Option(help="Sample from this many most likely tokens; 0 from all.")]
TopP = Annotated[
    float, typer.Option(help="Sample from the most likely tokens that hold this share of the probability; 1 from all.")
]
ChatTemplate = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A chat template (jinja2) in place of the model's own.")
]
ToolParser = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The form of tool calls: deepseek_v3, deepseek_v31, deepseek_v32, kimi_k2 or glm; by default the model's."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Speculate = Annotated[
    bool, typer.Option("--speculate", help="Draft tokens with the model's MTP module; slower on the CPUs measured.")
]
Beams = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Search with so many beams for the likeliest translation; 1 is greedy. "
        "By default num_beams of the model's generation_config.json, else 1.",
    ),
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(
        help="Rank translations by log-probability over length to this power; by default length_penalty of "
        "generation_config.json, else 1."
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Stop after this many tokens.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without a question.")]
Experts = Annotated[bool, typer.Option("--experts", help="Show which experts are selected, token by token.")]
Detail = Annotated[bool, typer.Option("--experts-detail", help="The same with every number, a line per expert.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one value of the recipe.")
]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, auto (float32 for small models) or as-is (FP8 stays in the file).")
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Take at most so much memory, as 16GB or 8GiB, and read experts that do not fit from disk as they are "
        "needed; by default all of a model is in memory, or where it does not fit what this machine has less a margin. "
        "Of several processes: each.",
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="Start so many processes on this machine, each with a part of the model; their number must divide its "
        "attention heads and its experts. torchrun -m soli does it on several machines.",
    ),
]
Forget = Annotated[
    bool,
    typer.Option(
        "--forget", help="Delete what earlier runs with --memory remembered of which experts this model uses most."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_THREADS, help="Threads that compute; by default as many as PyTorch takes."),
]


def memory_bytes(size: str | None) -> int | None:
    """--memory in bytes; None without it."""
    return None if size is None else parse_bytes(size, "--memory")


def forget_usage(model: str, forget: bool) -> None:
    """--forget, before a model is opened."""
    if forget:
        from soli.experts.load import usage_file_of

        usage_file_of(model).forget()


def use_threads(count: int | None) -> None:
    """Compute with so many threads in this process, torch's and the kernels'; None leaves PyTorch's number."""
    if count is not None:
        import torch

        torch.set_num_threads(count)


def is_on_command_line(ctx: typer.Context, name: str) -> bool:
    """Whether a parameter has its value from the command line, not by default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
