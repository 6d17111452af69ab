"""What soli.LLM and its methods are called with: names of other engines, types, prompts in every form they come in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Final

import torch

from soli.arguments import Expected
from soli.checkpoint.writer import ProgressCallback
from soli.data.tokenizer import Tokenizer
from soli.engine.options import GenerationSettings
from soli.engine.request import EngineLimits
from soli.engine.text_model import TextModel, open_text_model, text_model
from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.quantities import parse_bytes
from soli.sections import shown

HINTS: Final[Mapping[str, str]] = {
    "max_model_len": "give limits=soli.engine.request.EngineLimits(cache_bytes=...)",
    "gpu_memory_utilization": "give limits=soli.engine.request.EngineLimits(cache_bytes=...)",
    "max_num_seqs": "give limits=soli.engine.request.EngineLimits(max_running=...)",
    "max_num_batched_tokens": "give limits=soli.engine.request.EngineLimits(tokens_per_step=...)",
    "enforce_eager": "give runner='eager'",
    "quantization": "the files say how weights are quantized; dtype='as-is' keeps FP8",
    "torch_dtype": "its name is dtype",
    "device_map": "its name is device",
    "revision": "soli pull ID --revision REVISION fetches it; give the folder",
    "tensor_parallel_size": "start the program with torchrun --nproc-per-node N",
    "trust_remote_code": "code of a model's folder is never run",
    **dict.fromkeys(("temperature", "max_tokens", "max_new_tokens"), "give it to generate"),
}
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {  # arguments of vLLM's class, with the values that change nothing
    "trust_remote_code": (False,),
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "enforce_eager": (False,),
    "quantization": (),
    "revision": (),
    "seed": (0,),
}

EXPECTED: Final[Expected] = {
    "device": ((str, torch.device), "cpu or cuda"),
    "dtype": ((str,), "auto, as-is, float32 or bfloat16, as text"),
    "limits": ((EngineLimits, NoneType), "a soli.engine.request.EngineLimits"),
    "tokenizer": ((Tokenizer, NoneType), "a soli.data.tokenizer.Tokenizer"),
    "progress": ((Callable,), "a function of two numbers"),  # type: ignore[dict-item]
}
CHAT_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {  # of vLLM's and OpenAI's chats
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    "reasoning_effort": (),
}


def check_one_answer(method: str, settings: GenerationSettings) -> None:
    if settings.n > 1:
        raise SoliError(f"n is {settings.n}, but {method} gives one answer: use generate")


def prompt_list(prompts: Any) -> Iterable[Any]:
    """Each prompt of one text, of one list of token ids, or of many of either."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or (isinstance(prompts, list | tuple) and prompts and type(prompts[0]) is int):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise SoliError(f"prompts is {shown(prompts)}: give a text, a list of texts, or lists of token ids")
    return prompts


def text_list(texts: str | Sequence[str]) -> list[str]:
    """One text or many as a list."""
    listed = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Iterable) else [texts]
    for text in listed:
        if not isinstance(text, str):
            raise SoliError(f"a text to translate is {shown(text)}: give text")
    return listed


def model_with_tokenizer(
    model: str | Path | Transformer,
    tokenizer: Tokenizer | None,
    device: str,
    dtype: str,
    mtp: bool,
    progress: ProgressCallback,
    memory: int | str | None,
) -> TextModel:
    size = None if memory is None else parse_bytes(memory, "memory")
    if isinstance(model, Transformer):
        if size is not None:
            raise SoliError("memory= is for a folder, whose experts can be read from disk; this model is in memory")
        if tokenizer is None:
            raise SoliError("a Transformer needs its tokenizer: give tokenizer=soli.data.tokenizer.Tokenizer")
        return text_model(model, tokenizer)
    if not isinstance(model, str | Path):
        raise SoliError(f"model is a {type(model).__name__}: give a folder, nano, or a soli.model.Transformer")
    if tokenizer is not None:
        raise SoliError("a folder has its own tokenizer: give tokenizer= with a Transformer alone")
    return open_text_model(str(model), device, dtype, mtp, progress, size)
