"""Ranks that share a model for inference: what the first of them answers, and the answers of one process."""

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from soli.checkpoint.load import load_checkpoint, open_checkpoint
from soli.data.tokenizer import Tokenizer
from soli.engine.engine import Engine
from soli.engine.offline import answer_all
from soli.engine.request import Answer, EngineLimits, Request
from soli.engine.text_model import TextModel, text_model
from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.parallel.calls import Leader, follow
from soli.parallel.inference import PartSettings, join_group, load_part
from soli.parallel.ranks import launched_ranks

AS_STORED = PartSettings()
CPU = torch.device("cpu")
LARGE = {  # experts are nearly all of it
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "n_routed_experts": 128,
    "num_attention_heads": 4,
}
LIMITS = EngineLimits(cache_bytes=2**21, max_running=4, tokens_per_step=24, block_size=4)


@dataclass
class Case:
    """Requests for the model in a folder; the tokenizer is another folder's."""

    folder: str
    tokenizer: str
    requests: Sequence[Request]
    limits: EngineLimits = LIMITS
    settings: PartSettings = AS_STORED


def answers(
    model: Transformer, case: Case, leader: Leader | None = None, tokenizer: Tokenizer | None = None
) -> list[Answer]:
    tokenizer = tokenizer or Tokenizer.from_folder(Path(case.tokenizer))
    shared: TextModel = replace(text_model(model, tokenizer), leader=leader)
    engine = Engine(shared, case.limits)
    return [answer for answer in answer_all(engine, case.requests) if answer is not None]


def of_one_process(case: Case) -> list[Answer]:
    model = load_checkpoint(
        open_checkpoint(case.folder, case.settings.mtp),
        CPU,
        case.settings.dtype,
        quantized=case.settings.quantized,
    )
    return answers(model, case)


def of_ranks(cases: Sequence[Case]) -> list[list[Answer]]:
    """On the first rank the answers of all cases, one model after another; on the others nothing."""
    return each(cases, answers)


def each(cases: Sequence[Case], compute: Callable[[Transformer, Case, Leader], Any]) -> list[Any]:
    """`compute` of each case on the first rank, which the others follow."""
    ranks = launched_ranks()
    group = join_group(ranks, CPU)
    results = []
    for case in cases:
        model = load_part(case.folder, ranks, CPU, case.settings)
        if ranks.is_first:
            leader = Leader(model, ranks.world, group)
            results.append(compute(model, case, leader))
            leader.close()
        else:
            follow(model, CPU, group)
    dist.barrier()
    return results


def limited(cases: Sequence[Case], share: float) -> tuple[list[Any], float]:
    """`of_ranks` with address space for `share` of each model's weights beside what a rank has before; and the most
    memory that this rank took, as a share of the weights."""
    ranks = launched_ranks()
    group = join_group(ranks, CPU)
    [case] = cases
    tokenizer = Tokenizer.from_folder(Path(case.tokenizer))
    before = memory_of_this_process()
    weights = limit_memory(case.folder, share)
    model = load_part(case.folder, ranks, CPU, case.settings)
    results = []
    if ranks.is_first:
        leader = Leader(model, ranks.world, group)
        results = answers(model, case, leader, tokenizer)
        leader.close()
    else:
        follow(model, CPU, group)
    taken = memory_of_this_process()["VmHWM"] - before["VmRSS"]
    dist.barrier()
    return results, taken / weights


def load_limited(folder: str, share: float) -> str:
    """The error of one process that loads the model within that limit."""
    limit_memory(folder, share)
    try:
        load_checkpoint(open_checkpoint(folder), CPU)
    except SoliError as error:
        return str(error)
    return ""


def limit_memory(folder: str, share: float) -> int:
    """Let this process take no more address space than `share` of a model's weights, whose bytes are returned."""
    weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    limit = memory_of_this_process()["VmSize"] + int(share * weights)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return weights


def memory_of_this_process() -> dict[str, int]:
    """Bytes by the kernel's names: VmSize, VmRSS, VmHWM (the highest VmRSS)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Vm")}


def logits(model: Transformer, case: Case, leader: Leader | None = None) -> list[torch.Tensor]:
    """Of every token of the prompts, one prompt at a time, without a cache."""
    with torch.inference_mode():
        return [model(torch.tensor([request.prompt_ids]))[0].float() for request in case.requests]


def logits_of_ranks(cases: Sequence[Case]) -> list[list[torch.Tensor]]:
    return each(cases, logits)


def logits_of_one_process(case: Case) -> list[torch.Tensor]:
    return logits(load_checkpoint(open_checkpoint(case.folder), CPU, case.settings.dtype), case)
