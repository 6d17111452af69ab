"""A run, built from a recipe: device and precision chosen, model drawn, data opened, an earlier checkpoint taken up.

The resolved recipe and the tokenizer are kept beside the run. A run is not resumed with another model, another order of
the data, or data that were built anew since it began.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soli.checkpoint.writer import write_json
from soli.config import load_config
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.train.batches import PackedTokens
from soli.train.checkpoints import RunProgress, checkpoints, load_checkpoint
from soli.train.cuda_graph import GraphedStep
from soli.train.evaluate import bytes_per_token
from soli.train.optimizer import Optimizer
from soli.train.precision import use_fp8
from soli.train.settings import TrainSettings, as_recipe
from soli.train.stages import Stage, build_stages, check_stage
from soli.train.switches import apply_switches

# What a resumed run may not change: the model's shape, and what the order of the data hangs on.
FIXED = (("schedule", "sequence_length"), ("run", "seed"), ("optimizer", "name"))
PACKED = ("train_tokens", "tokenizer_sha256")  # of meta.json: other values, other data


@dataclass
class Run:
    """Everything a run needs, built once; `stage` is the one that `progress` is in."""

    folder: Path
    settings: TrainSettings
    model: Transformer
    optimizer: Optimizer
    stages: tuple[Stage, ...]
    tokenizer: Tokenizer
    bytes_V: Tensor  # UTF-8 bytes that each token stands for
    sentences: list[tuple[str, str]]  # to translate now and then: text, target language
    progress: RunProgress = field(default_factory=RunProgress)
    graphed: GraphedStep | None = None  # where run.cuda_graph asks for it

    @property
    def stage(self) -> Stage:
        return self.stages[self.progress.stage]

    def begin_next_stage(self) -> None:
        """Enter the next extension phase: data and positions anew; weights, biases and tokens go on.

        # differs: the paper does not say what becomes of AdamW's moments between its phases; here they go on.
        """
        self.progress.stage += 1
        self.progress.stage_start, self.progress.position = self.progress.tokens, 0
        self.progress.valid_loss = None
        self.progress.losses, self.progress.norms = [], []  # of other windows: the guard begins anew
        self.model.reposition(self.stage.config)


def prepare(settings: TrainSettings, data: dict[str, Any], data_folder: Path, run_folder: Path) -> Run:
    """Build model, optimizer and data; resume from the run folder's latest checkpoint when there is one.

    `data` is the recipe's section of that name, kept for the record. SoliError when data, model and run do not fit.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SoliError("soli train runs on one device; start it without torchrun, or with WORLD_SIZE unset")
    device = choose_device(settings.run.device)
    compute = choose_precision(settings.run.precision, device)
    if settings.run.cuda_graph and (device.type != "cuda" or compute != torch.bfloat16):
        raise SoliError(
            f"run.cuda_graph is true, but it needs a GPU and bf16 or fp8, and this run has {device.type} and "
            f"{str(compute).removeprefix('torch.')}; use --set run.cuda_graph=false"
        )
    tokenizer = _open_tokenizer(data_folder, settings)
    train_tokens, valid_tokens = PackedTokens(data_folder, "train"), PackedTokens(data_folder, "valid")
    _check_fim_rate(data, train_tokens)
    stages = build_stages(settings, train_tokens, valid_tokens)
    packed = {key: train_tokens.meta.get(key) for key in PACKED}
    _settle_recipe(run_folder, as_recipe(settings, data) | {"packed": packed})
    tokenizer.save(run_folder)
    model = _draw_model(settings, device, compute)
    run = Run(
        folder=run_folder,
        settings=settings,
        model=model,
        optimizer=Optimizer(model, settings.optimizer, compute),
        stages=stages,
        tokenizer=tokenizer,
        bytes_V=bytes_per_token(tokenizer, settings.model.vocab_size),
        sentences=read_sentences(data_folder / "heldout.tsv", settings.eval.samples),
    )
    if settings.run.cuda_graph:
        run.graphed = GraphedStep(model, settings.balance.alpha, tokenizer.eos_id)
    found = checkpoints(run_folder)
    if found:
        run.progress = load_checkpoint(found[-1], model, run.optimizer)
        check_stage(settings, stages, run.progress, load_config(found[-1]))
        model.reposition(run.stage.config)
    return run


def choose_device(wanted: str) -> torch.device:
    """`auto`: the first CUDA device, else the CPU. SoliError when the device asked for is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SoliError(f"run.device is {wanted!r}, which this machine lacks ({str(error).splitlines()[0]})") from None
    return device


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """Dtype of activations. `auto`: bf16 where the hardware multiplies it natively, else fp32."""
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}[wanted]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def read_sentences(file: Path, count: int) -> list[tuple[str, str]]:
    """Held-out sentences to translate now and then: (text, target language), from all over the file."""
    if count == 0 or not file.is_file():
        return []
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row) == 3]
    picked = [rows[(2 * n + 1) * len(rows) // (2 * count)] for n in range(min(count, len(rows)))]
    return [(en, "zh") if n % 2 == 0 else (zh, "en") for n, (_, zh, en) in enumerate(picked)]


def _check_fim_rate(data: dict[str, Any], tokens: PackedTokens) -> None:
    """The recipe's rate took effect when the data were packed, so it must be theirs; older folders do not tell."""
    wanted, packed = data.get("fim_rate", 0.0), tokens.meta.get("fim_rate")
    if packed is not None and packed != wanted:
        raise SoliError(
            f"{tokens.file} was packed with fim_rate {packed}, but the recipe's data.fim_rate is {wanted}; pack the "
            f"data anew, or train with --set data.fim_rate={packed}"
        )


def _open_tokenizer(folder: Path, settings: TrainSettings) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > settings.model.vocab_size:
        raise SoliError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} entries, but model.vocab_size is "
            f"{settings.model.vocab_size}; use --set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _draw_model(settings: TrainSettings, device: torch.device, compute: torch.dtype) -> Transformer:
    """fp32 parameters drawn from the run's seed; activations in `compute`."""
    model = Transformer(settings.model, device=device, dtype=torch.float32)
    torch.manual_seed(settings.run.seed)
    model.init_weights(torch.Generator(device).manual_seed(settings.run.seed))
    model.compute_dtype = compute
    if settings.run.precision == "fp8":
        use_fp8(model)
    apply_switches(model, settings.run)
    return model


def _settle_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Keep the resolved recipe beside the run; refuse to go on with what would not be the same run."""
    file = folder / "recipe.resolved.json"
    if not file.is_file() or not checkpoints(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, recipe)
        return
    before, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(recipe))
    fixed = (*(("model", key) for key in now["model"]), *FIXED, *(("packed", key) for key in PACKED))
    for section, key in fixed:
        old, new = before.get(section, {}).get(key), now[section].get(key)
        if old != new and section in before:
            what = "data whose" if section == "packed" else f"{section}."
            raise SoliError(
                f"{folder} was begun with {what}{' ' if section == 'packed' else ''}{key} = {old!r}, not {new!r}; "
                "choose another --out to begin anew"
            )
