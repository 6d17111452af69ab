"""Options that several verbs share, spelled once."""

from typing import Annotated

import typer

Temperature = Annotated[float, typer.Option(help="0 selects the most likely token; higher values sample more evenly.")]
TopK = Annotated[int, typer.Option(help="Sample from this many most likely tokens; 0 from all.")]
TopP = Annotated[
    float, typer.Option(help="Sample from the most likely tokens that hold this share of the probability; 1 from all.")
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Speculate = Annotated[
    bool, typer.Option("--speculate", help="Draft tokens with the model's MTP module; slower on the CPUs measured.")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Stop after this many tokens.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for programs.")]
Experts = Annotated[bool, typer.Option("--experts", help="Show which experts are selected, token by token.")]
Detail = Annotated[bool, typer.Option("--experts-detail", help="The same with every number, a line per expert.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one value of the recipe.")
]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, auto (float32 for small models) or as-is (FP8 stays in the file).")
]
