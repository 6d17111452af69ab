"""What each weight format costs: size, error of the weights, bits per byte and chrF on held-out text, KL to bf16.

    python benchmarks/formats.py --data data/nano-zh-en

Converts the model (nano, or --model FOLDER) with `soli convert`'s own code, reads the folder's heldout_mono.tsv and
translates pairs of its heldout.tsv, and writes benchmarks/results/formats.json and the tables of docs/formats.md.

Every format is measured with its weights dequantized, in float32 arithmetic, on the same tokens: what differs is the
weights alone. Rows "in bf16" are measured as the model runs: weights as stored, bfloat16 tokens, this machine's
kernels. KL is the mean over tokens of KL(bf16 || format) in nats; "same choice" is the share of tokens where the
format's likeliest next token is that of bf16. The weights' error is root mean square, relative, over all quantized
ones.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import readme_table
import record
import torch
from torch import Tensor
from torch.nn.functional import pad

from soli.checkpoint import load_model
from soli.checkpoint.convert import convert_checkpoint
from soli.checkpoint.writer import Target
from soli.cli._shared.text_input import evenly, file_pairs, file_texts
from soli.data.tokenizer import Tokenizer
from soli.engine.text_model import TextModel, text_model
from soli.eval.scoring import document_parts
from soli.eval.translation import evaluate_direction

PAGE = record.ROOT / "docs" / "formats.md"
# Name in the tables, how it is written, whether it translates too (which takes most of the time).
FORMATS = (
    ("bf16", Target("bf16"), True),
    ("fp8", Target("fp8"), True),
    ("int8", Target("int8"), True),
    ("int8 --group 32", Target("int8", group=32), False),
    ("int4", Target("int4"), True),
    ("int4 --group 64", Target("int4", group=64), False),
    ("int4 --group 128", Target("int4", group=128), False),
    ("int4 --int8 self_attn", Target("int4", int8_modules=("self_attn",)), False),
    ("int4 --int8 self_attn --int8 shared_experts", Target("int4", int8_modules=("self_attn", "shared_experts")), True),
)
IN_BF16 = ", in bf16"
COMPUTED = tuple((f"{name}{IN_BF16}", Target(name), False) for name in ("bf16", "int8", "int4"))
BATCH = 16  # texts read together


@dataclass
class Contender:
    """A model in one format, and what was counted over the texts so far."""

    name: str
    bytes: int
    translates: bool
    text_model: TextModel
    nats: float = 0.0
    kl: float = 0.0
    same: int = 0
    chrf: dict[str, float] = field(default_factory=dict)


def build(model: str, folder: Path, formats: Sequence[tuple[str, Target, bool]] = FORMATS) -> list[Contender]:
    """The model in every format, the one that the others are compared with first."""
    contenders = []
    for number, (name, target, translates) in enumerate(formats):
        path = folder / str(number)
        convert_checkpoint(model, path, target)
        as_it_runs = name.endswith(IN_BF16)
        dtype = torch.bfloat16 if as_it_runs else torch.float32
        network = load_model(path, dtype=dtype, mtp=False, quantized=as_it_runs)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        contenders.append(Contender(name, size, translates, text_model(network, Tokenizer.from_folder(path), path)))
        record.progress(f"written as {name}")
    return contenders


def weight_error(exact: Contender, other: Contender) -> float:
    """Root mean square error over all weights that differ, relative to theirs."""
    quantized = other.text_model.model.state_dict()
    error = size = 0.0
    for name, values in exact.text_model.model.state_dict().items():
        squares = float((quantized[name] - values).double().square().sum())
        error += squares
        size += float(values.double().square().sum()) if squares else 0.0
    return (error / size) ** 0.5 if size else 0.0


def batches(text_model: TextModel, texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids (B, T), filled up with zeros, and which of the T - 1 predictions count, texts of like length together.

    As in `soli eval` every token of a text and its end counts, given the tokens that begin a document.
    """
    parts = sorted((part for text in texts for part in document_parts(text_model, text, end=True)), key=len)
    skip = (len(text_model.text_prefix) or 1) - 1
    for start in range(0, len(parts), BATCH):
        rows = [torch.tensor(part) for part in parts[start : start + BATCH]]
        width = max(len(row) for row in rows)
        at_T = torch.arange(width - 1)
        counts_BT = torch.stack([(at_T >= skip) & (at_T < len(row) - 1) for row in rows])
        yield torch.stack([pad(row, (0, width - len(row))) for row in rows]), counts_BT


