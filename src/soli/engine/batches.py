"""Many prompts through `generate`: batches of similar length, answers in the order of the questions.

Prompts are sorted by length so that a batch pads little; an answer is handed out as soon as every earlier one is done.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

from soli.engine.generate import Generation, generate
from soli.engine.sampler import GREEDY, SamplingParams
from soli.model.transformer import Transformer


def generate_many(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    batch_size: int = 32,
    sampling: SamplingParams = GREEDY,
    stop_ids: Collection[int] = (),
    trace: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[Generation]:
    """Yields one Generation per prompt, in order. Every prompt starts its own stream from the same seed.

    `on_batch` is told how many prompts each finished batch held, for a progress bar. Errors are those of `generate`.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    done: dict[int, Generation] = {}
    given = 0
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        generations = generate(
            model,
            [prompts[number] for number in batch],
            max_new_tokens=[limits[number] for number in batch],
            sampling=sampling,
            stop_ids=stop_ids,
            trace=trace,
        )
        done.update(zip(batch, generations, strict=True))
        if on_batch is not None:
            on_batch(len(batch))
        while given in done:
            yield done.pop(given)
            given += 1
