"""Who owns which page of the latent cache: owners counted, and whole pages kept for prompts that begin alike.

A page is free, owned (by one request, or by several that share a prefix), or kept: owned by nobody, its content still
known by its key and of use to the next prompt that begins with the same tokens. A page that is needed is taken from the
free ones first, then from the kept ones, the longest unused first. A key stands for all tokens from the first to the
page's last, so a page is found only behind the pages before it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class BlockManager:
    """`pages` pages. A page may be owned several times, and each owner releases it once."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._owners = [0] * pages
        self._keys: list[bytes | None] = [None] * pages
        self._known: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    @property
    def available(self) -> int:
        """Pages that `take` could give now."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        """Pages with an owner."""
        return self.pages - self.available

    def take(self) -> int | None:
        """A page of one's own, its content unknown; None when every page has an owner."""
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._owners[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page of this content, now owned once more; None when it is not there."""
        page = self._known.get(key)
        if page is not None:
            self._kept.pop(page, None)
            self._owners[page] += 1
        return page

    def known(self, keys: Sequence[bytes]) -> int:
        """How many of these pages, from the first on, could be found."""
        return next((at for at, key in enumerate(keys) if key not in self._known), len(keys))

    def kept(self, keys: Sequence[bytes]) -> int:
        """How many of these pages are there without an owner: owning them makes so many unavailable."""
        return sum(self._known.get(key) in self._kept for key in keys)

    def publish(self, page: int, key: bytes) -> None:
        """The page, full now, holds this content. Where another page already does, this one stays unknown."""
        if key not in self._known:
            self._known[key] = page
            self._keys[page] = key

    def release(self, page: int) -> None:
        """One owner less; a page without owners is kept if its content is known, else free."""
        if self._owners[page] < 1:
            raise ValueError(f"page {page} has no owner to release it")
        self._owners[page] -= 1
        if self._owners[page] == 0:
            if self._keys[page] is None:
                self._free.append(page)
            else:
                self._kept[page] = None

    def forget(self) -> None:
        """Nothing kept is of use any more; pages with owners stay theirs."""
        for page in self._kept:
            self._forget(page)
            self._free.append(page)
        self._kept.clear()
        for page in [*self._known.values()]:
            self._forget(page)

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        if key is not None:
            del self._known[key]
            self._keys[page] = None


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page that follows `parent` (the key of the page before it; b"" and whatever else the content depends
    on for the first) and holds these tokens. 256 bits of BLAKE2: two contents never meet by accident."""
    return hashlib.blake2b(parent + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=32).digest()