@torch.no_grad()
def score(contenders: Sequence[Contender], texts: Sequence[str]) -> int:
    """Score the texts with every contender beside bf16, adding up its counts. Returns the number of tokens."""
    tokens = 0
    for ids_BT, counts_BT in batches(contenders[0].text_model, texts):
        exact_NV = None
        target_N1 = ids_BT[:, 1:][counts_BT][:, None]
        for contender in contenders:
            log_NV = contender.text_model.model(ids_BT)[:, :-1][counts_BT].float().log_softmax(dim=-1)
            exact_NV = log_NV if exact_NV is None else exact_NV
            contender.nats -= float(log_NV.gather(1, target_N1).double().sum())
            contender.kl += float((exact_NV.exp() * (exact_NV - log_NV)).sum(dim=1).double().sum())
            contender.same += int((log_NV.argmax(dim=1) == exact_NV.argmax(dim=1)).sum())
        tokens += len(target_N1)
        record.progress(f"{tokens:,} tokens scored")
    return tokens


def row(contender: Contender, exact: Contender, tokens: int, size: int) -> dict[str, Any]:
    """One line of the result: `size` is the texts' bytes."""
    bits = contender.nats / torch.log(torch.tensor(2.0)).item() / size
    return {
        "format": contender.name,
        "bytes": contender.bytes,
        "weight_error": None if IN_BF16 in contender.name else record.rounded(weight_error(exact, contender)),
        "bits_per_byte": round(bits, 5),
        "bits_per_byte_change": round(contender.nats / exact.nats - 1, 6),
        "kl": record.rounded(contender.kl / tokens),
        "same_choice": round(contender.same / tokens, 4),
        "chrf": {direction: round(score, 2) for direction, score in contender.chrf.items()},
    }


def tables(result: Mapping[str, Any]) -> str:
    """What stands between the markers of docs/formats.md."""
    size = result["size"]
    lines = [
        "| format | MB | weights' error | bits per byte | against bf16 | KL | same choice | chrF en-zh | zh-en |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for of in result["rows"]:
        chrf = [f"{of['chrf'][to]:.1f}" if to in of["chrf"] else "" for to in ("en-zh", "zh-en")]
        error = "" if of["weight_error"] is None else f"{of['weight_error']:.2%}"
        measures = (
            f"{of['bytes'] / 1e6:.1f}", error, f"{of['bits_per_byte']:.4f}",
            f"{of['bits_per_byte_change']:+.2%}", f"{of['kl']:.5f}", f"{of['same_choice']:.1%}", *chrf,
        )  # fmt: skip
        label = of["format"].replace("--wide", "--int8")  # old name
        lines.append(f"| `{label}` | {' | '.join(measures)} |")
    conditions = (
        f"{result['model']}: {size['tokens']:,} tokens of {size['texts']:,} held-out texts; {size['pairs']:,} held-out "
        "pairs each way, where a point of chrF is chance. Weights dequantized, float32 arithmetic, except in the last "
        "rows; "
        f"torch {result['hardware']['torch']}; {result['hardware']['date']}, "
        f"commit {result['hardware']['commit'][:7]}."
    )
    return "\n".join([*lines, "", *record.wrapped(conditions)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="folder in bf16, fp32 or FP8 (default the bundled model)")
    parser.add_argument("--data", type=Path, default=record.ROOT / "data" / "nano-zh-en", help="holds heldout*.tsv")
    parser.add_argument("--texts", type=int, default=300, help="held-out texts to read (default 300)")
    parser.add_argument("--pairs", type=int, default=150, help="pairs to translate each way (default 150)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = evenly(file_texts(str(arguments.data / "heldout_mono.tsv")), arguments.texts)
    pairs = evenly(file_pairs(str(arguments.data / "heldout.tsv")), arguments.pairs)
    with tempfile.TemporaryDirectory() as folder:
        contenders = build(arguments.model, Path(folder), (*FORMATS, *COMPUTED))
        tokens = score(contenders, texts)
        for contender in contenders:
            for to in ("zh", "en") if contender.translates and pairs else ():
                direction = "en-zh" if to == "zh" else "zh-en"
                contender.chrf[direction] = evaluate_direction(contender.text_model, pairs, to, 64).overall.chrf
            record.progress(f"{contender.name}: chrF {contender.chrf}")
        size = sum(len(text.encode()) for text in texts)
        rows = [row(contender, contenders[0], tokens, size) for contender in contenders]
    counts = {"texts": len(texts), "bytes": size, "tokens": tokens, "pairs": len(pairs)}
    name = Path(arguments.model).name
    result = {"hardware": record.hardware(), "model": name, "size": counts, "rows": rows}
    record.write("formats", result)
    text = tables(result)
    PAGE.write_text(readme_table.with_table(PAGE.read_text(encoding="utf-8"), text, PAGE), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
