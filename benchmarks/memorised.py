"""What a model knows by heart: nats per token of translations that it was trained on, and of held-out ones, by source.

    python benchmarks/memorised.py DATA [--models nano FOLDER ...] [--sources tatoeba-gh ...] [--pairs 300]
        [--output NAME]

DATA is what `soli data build` wrote. Of each source so many pairs of pairs.tsv and of heldout.tsv are taken, from the
same seed for each model; a translation is scored after its text, in both directions, in the tokenizer's own tokens.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch

from soli.checkpoint import load_model
from soli.data.tokenizer import Tokenizer
from soli.model.transformer import Transformer
from soli.train.losses import token_nll

SOURCES = ["tatoeba-gh", "hsk-sentences", "distilled", "cataclysm-dda-data", "homeassistant-2026", "cc-cedict"]
LONGEST = 256  # tokens of a document

Pair = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=["nano"])
    parser.add_argument("--sources", nargs="+", default=SOURCES)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--output", help="name of the JSON in results/")
    arguments = parser.parse_args()
    files = {"trained on": arguments.data / "pairs.tsv", "held out": arguments.data / "heldout.tsv"}
    pairs = {name: read_pairs(file, arguments.sources, arguments.pairs) for name, file in files.items()}
    tokenizer = Tokenizer.from_folder(arguments.data)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        model = load_model(name, dtype=torch.float32)
        for source in arguments.sources:
            nats = {half: nats_per_token(model, tokenizer, of_source[source]) for half, of_source in pairs.items()}
            rows.append({"model": Path(name).name, "source": source, **{k: round(v, 3) for k, v in nats.items()}})
            print(rows[-1], flush=True)
    if arguments.output:
        size = {"pairs": arguments.pairs, "longest": LONGEST}
        record.write(arguments.output, {"hardware": record.hardware(), "size": size, "rows": rows})


def read_pairs(file: Path, sources: Sequence[str], count: int) -> dict[str, list[Pair]]:
    """Up to `count` (Chinese, English) of each source, drawn from a fixed seed."""
    of_source: dict[str, list[Pair]] = {source: [] for source in sources}
    for line in file.read_text(encoding="utf-8").splitlines():
        source, zh, en = line.split("\t")
        if source in of_source:
            of_source[source].append((zh, en))
    draw = random.Random(1)
    return {source: draw.sample(pairs, min(count, len(pairs))) for source, pairs in of_source.items()}


@torch.inference_mode()
def nats_per_token(model: Transformer, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> float:
    """Mean over the tokens of all translations, their ends included."""
    nats = tokens = 0.0
    for zh, en in pairs:
        for text, translation, to in ((en, zh, "zh"), (zh, en, "en")):
            prompt = tokenizer.translation_prompt(text, to)
            ids_1T = torch.tensor([[*prompt, *tokenizer.encode(translation), tokenizer.eos_id]])[:, :LONGEST]
            hidden_1TD = model.backbone(ids_1T[:, :-1]).hidden_BTD[:, len(prompt) - 1 :]
            of_tokens = token_nll(hidden_1TD, model.lm_head.weight, ids_1T[:, len(prompt) :])
            nats, tokens = nats + float(of_tokens.sum()), tokens + of_tokens.numel()
    return nats / tokens


if __name__ == "__main__":
    main()
