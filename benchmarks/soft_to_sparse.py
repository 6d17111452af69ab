"""Time and activated parameters at each step of docs/from-soft-to-sparse.md, the textbook layer beside it.

`python benchmarks/soft_to_sparse.py` measures and writes results/soft_to_sparse.json; with `--write-doc` it measures
nothing and sets the document's table from that file. Forward passes in float32 on one thread. Every round times all
layers once, in a new order; reported are medians over rounds, of the time and of its ratio to the textbook's.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "soft_to_sparse.json"
DOCUMENT = HERE.parent / "docs" / "from-soft-to-sparse.md"
BEGIN, END = "<!-- table: benchmarks/soft_to_sparse.py --write-doc -->", "<!-- end of table -->"

sys.path[:0] = [str(HERE.parent / "examples"), str(HERE)]
import record  # noqa: E402
import soft_to_sparse as steps  # noqa: E402

# 32 linear experts of 384 x 384, or the same weights as 128 SwiGLU experts of width 32: 3 * 384 * 128 = 384 * 384.
WIDTH, EXPERTS, CHOSEN, EXPERT_WIDTH, CUT = 384, 32, 4, 128, 4
TOKENS, ROUNDS = 1024, 15


def build() -> dict[str, nn.Module]:
    """The layer of every step, at the measured size."""
    torch.manual_seed(0)
    textbook, shared = steps.Textbook(WIDTH, WIDTH, EXPERTS), nn.Linear(WIDTH, WIDTH)
    all_of_them = steps.SOFTMAX | {"num_experts_per_tok": EXPERTS}
    selected = {"num_experts_per_tok": CHOSEN}
    return {
        "0. textbook: every expert, summed": textbook,
        "1. Soli's dispatch, all by softmax": steps.Sparse(textbook, **all_of_them),
        "2. top 4 of 32": steps.Sparse(textbook, **(steps.TOP_2 | selected)),
        "3. sigmoid gates, normalised": steps.Sparse(textbook, **(steps.SIGMOID | selected)),
        "4. a shared expert": steps.WithShared(textbook, shared, **(steps.SIGMOID | selected)),
        "5. the balancing bias": steps.WithShared(textbook, shared, **(steps.BIASED | selected)),
        "6. Soli's MoE: 16 of 128 SwiGLU, 1/4 size": steps.fine_grained(WIDTH, EXPERTS, CHOSEN, EXPERT_WIDTH, CUT),
    }


@torch.inference_mode()
def measure(layers: dict[str, nn.Module], rounds: int) -> dict[str, list[float]]:
    """Seconds of each layer in each round, the order drawn anew each time; biases are balanced beforehand."""
    x_TD = torch.randn(TOKENS, WIDTH)
    for layer in layers.values():
        if isinstance(layer.gate, steps.Router) and layer.gate.e_score_correction_bias is not None:
            steps.balance(layer.gate, x_TD, steps=200)
    inputs = {name: x_TD[None] if isinstance(layer, steps.MoE) else x_TD for name, layer in layers.items()}
    contenders = {name: record.timed(partial(layer, inputs[name])) for name, layer in layers.items()}
    return record.interleaved(contenders, rounds)


def rows(layers: dict[str, nn.Module], seconds: dict[str, list[float]]) -> list[dict[str, object]]:
    base = seconds[next(iter(layers))]
    return [
        {
            "step": name,
            "parameters": steps.total(layer),
            "activated": steps.activated(layer),
            "microseconds_per_token": round(statistics.median(seconds[name]) / TOKENS * 1e6, 2),
            "time_ratio": round(statistics.median(s / b for s, b in zip(seconds[name], base, strict=True)), 4),
        }
        for name, layer in layers.items()
    ]


def table(results: dict) -> str:
    """The document's table, and the line under it that says where it was measured."""
    lines = [
        "| step | parameters | activated per token | time per token | time, textbook = 1 |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        micro, ratio = row["microseconds_per_token"], row["time_ratio"]
        lines.append(f"| {row['step']} | {row['parameters']:,} | {row['activated']:,} | {micro:.1f} µs | {ratio:.2f} |")
    size, machine = results["size"], results["hardware"]
    where = f"{machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}"
    when = f"{machine['date']}, commit {machine['commit'][:7]}"
    what = f"Input and output {size['width']} wide, {size['tokens']:,} tokens, float32, forward"
    lines += ["", *record.wrapped(f"{what}; {where}; {when}; medians of {size['rounds']} interleaved rounds.")]
    return "\n".join(lines)


def write_doc(results: dict) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    DOCUMENT.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write-doc", action="store_true", help="set the document's table from the recorded JSON")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    if args.write_doc:
        return write_doc(json.loads(RESULTS.read_text()))
    torch.set_num_threads(1)
    layers = build()
    size = {"width": WIDTH, "tokens": TOKENS, "rounds": args.rounds}
    results = {"hardware": record.hardware(), "size": size, "rows": rows(layers, measure(layers, args.rounds))}
    record.write("soft_to_sparse", results)
    print(table(results))


if __name__ == "__main__":
    main()
