"""The router's guess at which prefix blocks one worker holds, made from its own placements. Advisory: the worker that
runs a request looks into its own cache, and nothing breaks where the guess is wrong."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence


def unheeded(link: bytes) -> None:
    """For an index whose evictions concern nobody."""


class PrefixIndex:
    """The block-hash links of one worker, least recently used first.

    Invariant: a link is held only together with all links before it in its chain, because a chain is touched from its
    tail to its head and so always loses its tail first. That is what makes bisection valid."""

    def __init__(self, max_links: int, on_evict: Callable[[bytes], None] = unheeded) -> None:
        self._max_links = max_links
        self._on_evict = on_evict
        self._links: OrderedDict[bytes, None] = OrderedDict()

    @property
    def max_links(self) -> int:
        return self._max_links

    def __len__(self) -> int:
        return len(self._links)

    def resize(self, max_links: int) -> None:
        self._max_links = max_links
        self._evict()

    def note(self, links: Sequence[bytes]) -> None:
        """The worker is about to compute this chain."""
        for link in reversed(links[: self._max_links]):
            self._links[link] = None
            self._links.move_to_end(link)
        self._evict()

    def num_matching(self, links: Sequence[bytes]) -> int:
        """How many links of this chain, from its head, the worker is thought to hold."""
        return bisect_left(links, True, key=lambda link: link not in self._links)

    def _evict(self) -> None:
        while len(self._links) > self._max_links:
            self._on_evict(self._links.popitem(last=False)[0])
