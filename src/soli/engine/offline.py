"""An engine on the caller's own thread: one answer as it comes, or the answers to many requests in their order.

Requests may be endless: at most a window of them is held. `limits_for` sizes the engine for the texts at hand.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

from soli.config import ModelConfig
from soli.engine.engine import Engine
from soli.engine.latent_cache import blocks_for, bytes_per_token
from soli.engine.request import Answer, EngineLimits, Event, Request, checked
from soli.engine.text_model import TextModel
from soli.errors import SoliError

CACHE_BYTES = 2**30  # the default's limit: only a single text of more than that takes more
PAGED_TOKENS_PER_STEP = 8192  # each expert is read once per step, so as long as memory allows
TOKENS_PER_STEP = 2048  # nobody waits for a token while a prompt is read, so steps are longer than a server's


def limits_for(
    text_model: TextModel,
    batch_size: int,
    longest: int | None = None,
    *,
    speculate: bool = False,
    beam_width: int = 1,
) -> EngineLimits:
    """Limits under which `batch_size` texts run together, each in so many beams, with a cache for all of them of
    `longest` tokens, prompt and answer (None: as many as the model has positions), or of a GiB where that is less and
    one text fits into it.

    Where memory is limited, beams take the places of texts: `batch_size` sequences run together, or one text's beams.
    A step has as many tokens as all texts at most, so that no memory is kept for longer ones. Prefixes are not shared,
    so that the bits of an answer do not depend on earlier requests.
    """
    model = text_model.model
    if text_model.budget is not None or text_model.free_bytes is not None:
        batch_size = max(1, batch_size // beam_width)
    return limits_of_texts(
        model.config,
        model.compute_dtype or model.embed_tokens.weight.dtype,
        batch_size,
        text_model.positions if longest is None else min(longest, text_model.positions),
        paged=text_model.budget is not None,
        speculate=speculate,
        beam_width=beam_width,
    )


def limits_of_texts(
    config: ModelConfig,
    dtype: torch.dtype,
    batch_size: int,
    tokens: int,
    *,
    paged: bool,
    speculate: bool = False,
    beam_width: int = 1,
) -> EngineLimits:
    """`limits_for` texts of `tokens` tokens by the configuration alone; `paged`: experts are read from disk."""
    block_size = EngineLimits().block_size
    tokens_per_step = PAGED_TOKENS_PER_STEP if paged else TOKENS_PER_STEP
    latent_bytes = bytes_per_token(config, config.num_hidden_layers + speculate, dtype)
    text_bytes = blocks_for(tokens, block_size) * block_size * latent_bytes * beam_width
    return EngineLimits(
        cache_bytes=max(text_bytes, min(batch_size * text_bytes, CACHE_BYTES)),
        max_running=batch_size * beam_width,
        tokens_per_step=max(min(tokens_per_step, batch_size * tokens), batch_size * beam_width),
        prefix_sharing=False,
        speculate=speculate,
    )


def stream(engine: Engine, request: Request) -> Iterator[Event]:
    """One answer's events as they come. An iterator that is closed before the end cancels the request; SoliError for a
    request that is rejected or fails."""
    request_id = engine.add(request)
    try:
        while True:
            for event in engine.step():
                if event.request_id == request_id:
                    yield checked(event)
                    if event.finish_reason is not None:
                        return
    finally:
        engine.cancel(request_id)


def answer_all(
    engine: Engine,
    requests: Iterable[Request | None],
    window: int | None = None,
    on_answer: Callable[[int], None] | None = None,
) -> Iterator[Answer | None]:
    """One answer per request, in order; None for None.

    A request is taken from `requests` when it can run, and while fewer than `window` answers (16 times the running
    requests by default) wait for an earlier one. `on_answer` is called with how many answers a step completed. The
    error of a request that is rejected or fails, or of `requests` itself, is raised after all earlier answers.
    """
    window = 16 * engine.limits.max_running if window is None else window
    source = iter(requests)
    # In the order of the requests: request id, request, events.
    pending: deque[tuple[int | None, Request | None, list[Event]]] = deque()
    running: dict[int, list[Event]] = {}  # by request id, the same lists
    slots: dict[int, int] = {}  # that each of them takes
    error: SoliError | None = None
    exhausted = False
    try:
        while True:
            while pending and pending[0][0] not in running:
                _, request, events = pending.popleft()
                yield None if request is None else Answer.from_events(request, events)
            while not exhausted and sum(slots.values()) < engine.limits.max_running and len(pending) < window:
                try:
                    request = next(source)
                    request_id = None if request is None else engine.add(request)
                    events = []
                    pending.append((request_id, request, events))
                    if request is not None and request_id is not None:
                        running[request_id] = events
                        slots[request_id] = request.sequences
                except StopIteration:
                    exhausted = True
                except SoliError as failure:
                    error, exhausted = failure, True
            if not pending:
                break
            before = len(running)
            for event in engine.step():
                if event.request_id in running:
                    running[event.request_id].append(event)
                    if event.finish_reason is not None:
                        del running[event.request_id], slots[event.request_id]
            if on_answer is not None and len(running) < before:
                on_answer(before - len(running))
    finally:
        for request_id in running:
            engine.cancel(request_id)
    if error is not None:
        raise error
