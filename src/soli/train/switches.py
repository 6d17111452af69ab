"""Switches that trade time for memory, or compiling for speed, and leave gradients equal.

Activation checkpointing: the same bits. torch.compile: equal to float32 rounding; the routed experts, whose shapes
depend on the data, stay as they are. What is switched is how a block's forward runs, never what it is: parameters,
their names and checkpoints stay.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.train.settings import RunSettings

BACKEND = "inductor"


def apply_switches(model: Transformer, settings: RunSettings) -> None:
    """Set the blocks of `model`, those of MTP modules included, to run as `run.*` says.

    SoliError when they are to be compiled and there is no C++ compiler.
    """
    if settings.compile:
        _require_compiler()
        for _, mixture in model.moe_layers():
            mixture.experts.forward = torch.compiler.disable(mixture.experts.forward)  # type: ignore[method-assign]
    for block in blocks(model):
        if settings.compile:
            block.forward = _while_learning(torch.compile(block.forward, backend=BACKEND), block.forward)
        if settings.activation_checkpointing:
            block.forward = _while_learning(_recomputed(block.forward), block.forward)


def blocks(model: Transformer) -> list[nn.Module]:
    """Every block, in the order of the forward pass; those of MTP modules last."""
    return [*model.layers, *(module.get_submodule("block") for module in model.mtp)]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, keeping its inputs alone for the backward pass, which runs it again.

    The caller has the routing of the first run, so counts know nothing of the second. Nothing in a block is random, so
    no random state is kept.
    """
    return lambda *args: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)


def _while_learning(switched: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """`switched` where gradients are wanted, else `forward`: decoding meets too many shapes to compile."""
    return lambda *args: switched(*args) if torch.is_grad_enabled() else forward(*args)


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise SoliError(f"run.compile needs a C++ compiler, and there is no {compiler}; install one or name it in CXX")
