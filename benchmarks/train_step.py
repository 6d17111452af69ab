"""Tokens per second of whole training steps at nano's shape: Soli beside transformers' DeepseekV3ForCausalLM.

Both start from the same weights and take the same windows of random tokens, without MTP: forward, next-token loss,
backward, clip, fused AdamW, bf16 arithmetic over float32 masters (transformers: under autocast). Soli also computes
the sequence balance loss and steps the router biases, as its recipe does, and runs once more with MTP. The first loss
of both must agree.

    python benchmarks/train_step.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import record
import torch

import soli
from soli.config import ModelConfig, load_config, preset, replace
from soli.model import Transformer

SEQUENCES, LENGTH, STEPS = 16, 256, 2
RATE, ALPHA, GAMMA, MTP_WEIGHT = 1e-3, 1e-4, 1e-3, 0.3
NO_EOS = -1
Step = Callable[[torch.Tensor], float]  # a window (B, W) to the next-token loss before the step


def config(mtp: int) -> ModelConfig:
    return replace(preset("nano"), {"num_nextn_predict_layers": mtp})


def soli_step(folder: Path, mtp: int) -> Step:
    from soli.train.balance import step_bias
    from soli.train.losses import compute_losses, count_targets
    from soli.train.optimizer import Optimizer
    from soli.train.settings import OptimizerSettings

    model = soli.load_model(folder, dtype=torch.float32, mtp=mtp > 0).train()
    model.compute_dtype = torch.bfloat16
    optimizer = Optimizer(model, OptimizerSettings(), torch.bfloat16)

    def step(window_BW: torch.Tensor) -> float:
        window_BW = window_BW[:, : LENGTH + 1 + mtp]
        losses = compute_losses(model, window_BW, count_targets(window_BW, mtp, NO_EOS), NO_EOS)
        losses.total(MTP_WEIGHT, ALPHA).backward()
        optimizer.step(RATE)
        step_bias(model, losses.counts_LE, GAMMA)
        return losses.next_token.item()

    return step


def peer_step(folder: Path, implementation: str) -> Step:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it lists the MTP module, which it does not load
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=implementation
    ).train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)

    def step(window_BW: torch.Tensor) -> float:
        target_BT = window_BW[:, 1 : LENGTH + 1].contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(window_BW[:, :LENGTH], labels=target_BT, shift_labels=target_BT, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return output.loss.item()

    return step


def build(folder: Path, name: str, clock: Callable[[], float] = time.process_time) -> Callable[[], tuple[float, float]]:
    """A contender, for `record.alone`: STEPS steps, as tokens per second and the first step's loss."""
    vocab = load_config(folder).vocab_size
    step = soli_step(folder, int("MTP" in name)) if name.startswith("soli") else peer_step(folder, name.split()[-1])
    generator = torch.Generator().manual_seed(0)

    def run() -> tuple[float, float]:
        windows = torch.randint(16, vocab, (STEPS, SEQUENCES, LENGTH + 2), generator=generator)
        start = clock()
        first, *_ = [step(window_BW) for window_BW in windows]
        return STEPS * SEQUENCES * LENGTH / (clock() - start), first

    return run


def save_folder(folder: Path) -> None:
    model = Transformer(config(mtp=1), dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    soli.save_model(model, folder, format="fp32")


def main() -> None:
    arguments = record.parser(__doc__, rounds=5).parse_args()
    peers = ("transformers eager", "transformers grouped_mm")
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as holder, ExitStack() as stack:
        folder = Path(holder) / "model"
        save_folder(folder)

        def contender(name: str) -> Callable[[], float]:
            ask = stack.enter_context(record.alone(build, folder, name))

            def speed() -> float:
                tokens_per_second, first = ask()
                losses.setdefault(name, first)
                return tokens_per_second

            return speed

        speeds = record.interleaved(
            {name: contender(name) for name in ("soli", "soli with MTP", *peers)}, arguments.rounds
        )
    if max(losses.values()) - min(losses.values()) > 0.02:
        sys.exit(f"the first losses differ, {losses}: nothing was recorded")
    what = f"training step, nano, bf16 over fp32 masters, {SEQUENCES} x {LENGTH} tokens"
    rows: list[dict[str, Any]] = [
        record.row(what, "tokens/s", speeds["soli"], {peer: speeds[peer] for peer in peers}),
        record.row(f"{what}, with MTP", "tokens/s", speeds["soli with MTP"]),
    ]
    size = {"sequences": SEQUENCES, "length": LENGTH, "steps_per_round": STEPS, "rounds": arguments.rounds}
    record.finish("train_step", size | {"first_loss": losses}, rows)


if __name__ == "__main__":
    main()
