"""Held-out loss of the mean of a run's N latest checkpoints, by source of the text.

    python benchmarks/checkpoint_averages.py RUN DATA [--counts 1 2 5 10] [--sources everyday cc-cedict ...]
        [--model nano] [--output NAME]

RUN is a folder of `soli train`, DATA what `soli data build` wrote. The mean is that of `soli export RUN DST --average
N`, before it is rounded to a file's format. `--model` adds a model folder or the bundled model as a row. Loss is in
nats per token, over windows of the recipe's length.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from torch import Tensor

from soli.checkpoint import load_model
from soli.config import load_config
from soli.model.transformer import Transformer
from soli.train.batches import PackedTokens
from soli.train.checkpoints import load_weights
from soli.train.losses import token_nll
from soli.train.run_folder import latest_checkpoints, read_progress

LENGTH = 256  # tokens of a window
TOKENS = 65_536  # of a source, at most
BATCH = 8  # windows in one forward pass

Losses = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--sources", nargs="+", default=["everyday"])
    parser.add_argument("--model")
    parser.add_argument("--output", help="name of the JSON in results/")
    arguments = parser.parse_args()
    windows = {source: windows_of(PackedTokens(arguments.data, "valid"), source) for source in arguments.sources}
    rows: list[dict[str, Any]] = []

    def measure(what: Mapping[str, Any], model: Transformer) -> None:
        rows.append({**what, "nats_per_token": losses(model, windows)})
        print(rows[-1], flush=True)

    if arguments.model:
        measure({"model": arguments.model}, load_model(arguments.model, dtype=torch.float32))
    for count, tokens, model in means(arguments.run, arguments.counts):
        measure({"checkpoints": count, "from_tokens": tokens[0], "to_tokens": tokens[1]}, model)
    if arguments.output:
        size = {"run": arguments.run.name, "window": LENGTH}
        record.write(arguments.output, {"hardware": record.hardware(), "size": size, "rows": rows})


def means(run: Path, counts: Sequence[int]) -> Iterator[tuple[int, tuple[int, int], Transformer]]:
    """Each count with the tokens of the first and the last checkpoint and the model of their mean weights."""
    checkpoints = latest_checkpoints(run, max(counts))[::-1]
    latest = read_progress(checkpoints[0]).tokens
    sums: dict[str, Tensor] = {}
    for number, checkpoint in enumerate(checkpoints, 1):
        model = Transformer(load_config(checkpoint), dtype=torch.float32)
        load_weights(checkpoint, model)
        for name, tensor in model.state_dict().items():
            sums[name] = sums[name] + tensor if name in sums else tensor.clone()
        if number in counts:
            model.load_state_dict({name: tensor / number for name, tensor in sums.items()})
            yield number, (read_progress(checkpoint).tokens, latest), model


def windows_of(tokens: PackedTokens, source: str) -> Tensor:
    """Windows (BW) of one source's held-out text; the sources' texts follow each other in the file."""
    sources = tokens.meta["valid_sources"]
    names = list(sources)
    first = sum(sources[name]["tokens"] for name in names[: names.index(source)])
    count = (min(sources[source]["tokens"], TOKENS) - 1) // LENGTH
    return tokens.windows(first + np.arange(count) * LENGTH, LENGTH + 1)


@torch.no_grad()
def losses(model: Transformer, windows: Mapping[str, Tensor]) -> Losses:
    """Mean negative log likelihood of each source's tokens, in nats."""
    model.eval()
    by_source: Losses = {}
    for source, all_BW in windows.items():
        nats = [
            token_nll(model.backbone(part_BW[:, :-1]).hidden_BTD, model.lm_head.weight, part_BW[:, 1:]).double().sum()
            for part_BW in all_BW.split(BATCH)
        ]
        by_source[source] = round(float(sum(nats)) / (all_BW.shape[0] * LENGTH), 4)
    return by_source


if __name__ == "__main__":
    main()
