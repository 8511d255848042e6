"""In which sizes a deterministic worker computes, and how a step is cut into them. Knows nothing of tensors: that a row
gets the same bits in each of these sizes, and in each place, is for determinism_check.py to find out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from engine.scheduler_output import ScheduledRequest

SPLIT = 128  # keys of one attention product; sums over a context are added up split by split, in their order
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # that may be tried; a product of 128 rows is about as fast per row as any


@dataclass(frozen=True, slots=True)
class FixedShapes:
    """Sizes, ascending, all of which give a row the same bits; what is between two of them is padded to the larger."""

    rows: tuple[int, ...]  # of one forward pass
    queries: tuple[int, ...]  # query vectors of one attention product
    digest: str  # of bits that this worker computes: workers with the same one compute alike

    @property
    def max_rows(self) -> int:
        return self.rows[-1]


def padded(size: int, sizes: Sequence[int]) -> int:
    """The smallest of the sizes that holds `size`; nothing stays nothing."""
    return sizes[bisect_left(sizes, size)] if size else 0


def tiles_of(scheduled: Sequence[ScheduledRequest], max_rows: int) -> Iterator[list[ScheduledRequest]]:
    """The step as steps of at most max_rows rows each, to be computed one after the other: a chunk may go over several,
    its tokens in order. Only the last piece of a chunk samples."""
    tile: list[ScheduledRequest] = []
    room = max_rows
    for request in scheduled:
        while request.num_scheduled_tokens > room:
            if room:
                tile.append(replace(request, num_scheduled_tokens=room, samples=False))
                request = _behind(request, room)
            yield tile
            tile, room = [], max_rows
        tile.append(request)
        room -= request.num_scheduled_tokens
    if tile:
        yield tile


def _behind(request: ScheduledRequest, num_tokens: int) -> ScheduledRequest:
    return replace(
        request,
        num_computed_tokens=request.num_computed_tokens + num_tokens,
        num_scheduled_tokens=request.num_scheduled_tokens - num_tokens,
    )
