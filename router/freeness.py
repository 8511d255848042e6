"""How long each worker can go on decoding before its memory is full, as Llumnix reckons it (OSDI'24, section 4.4).

Freeness = (KV memory - virtual usage) / requests that decode, in tokens for each of them. A step adds one token to
each, so these are steps: the same unit on a large worker and on a small one. Virtual usage is what is in use, and

- all that a request needs which waits there: preempted, or its KV on the way. Llumnix counts the first that waits;
  here the router has placed few beyond what runs, and all of them will need their memory;
- head-room where a request of high priority decodes, once for all of them;
- infinite where the worker is to end: everything there has to move.

A worker that is short becomes less free than others, and what moves away makes room for what waits: a long request
need not find its memory in one piece by luck. Pure values and arithmetic; who moves is relief.py's to say."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """One request on the worker that decodes it, or will."""

    request_id: str
    num_blocks: int  # of KV that it needs there
    num_remaining_tokens: int  # that it is expected to add
    priority: int = 0
    may_move: bool = True  # it decodes, and no migration of it is under way


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """Invariant: what `requests` need comes on top of `num_other_blocks`."""

    worker_id: str
    num_blocks: int
    requests: tuple[DecodeLoad, ...] = ()
    num_other_blocks: int = 0  # in use for requests of other routers, or leased
    num_other_requests: int = 0
    num_migrations: int = 0  # under way, from here or to here
    block_nbytes: int = 0  # of one KV block, as it travels
    is_leaving: bool = False
    max_num_seqs: int = 0  # requests that run there at once; 0: nobody knows

    def room(self, headroom: float) -> Room:
        """headroom: the share of a worker's memory that requests of high priority keep free beside them."""
        return Room(
            num_blocks=-math.inf if self.is_leaving else self.num_blocks,
            num_used_blocks=self.num_other_blocks + sum(one.num_blocks for one in self.requests),
            num_requests=self.num_other_requests + len(self.requests),
            num_urgent=sum(one.priority > 0 for one in self.requests),
            num_reserved_blocks=headroom * self.num_blocks,
        )


@dataclass(frozen=True, slots=True)
class Room:
    """The sums that freeness is made of: to try a move is O(1)."""

    num_blocks: float  # infinitely few where the worker is to end
    num_used_blocks: int
    num_requests: int
    num_urgent: int  # of these, with a priority above 0
    num_reserved_blocks: float  # where there is any

    def freeness(self, block_size: int) -> float:
        """In steps; below 0 where more is needed than there is."""
        reserve = self.num_reserved_blocks if self.num_urgent else 0.0
        return (self.num_blocks - self.num_used_blocks - reserve) * block_size / max(1, self.num_requests)

    def beside(self, request: DecodeLoad) -> Room:
        return self._changed(request, 1)

    def without(self, request: DecodeLoad) -> Room:
        return self._changed(request, -1)

    def _changed(self, request: DecodeLoad, sign: int) -> Room:
        return replace(
            self,
            num_used_blocks=self.num_used_blocks + sign * request.num_blocks,
            num_requests=self.num_requests + sign,
            num_urgent=self.num_urgent + sign * (request.priority > 0),
        )
