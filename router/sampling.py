"""Random workers from a seeded source: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). Pure, so that a run that is
repeated makes the same choices; nothing secret depends on it."""

from __future__ import annotations

from collections.abc import Sequence

MASK = 2**64 - 1


class Sampler:
    """Invariant: what comes next depends on the seed and the number of draws before only."""

    def __init__(self, seed: int) -> None:
        self._state = seed & MASK

    def below(self, end: int) -> int:
        """In [0, end). The bias is end / 2**64."""
        return self._next() % end

    def sample(self, items: Sequence[str], num: int) -> tuple[str, ...]:
        """Distinct ones, at most all of them. O(num), whatever the number of items."""
        num = min(num, len(items))
        moved: dict[int, int] = {}  # a shuffle that stops after num steps, and notes only what it has moved
        chosen = []
        for index in range(num):
            other = index + self.below(len(items) - index)
            chosen.append(items[moved.get(other, other)])
            moved[other] = moved.get(index, index)
        return tuple(chosen)

    def _next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & MASK
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
        return mixed ^ (mixed >> 31)
