"""Where the latest prompts were placed, so that a session's next turn finds the worker that its last one is queued or
running on, or has run on. Advisory, like prefix_index.py: of this router's own placements only, and not kept in step
with what workers evict."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_PROMPTS = 65_536  # remembered, some 100 bytes each


class LastPlaces(Generic[T]):
    """Invariant: at most `max_prompts`, by the last link of each, which stands for all of it; the oldest goes first."""

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._max_prompts = max_prompts
        self._places: OrderedDict[bytes, T] = OrderedDict()

    def note(self, links: Sequence[bytes], place: T) -> None:
        """O(1). A prompt without a full block leaves no trace."""
        if links:
            self._places[links[-1]] = place
            self._places.move_to_end(links[-1])
            if len(self._places) > self._max_prompts:
                self._places.popitem(last=False)

    def find(self, links: Sequence[bytes]) -> T | None:
        """Of the longest prompt that these links begin with. O(links), from the end: a next turn adds few."""
        return next((self._places[link] for link in reversed(links) if link in self._places), None)
