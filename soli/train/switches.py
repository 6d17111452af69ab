"""Switches that trade time for memory and leave gradients equal: activation checkpointing of the blocks.

What is switched is how a block's forward runs, never what it is: parameters, their names and checkpoints stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from soli.model.transformer import Transformer
from soli.train.settings import RunSettings


def apply_switches(model: Transformer, settings: RunSettings) -> None:
    """Set the blocks of `model`, those of MTP modules included, to run as `run.*` says."""
    if settings.activation_checkpointing:
        for block in blocks(model):
            block.forward = _recomputed(block.forward)  # type: ignore[method-assign]


def blocks(model: Transformer) -> list[nn.Module]:
    """Every block, in the order of the forward pass; those of MTP modules last."""
    return [*model.layers, *(module.get_submodule("block") for module in model.mtp)]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, keeping its inputs alone for the backward pass, which runs it again.

    The caller has the routing of the first run, so counts know nothing of the second. Nothing in a block is random, so
    no random state is kept.
    """

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return run
