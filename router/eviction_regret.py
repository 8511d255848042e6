"""What it costs to hold KV twice: the memory of something else, and that matters only as far as it is asked for again.
Measured as the share of evicted blocks that are, while they are remembered (the ghost lists of ARC, Megiddo and Modha,
FAST'03, for another purpose; of many, a sample by hash as in SHARDS, Waldspurger et al., FAST'15). Knows links; not who
evicted them, nor what is done about it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MAX_GHOSTS = 131_072  # remembered; where workers hold more links, that share of them is looked at
HASH_SPACE = 1 << 32  # of a link's first four bytes
WINDOW = 8192  # evictions, after which what was counted before counts half
MIN_EVICTIONS = 256  # until so many, nothing is known and nothing is regretted


class EvictionRegret:
    """Invariant: `_ghosts` are the latest evicted links of the sample that have not been asked for since; there are at
    most as many as the sample's share of what is held."""

    def __init__(self, num_held: int) -> None:
        """num_held: links that all who evict hold together."""
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self.resize(num_held)
        self._num_evicted = 0.0
        self._num_regretted = 0.0

    @property
    def share(self) -> float:
        """Of what was evicted lately, in [0, 1]."""
        return self._num_regretted / self._num_evicted if self._num_evicted >= MIN_EVICTIONS else 0.0

    def resize(self, num_held: int) -> None:
        self._max_ghosts = min(num_held, MAX_GHOSTS)
        self._sampled_below = HASH_SPACE if num_held <= MAX_GHOSTS else HASH_SPACE * MAX_GHOSTS // num_held
        while len(self._ghosts) > self._max_ghosts:
            self._ghosts.popitem(last=False)

    def evicted(self, link: bytes) -> None:
        if not self._is_sampled(link):
            return
        self._ghosts[link] = None
        self._ghosts.move_to_end(link)
        if len(self._ghosts) > self._max_ghosts:
            self._ghosts.popitem(last=False)
        self._num_evicted += 1
        if self._num_evicted >= WINDOW:
            self._num_evicted /= 2
            self._num_regretted /= 2

    def missed(self, links: Sequence[bytes]) -> None:
        """These are not where they are asked for now."""
        for link in links:
            if link in self._ghosts:
                del self._ghosts[link]
                self._num_regretted = min(self._num_regretted + 1, self._num_evicted)

    def _is_sampled(self, link: bytes) -> bool:
        return int.from_bytes(link[:4], "big") < self._sampled_below
