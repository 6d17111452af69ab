"""Which requests a step reads, and how many tokens of each: continuous batching over a bounded cache.

Requests run in the order of their arrival. A step reads one token of every request that is decoding, then parts of
prompts (chunked prefill) up to `tokens_per_step`, then lets in the next that wait, as long as there is a place and
their tokens fit into the pages that are left. Pages are taken as tokens need them; when none is left, the youngest
request gives its own back, goes to the head of the queue and is read again later (preemption by recomputation). The
oldest can always go on, so every request ends.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from soli.engine.blocks import BlockManager, block_key
from soli.engine.latent_cache import FEW, LatentCache, blocks_for
from soli.engine.request import EngineLimits, Request


@dataclass(eq=False)
class Task:
    """A request under way. `ids`: prompt and answer; the first `read` of them have their latents in the cache. `drafts`
    are guesses at what follows, read together with the last of `ids`."""

    number: int
    request: Request
    ids: list[int]
    drafts: list[int] = field(default_factory=list)
    read: int = 0
    cached: int = 0  # tokens of the prompt that the cache already held when the request first ran
    row: int = -1  # of the page tables, while it runs
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the whole pages of `ids`, as far as they were needed
    published: int = 0
    weights_version: int = 0  # of the weights that its latents are made with, or were when it began
    ran: bool = False

    @property
    def left(self) -> int:
        """Tokens to be read before the next can be drawn, drafts among them."""
        return len(self.ids) + len(self.drafts) - self.read


@dataclass(frozen=True)
class Read:
    """A part of a step: `count` tokens of a task from position `start` on, those of `ids` and then the drafts."""

    task: Task
    start: int
    count: int

    @property
    def tokens(self) -> list[int]:
        return (self.task.ids[self.start :] + self.task.drafts)[: self.count]

    @property
    def last(self) -> bool:
        """Whether nothing is left to read after it, so that tokens can be drawn."""
        return self.start + self.count == len(self.task.ids) + len(self.task.drafts)


class Scheduler:
    """Decides over `cache` and `pool`, which no one else may touch."""

    def __init__(self, cache: LatentCache, pool: BlockManager, limits: EngineLimits, drafting: bool = False) -> None:
        # What the MTP module keeps of a token depends on the token after it as well.
        self._beyond = int(drafting)
        self._weights_version = 0
        self.waiting: deque[Task] = deque()
        self.running: list[Task] = []  # the oldest first
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self._cache, self._pool, self._limits = cache, pool, limits
        self._rows = list(range(limits.max_running - 1, -1, -1))

    @property
    def places(self) -> int:
        """How many more could run beside those that do."""
        return len(self._rows)

    def forget_latents(self) -> None:
        """The model has changed: latents computed until now are of no use to requests that begin from now on."""
        self._weights_version += 1
        self._pool.forget()

    def plan(self) -> list[Read]:
        """What the next step reads, a few tokens of one task before many; [] when nothing runs. Whoever reads it tells
        `advance`."""
        counts: dict[Task, int] = {}
        budget = self._limits.tokens_per_step
        for chunks in (False, True):
            for task in [task for task in self.running if (task.left > FEW) == chunks]:
                count = _portion(task, budget)
                if task.row >= 0 and count and self._make_room(task, count, counts):
                    counts[task] = count
                    budget -= count
        while budget and self._admit():
            task = self.running[-1]
            count = _portion(task, budget)
            if not count or not self._make_room(task, count, counts):
                break
            counts[task] = count
            budget -= count
        reads = (Read(task, task.read, count) for task, count in counts.items())
        return sorted(reads, key=lambda read: read.count > FEW)

    def advance(self, task: Task, tokens: int) -> None:
        """So many more of the task's `ids` have their latents in the cache."""
        task.read += tokens

    def publish(self, task: Task) -> None:
        """Pages of the task that are full now can be found by later requests."""
        if self._limits.prefix_sharing:
            whole = min(task.read, len(task.ids) - self._beyond) // self._limits.block_size
            self._extend_keys(task, whole)
            for index in range(task.published, whole):
                self._pool.publish(task.pages[index], task.keys[index])
            task.published = max(task.published, whole)

    def remove(self, task: Task) -> None:
        """The request has ended: its place and its pages are free."""
        if task.row >= 0:
            self._stop(task)
        else:
            self.waiting.remove(task)

    def _admit(self) -> bool:
        """Lets in the first that waits, if there is a place and its tokens, and one more, would fit now."""
        if not self.waiting or not self._rows:
            return False
        task = self.waiting[0]
        if task.weights_version != self._weights_version:
            task.weights_version, task.keys = self._weights_version, []
        found = self._known_prefix(task)
        needed = blocks_for(len(task.ids) + len(task.drafts) + 1, self._limits.block_size) - len(found)
        if needed > self._pool.available - self._pool.kept(found):
            return False
        self.running.append(self.waiting.popleft())
        task.row = self._rows.pop()
        for key in found:
            page = self._pool.find(key)
            assert page is not None
            self._own(task, page)
        task.read = len(found) * self._limits.block_size
        task.published = len(found)
        if not task.ran:
            task.cached = task.read
            self.prefix_hit_tokens += task.read
        task.ran = True
        return True

    def _make_room(self, task: Task, count: int, counts: dict[Task, int]) -> bool:
        """Pages for the next `count` tokens; younger requests make room for them. False when the task itself had to."""
        for _ in range(blocks_for(task.read + count, self._limits.block_size) - len(task.pages)):
            page = self._pool.take()
            while page is None:
                youngest = self.running[-1]
                self._stop(youngest)
                self.waiting.appendleft(youngest)
                self.preemptions += 1
                counts.pop(youngest, None)
                if youngest is task:
                    return False
                page = self._pool.take()
            self._own(task, page)
        return True

    def _own(self, task: Task, page: int) -> None:
        self._cache.tables_RM[task.row, len(task.pages)] = page
        task.pages.append(page)

    def _stop(self, task: Task) -> None:
        self.running.remove(task)
        self._rows.append(task.row)
        for page in reversed(task.pages):  # the end of a text is of less use to others than its beginning
            self._pool.release(page)
        task.row, task.read, task.published, task.pages = -1, 0, 0, []

    def _known_prefix(self, task: Task) -> list[bytes]:
        """Keys of the whole pages that are in the cache and that the task need not read. The last token is always read,
        for its logits; of a request that wants a trace everything is."""
        if task.request.trace or not self._limits.prefix_sharing:
            return []
        whole = (len(task.ids) - 1) // self._limits.block_size
        self._extend_keys(task, whole)
        return task.keys[: self._pool.known(task.keys[:whole])]

    def _extend_keys(self, task: Task, pages: int) -> None:
        size = self._limits.block_size
        for index in range(len(task.keys), pages):
            parent = task.keys[index - 1] if index else _root(task)
            task.keys.append(block_key(parent, task.ids[index * size : (index + 1) * size + self._beyond]))


def _portion(task: Task, budget: int) -> int:
    """How many tokens of a task a step may read. The drafts and the last token before them are read together."""
    count = min(task.left, budget)
    cut = 0 < task.left - count <= len(task.drafts)
    return task.left - len(task.drafts) - 1 if cut else count


def _root(task: Task) -> bytes:
    """What the latents of a text depend on besides its tokens: the weights when it began, and the masked experts."""
    masked = np.asarray(sorted(task.request.masked_experts), dtype=np.int64)
    return task.weights_version.to_bytes(8) + masked.tobytes()
