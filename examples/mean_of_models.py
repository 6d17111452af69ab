"""The weighted mean of two models of one shape, each a folder with one float32 file, as `soli export --to fp32` writes.

    python examples/mean_of_models.py RUN4 RUN5 MEAN --share 0.3

MEAN gets 0.3 of RUN4's weights and 0.7 of RUN5's, and RUN5's other files. Two models that were trained from the same
weights on can be averaged; others cannot (Wortsman et al., 2022, arXiv 2203.05482).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("mean", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the first model, from 0 to 1")
    arguments = parser.parse_args()
    if not 0 <= arguments.share <= 1:
        sys.exit(f"--share {arguments.share} is no share: give a number from 0 to 1")
    if arguments.mean.exists():
        sys.exit(f"{arguments.mean} exists: choose another folder for the mean")
    try:
        first, second = (load_file(folder / FILE) for folder in (arguments.first, arguments.second))
    except (OSError, SafetensorError) as error:
        sys.exit(f"a model cannot be read ({error}): give folders that soli export --to fp32 wrote")
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in model.items()} for model in (first, second)]
    if shapes[0] != shapes[1] or {dtype for _, dtype in shapes[0].values()} != {torch.float32}:
        sys.exit("the two models differ in shape or are not float32: export both with --to fp32")
    shutil.copytree(arguments.second, arguments.mean, ignore=shutil.ignore_patterns(FILE))
    mean = {name: weighted_mean(first[name], second[name], arguments.share) for name in second}
    save_file(mean, arguments.mean / FILE, metadata={"format": "pt"})


def weighted_mean(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """share * first + (1 - share) * second, computed in float64."""
    return (share * first.double() + (1 - share) * second.double()).float()


if __name__ == "__main__":
    main()
