"""A run, built from a recipe: device and precision chosen, weights initialised, data opened, a checkpoint resumed.

The resolved recipe and the tokenizer are stored in the run's folder. A run is not resumed with another model, another
order of the data, or data that were rebuilt since it began, nor while another process trains it.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soli.analysis.parameters import count
from soli.atomic_file import replace_file
from soli.config import load_config
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.input_files import decode, read_lines, read_object
from soli.machine import memory_bytes
from soli.model.size import check_size
from soli.model.transformer import Transformer
from soli.parallel.ranks import ALONE, Ranks, join_ranks, launched_ranks
from soli.parallel.stages import find_schedule
from soli.train.batches import PackedTokens
from soli.train.checkpoints import load_checkpoint
from soli.train.cuda_graph import GraphedStep
from soli.train.evaluate import bytes_per_token
from soli.train.initial_weights import fill, open_initial_weights
from soli.train.model_options import apply_block_options, use_fp8
from soli.train.mtp_alone import freeze_all_but_mtp
from soli.train.optimizer import MOMENTS, Optimizer
from soli.train.run_folder import RunProgress, checkpoints
from soli.train.run_lock import RunLock, create_folder, lock_run
from soli.train.settings import TrainSettings, as_recipe
from soli.train.stages import Stage, build_stages, check_stage

if TYPE_CHECKING:
    from soli.parallel.pipeline import Pipeline

# What a resumed run may not change: the model's shape, and what the order of the data depends on.
FIXED = (("schedule", "sequence_length"), ("run", "seed"), ("optimizer", "name"), ("losses", "mtp_alone"))
ADDED = {("losses", "mtp_alone"): False}  # fields that runs of version 0.2 and before did not store, as they trained
PACKED = ("train_tokens", "tokenizer_sha256")  # in meta.json; they differ when the data do


@dataclass
class Run:
    """Everything a run needs, built once; `stage` is the one that `progress` is in."""

    folder: Path
    lock: RunLock | None  # of the first rank, held as long as this run exists
    settings: TrainSettings
    model: Transformer
    optimizer: Optimizer
    stages: tuple[Stage, ...]
    tokenizer: Tokenizer
    bytes_V: Tensor  # UTF-8 bytes that each token encodes
    sentences: list[tuple[str, str]]  # translated at each evaluation: text, target language
    progress: RunProgress = field(default_factory=RunProgress)
    cuda_graph: GraphedStep | None = None  # where run.cuda_graph asks for it
    ranks: Ranks = ALONE
    shares: Ranks = ALONE  # those that have other windows of a batch than this one: of its pipeline stage
    pipeline: "Pipeline | None" = None  # where parallel.pipeline is above 1

    @property
    def stage(self) -> Stage:
        return self.stages[self.progress.stage]

    def begin_next_stage(self) -> None:
        """Enter the next extension phase: data and positions restart; weights, biases and tokens continue.

        # differs: the paper does not say what becomes of AdamW's moments between its phases; here they are kept.
        """
        self.progress.stage += 1
        self.progress.stage_start = self.progress.tokens
        self.progress.position = 0
        self.progress.valid_loss = None
        self.progress.losses = []  # those of other windows say nothing about the next ones
        self.progress.norms = []
        self.model.reposition(self.stage.config)


def prepare(settings: TrainSettings, data: dict[str, Any], data_folder: Path, run_folder: Path) -> Run:
    """Build model, optimizer and data; resume from the run folder's latest checkpoint when there is one.

    `data` is the recipe's section of that name, stored with the run. SoliError when data, model and run do not fit.
    """
    ranks = launched_ranks()
    settings.parallel.require_world(ranks.world)
    device = choose_device(settings.run.device, ranks.local)
    compute = choose_precision(settings.run.precision, device)
    if settings.run.cuda_graph and (device.type != "cuda" or compute != torch.bfloat16):
        raise SoliError(
            f"run.cuda_graph is true, but it needs a GPU and bf16 or fp8, and this run has {device.type} and "
            f"{str(compute).removeprefix('torch.')}; use --set run.cuda_graph=false"
        )
    join_ranks(ranks, device)
    check_size(settings.model, device if ranks.world == 1 else torch.device("meta"), torch.float32)
    _check_memory(settings, device, ranks)
    tokenizer = _open_tokenizer(data_folder, settings)
    train_tokens, valid_tokens = PackedTokens(data_folder, "train"), PackedTokens(data_folder, "valid")
    _check_fim_rate(data, train_tokens)
    stages = build_stages(settings, train_tokens, valid_tokens)
    initial = None
    if settings.run.initial_weights is not None and not ranks.of_first(checkpoints(run_folder)):
        initial = open_initial_weights(
            settings.run.initial_weights, settings.model, tokenizer, new_mtp=settings.losses.mtp_alone
        )
    packed = {key: train_tokens.meta.get(key) for key in PACKED}
    lock = None
    if ranks.is_first:
        lock = lock_run(run_folder)
        create_folder(run_folder / "checkpoints")
        _store_recipe(run_folder, as_recipe(settings, data) | {"packed": packed})
        tokenizer.save(run_folder)
    model, shares, pipeline = _new_model(settings, device, compute, ranks)
    if initial is not None:
        fill(model, initial)
    run = Run(
        folder=run_folder,
        lock=lock,
        settings=settings,
        model=model,
        optimizer=Optimizer(model, settings.optimizer, compute, ranks, settings.parallel.replicate, pipeline),
        stages=stages,
        tokenizer=tokenizer,
        bytes_V=bytes_per_token(tokenizer, settings.model.vocab_size),
        sentences=read_sentences(data_folder / "heldout.tsv", settings.eval.samples),
        cuda_graph=GraphedStep(model, settings.balance.alpha, tokenizer.eos_id) if settings.run.cuda_graph else None,
        ranks=ranks,
        shares=shares,
        pipeline=pipeline,
    )
    saved = ranks.of_first(next(reversed(checkpoints(run_folder)), None))
    if saved is not None:
        run.progress = load_checkpoint(saved, model, run.optimizer, settings.losses.mtp_from_tokens > 0)
        check_stage(settings, stages, run.progress, load_config(saved))
        model.reposition(run.stage.config)
    return run


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`: a CUDA device, else the CPU; cuda: that of this process's number on its machine. SoliError when there is
    no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SoliError(f"run.device is {name!r}, which this machine lacks ({str(error).splitlines()[0]})") from None
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Dtype of activations. `auto`: bf16 where the hardware multiplies it natively, else fp32."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def read_sentences(file: Path, count: int) -> list[tuple[str, str]]:
    """Held-out sentences to translate at each evaluation: (text, target language), spread evenly over the file."""
    if count == 0 or not os.path.lexists(file):
        return []
    lines = [decode(line, f"{file}, line {number}") for number, line in read_lines(file)]
    rows = [line.rstrip("\r\n").split("\t") for line in lines]
    rows = [row for row in rows if len(row) == 3]
    spread = [rows[(2 * n + 1) * len(rows) // (2 * count)] for n in range(min(count, len(rows)))]
    return [(en, "zh") if n % 2 == 0 else (zh, "en") for n, (_, zh, en) in enumerate(spread)]


def _check_memory(settings: TrainSettings, device: torch.device, ranks: Ranks) -> None:
    """SoliError when weights, gradients and one moment of each, as Muon has, exceed this machine's memory: those of its
    own ranks."""
    moment_bytes = MOMENTS[settings.optimizer.moments].itemsize
    total = count(settings.model, mtp=True).total
    trained = total - count(settings.model).total if settings.losses.mtp_alone else total
    states = (4 * total + (4 + moment_bytes) * trained) * ranks.local_world // ranks.world
    if device.type == "cpu" and states > memory_bytes():
        raise SoliError(
            f"weights, gradients and moments of this recipe's model take at least {states:,} bytes, but this machine "
            f"has {memory_bytes():,} bytes of memory; see soli train --dry-run, and reduce the model"
        )


def _check_fim_rate(data: dict[str, Any], tokens: PackedTokens) -> None:
    """The rate took effect when the data were packed, so both must be equal; older data folders do not record it."""
    recipe_rate = data.get("fim_rate", 0.0)
    packed = tokens.meta.get("fim_rate")
    if packed is not None and packed != recipe_rate:
        raise SoliError(
            f"{tokens.file} was packed with fim_rate {packed}, but the recipe's data.fim_rate is {recipe_rate}; pack "
            f"the data again, or train with --set data.fim_rate={packed}"
        )


def _open_tokenizer(folder: Path, settings: TrainSettings) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > settings.model.vocab_size:
        raise SoliError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} entries, but model.vocab_size is "
            f"{settings.model.vocab_size}; use --set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _new_model(
    settings: TrainSettings, device: torch.device, compute: torch.dtype, ranks: Ranks
) -> tuple[Transformer, Ranks, "Pipeline | None"]:
    """fp32 parameters drawn from the run's seed, of several ranks each its shards; activations in `compute`. With the
    ranks that share a batch, and the pipeline, if any."""
    parallel = settings.parallel
    model = Transformer(settings.model, device="meta" if parallel.world > 1 else device, dtype=torch.float32)
    torch.manual_seed(settings.run.seed)
    generator = torch.Generator(device).manual_seed(settings.run.seed)
    if parallel.world == 1:
        model.init_weights(generator)
    model.compute_dtype = compute
    if settings.losses.mtp_alone:
        freeze_all_but_mtp(model)
    if settings.run.precision == "fp8":
        use_fp8(model, device)
    apply_block_options(model, settings.run)
    if parallel.world == 1:
        return model, ranks, None
    from soli.parallel.mesh import build_meshes
    from soli.parallel.sharding import init_shards, keep_gathered, shard_model

    sizes = parallel.data, parallel.expert, parallel.replicate
    meshes = build_meshes(*sizes, device.type, parallel.pipeline)
    if meshes.pipeline is None or meshes.shares is None:
        shard_model(model, meshes)
        init_shards(model, device, generator)
        return model, ranks, None
    from soli.parallel.pipeline import Pipeline

    parameters = dict(model.named_parameters())
    group, is_sharded = meshes.pipeline.get_group(), parallel.shares > 1
    pipeline = Pipeline(model, find_schedule(parallel.schedule), group, device, is_sharded)
    shard_model(model, meshes, pipeline.stages)
    if parallel.keep_gathered:
        for stage in pipeline.stages:
            keep_gathered(stage, is_last=True)  # torch's schedules add gradients after the last micro-batch
    init_shards(model, device, generator, parameters)
    shares = Ranks(meshes.shares.get_local_rank(), meshes.shares.size(), group=meshes.shares.get_group())
    return model, shares, pipeline


def _store_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Store the resolved recipe in the run's folder; SoliError where it would not continue the same run."""
    file = folder / "recipe.resolved.json"
    if not file.is_file() or not checkpoints(folder):
        replace_file(file, json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
        return
    before = read_object(file)
    now = json.loads(json.dumps(recipe))
    fixed = (*(("model", key) for key in now["model"]), *FIXED, *(("packed", key) for key in PACKED))
    for section, key in fixed:
        if not isinstance(before.get(section, {}), dict):
            raise SoliError(f"{file}: {section} must be an object; choose another --out, or restore the file")
        old = before.get(section, {}).get(key, ADDED.get((section, key)))
        new = now[section].get(key)
        if old != new and section in before:
            field = f"data whose {key}" if section == "packed" else f"{section}.{key}"
            raise SoliError(
                f"{folder} was started with {field} = {old!r}, not {new!r}; choose another --out to start a new run"
            )
