"""How much work a queue holds, and how much of it is shorter than a given piece. Approximate by design: lengths are
told apart to a fifth. Knows no requests and no order."""

from __future__ import annotations

from math import ceil, log2

LEAST_S = 0.001  # shorter pieces are not told apart
PER_OCTAVE = 4  # classes of length: each is 19 % longer than the one before
NUM_CLASSES = 20 * PER_OCTAVE  # up to a quarter of an hour; longer ones are not told apart either


class WorkByLength:
    """Invariant: `total_us` is the sum over the classes, and each class that of its pieces, in whole microseconds:
    sums of integers do not drift. Every call is O(1)."""

    def __init__(self) -> None:
        self.total_us = 0
        self._classes_us = [0] * NUM_CLASSES

    @property
    def total_s(self) -> float:
        return self.total_us / 1e6

    def add(self, length_s: float) -> None:
        self._change(length_s, round(length_s * 1e6))

    def remove(self, length_s: float) -> None:
        self._change(length_s, -round(length_s * 1e6))

    def shorter_s(self, length_s: float) -> float:
        """Of those that are shorter than this, and half of those about as long, which may come before it or after."""
        place = _class_of(length_s)
        return (sum(self._classes_us[:place]) + self._classes_us[place] / 2) / 1e6

    def _change(self, length_s: float, amount_us: int) -> None:
        self.total_us += amount_us
        self._classes_us[_class_of(length_s)] += amount_us


def _class_of(length_s: float) -> int:
    if length_s <= LEAST_S:
        return 0
    return min(NUM_CLASSES - 1, ceil(PER_OCTAVE * log2(length_s / LEAST_S)))
