"""One measured run beside the prediction: a prompt, and tokens after it, through the engine with a limit of memory."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from soli.checkpoint.load import open_checkpoint
from soli.data.tokenizer import Tokenizer
from soli.engine.engine import Engine
from soli.engine.offline import limits_for, stream
from soli.engine.request import Request
from soli.engine.sampler import SamplingParams
from soli.engine.text_model import text_model
from soli.experts.load import load_within
from soli.experts.policy import ExpertUsage

NEW_TOKENS: Final = 64
SETTLING_TOKENS: Final = 32  # after the prompt, which took the place of experts that decoding uses more
WARM_UP_TOKENS: Final = 32  # decoded after a first prompt, so that the cache is as full as it will be
SECONDS: Final = 45.0  # after which no more tokens are decoded


@dataclass(frozen=True)
class Measurement:
    """`first_prompt_seconds`: of a prompt that finds no expert in memory. The others are of a warm cache. `hit_rate`:
    of the experts that decoded tokens chose, with those that had been read ahead. `disk_rate`: bytes per second of the
    time in which anything was being read while tokens were decoded; 0 where nothing was."""

    prompt_tokens: int
    new_tokens: int
    first_prompt_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    hit_rate: float
    disk_bytes_per_token: float
    disk_rate: float


def measure(
    folder: str | Path, memory: int, prompt: int, on_step: Callable[[str], None] = lambda step: None
) -> tuple[Measurement, ExpertUsage | None]:
    """Runs the model in `folder` with random prompts of `prompt` tokens, fewer where it has fewer positions; the
    figures, and which experts had been chosen before the tokens that are measured. SoliError as from `soli generate
    --memory`."""
    on_step("loading")
    model, budget = load_within(folder, memory, mtp=False)
    tokenizer = Tokenizer.from_folder(open_checkpoint(folder).folder)
    together = replace(text_model(model, tokenizer), budget=budget)
    answer = SETTLING_TOKENS + NEW_TOKENS
    prompt = min(prompt, together.positions - answer)
    engine = Engine(together, limits_for(together, 1, prompt + answer))
    store = budget.store
    try:
        on_step("a first prompt")
        first, _ = _run(engine, prompt, WARM_UP_TOKENS, seed=1)
        usage = None if store.holds_all else store.policy.usage()
        on_step("a prompt and its answer")
        marks: list[tuple[int, int, int, float]] = []

        def mark() -> None:
            reads = store.reader.stats
            marks.append((store.stats.hits, store.stats.misses, reads.bytes, reads.busy_seconds))

        seconds, gaps = _run(engine, prompt, answer, seed=2, on_token=mark)
        settled = min(SETTLING_TOKENS, len(gaps) // 2)
        gaps = gaps[settled:]
        hits, misses, read, busy = (last - begin for last, begin in zip(marks[-1], marks[settled], strict=True))
        measurement = Measurement(
            prompt_tokens=prompt,
            new_tokens=len(gaps),
            first_prompt_seconds=first,
            prefill_tokens_per_second=prompt / seconds,
            decode_tokens_per_second=len(gaps) / sum(gaps),
            hit_rate=hits / max(1, hits + misses),
            disk_bytes_per_token=read / len(gaps),
            disk_rate=read / busy if busy else 0.0,
        )
        return measurement, usage
    finally:
        store.close()


def _run(
    engine: Engine, prompt: int, new_tokens: int, seed: int, on_token: Callable[[], None] = lambda: None
) -> tuple[float, list[float]]:
    """Seconds until the first token, and between tokens after it; random tokens, sampled at temperature 1."""
    vocab_size = engine.text_model.model.config.vocab_size
    generator = random.Random(seed)
    ids = tuple(generator.randrange(vocab_size) for _ in range(prompt))
    request = Request(ids, new_tokens, SamplingParams(temperature=1.0, seed=seed), stop_ids=frozenset())
    start = time.perf_counter()
    times: list[float] = []
    for event in stream(engine, request):
        if event.token is None:
            continue
        times.append(time.perf_counter())
        on_token()
        if times[-1] - times[0] > SECONDS and len(times) > 2:
            break
    return times[0] - start, [later - earlier for earlier, later in pairwise(times)]
