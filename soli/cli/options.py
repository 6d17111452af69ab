"""Options that several verbs share, spelled once."""

from typing import Annotated

import typer

Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; higher numbers take more chances.")]
TopK = Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 from all.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that hold this share of the probability.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Stop after this many tokens.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for programs.")]
Experts = Annotated[bool, typer.Option("--experts", help="Show which experts played, token by token.")]
Detail = Annotated[bool, typer.Option("--experts-detail", help="The same with every number, a line per expert.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, auto (float32 for small models) or as-is (FP8 stays in the file).")
]
