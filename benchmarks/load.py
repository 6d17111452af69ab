"""Requests that arrive at random times, and when each of their tokens arrives.

Arrivals are Poisson: the gaps between them are exponential, drawn from a seed, so that every contender gets the same
ones. Times count from the moment a request was due, so waiting in a queue is part of its first token's time. Plain
Python: the Python that has vLLM imports this too.
"""

import itertools
import random
import time
from collections.abc import Callable, Sequence

Times = list[list[float]]  # per request, seconds from its arrival to each of its tokens


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests arrive, `rate` a second on average; the first at once."""
    draw = random.Random(seed)
    at, times = 0.0, []
    for _ in range(count):
        times.append(at)
        at += draw.expovariate(rate)
    return times


def drive(at: Sequence[float], new: int, add: Callable[[int], None], step: Callable[[], list[int]]) -> Times:
    """Run an engine step by step until every request has `new` tokens.

    `add(number)` hands it a request; `step()` makes one step and names, for each new token, its request.
    """
    times: Times = [[] for _ in at]
    start, added = time.perf_counter(), 0
    while any(len(one) < new for one in times):
        now = time.perf_counter() - start
        while added < len(at) and at[added] <= now:
            add(added)
            added += 1
        if all(len(one) >= new for one in times[:added]):
            time.sleep(max(0.0, at[added] - now))
            continue
        came = step()
        now = time.perf_counter() - start
        for number in came:
            times[number].append(now - at[number])
    return times


def figures(times: Times) -> dict[str, float]:
    """Milliseconds: to the first token, the median and the longest; between tokens, the median and 95 of 100."""
    first = sorted(1000 * one[0] for one in times)
    between = sorted(1000 * (later - one) for each in times for one, later in itertools.pairwise(each))
    return {
        "first, median": first[len(first) // 2],
        "first, longest": first[-1],
        "between, median": between[len(between) // 2],
        "between, 95 of 100": between[int(0.95 * (len(between) - 1))],
    }
