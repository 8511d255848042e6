"""The link between a worker's device and its host memory under virtual time: how long a copy takes behind those before
it. Decides nothing about blocks."""

from __future__ import annotations

from collections.abc import Callable

from engine.events import Copied, CopyBlocks, CopyDirection, Event
from simulator.clock import Clock


class HostLink:
    """Each way has its own copy engine, which does one copy at a time. Invariant: `_free_at` is when each of them will
    have done what it was given."""

    def __init__(self, clock: Clock, nbytes_per_s: float, block_nbytes: int, post: Callable[[Event], None]) -> None:
        """nbytes_per_s: each way, whatever the other does."""
        self._clock = clock
        self._block_s = block_nbytes / nbytes_per_s
        self._post = post
        self._free_at = dict.fromkeys(CopyDirection, 0.0)

    def copy(self, copy: CopyBlocks) -> None:
        begins_at = max(self._clock.now, self._free_at[copy.direction])
        ends_at = begins_at + len(copy.to_block_ids) * self._block_s
        self._free_at[copy.direction] = ends_at
        self._clock.at(ends_at, self._post, Copied(copy.copy_id))
