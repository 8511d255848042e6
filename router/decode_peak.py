"""How much KV the requests of a decode worker will need at the worst moment to come, from how long answers have been so
far (Past-Future, ASPLOS'25, section 4). Pure arithmetic: who decodes where, and how far, is handed in."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from typing import Protocol

DecodingRequest = tuple[int, int]  # tokens held now, tokens that it is expected to add


class Decoding(Protocol):
    """A request while it decodes, or will; its figures are those of now."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_generated_tokens(self) -> int: ...

    @property
    def num_remaining_tokens(self) -> int:
        """How many more it may generate."""


class OutputLengths:
    """The output lengths of the last `window` requests that ended by themselves.

    Invariant: `_sorted` holds what `_recent` holds."""

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self._window = window
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def note(self, num_output_tokens: int) -> None:
        self._recent.append(num_output_tokens)
        insort(self._sorted, num_output_tokens)
        if len(self._recent) > self._window:
            del self._sorted[bisect_right(self._sorted, self._recent.popleft()) - 1]

    def remaining(self, num_generated_tokens: int, max_remaining_tokens: int, quantile: float = 0.5) -> int:
        """What a request is expected to add: the quantile, in [0, 1), of those outputs that were longer than what it
        has. Where none was, it is taken to go on to its limit."""
        start = bisect_right(self._sorted, num_generated_tokens)
        num_longer = len(self._sorted) - start
        if num_longer == 0:
            return max_remaining_tokens
        length = self._sorted[start + int(quantile * num_longer)]
        return min(length - num_generated_tokens, max_remaining_tokens)


def peak_tokens(requests: Iterable[DecodingRequest]) -> int:
    """The most tokens held at once if each adds one token a step until it ends. The peak is as one of them
    ends: then those with as much or more to add are there, each longer by what that one had to add."""
    peak, num_held_tokens = 0, 0
    by_remaining = sorted(requests, key=lambda request: request[1], reverse=True)
    for num_alive, (num_tokens, num_remaining_tokens) in enumerate(by_remaining, start=1):
        num_held_tokens += num_tokens
        peak = max(peak, num_held_tokens + num_alive * num_remaining_tokens)
    return peak
