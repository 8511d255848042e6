"""What a worker counts of its steps so that their costs can be fitted later (protos/cost_fit.py): sums of products, by
kind of step. Sums only rise, so those of any stretch of time are the difference between two reports.

A step is a point (x, y, s): s is what it took. Where it only prefills, x is its new tokens and y its token pairs, sum
n_i * (c_i + n_i / 2); where it only decodes, x is its sequences and y the KV tokens that they read. A step that does
both is counted apart and goes into no fit: its x and y would be four numbers.

Units are tokens and seconds: a float is as precise in one unit as in another, and the fit scales by itself. Sums of
tokens are exact up to 2 ** 53; after 10 ** 8 steps the others are off by 10 ** -8 of themselves at the very worst."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class StepKind(StrEnum):
    """Prefills in bins of x, named by their least, so that the floor of a step's cost can be told from its slope: fine
    where GPUs cross over, at 50 to 250 tokens."""

    DECODE = "decode"
    MIXED = "mixed"
    PREFILL_1 = "prefill_1"
    PREFILL_32 = "prefill_32"
    PREFILL_64 = "prefill_64"
    PREFILL_128 = "prefill_128"
    PREFILL_256 = "prefill_256"
    PREFILL_512 = "prefill_512"


PREFILL_KINDS = tuple(kind for kind in StepKind if kind.startswith("prefill"))
PREFILL_MINIMA = tuple(int(kind.removeprefix("prefill_")) for kind in PREFILL_KINDS)

# Products of two of (1, x, y, s): the upper triangle of a symmetric matrix, row by row.
TERMS = ("1", "x", "y", "s", "xx", "xy", "xs", "yy", "ys", "ss")

ROUNDING = 1e-9  # sums over several workers may be added in another order


def prefill_bin(num_tokens: float) -> int:
    """The index into PREFILL_KINDS of steps of so many tokens, at least one."""
    return bisect_right(PREFILL_MINIMA, num_tokens) - 1


@dataclass(frozen=True, slots=True)
class StepMoments:
    """Sums over the steps of one kind since the worker's life began, in the order of TERMS."""

    kind: StepKind
    sums: tuple[float, ...]


Life = tuple[str, str]  # worker id and incarnation


def added(moments: Iterable[StepMoments]) -> tuple[StepMoments, ...]:
    """One of each kind that there is, by name."""
    sums: dict[StepKind, tuple[float, ...]] = {}
    for each in moments:
        old = sums.get(each.kind)
        sums[each.kind] = each.sums if old is None else tuple(map(sum, zip(old, each.sums, strict=True)))
    return tuple(StepMoments(kind, sums[kind]) for kind in sorted(sums))


def between(before: Iterable[StepMoments], after: Iterable[StepMoments]) -> tuple[StepMoments, ...]:
    """What happened after `before`. ValueError where a sum has fallen: then they are not of one stretch of time."""
    old = {each.kind: each.sums for each in before}
    new = {each.kind: each.sums for each in after}
    differences = []
    for kind in sorted(old | new):
        none = (0.0,) * len(TERMS)
        pairs = list(zip(old.get(kind, none), new.get(kind, none), strict=True))
        if any(end < start * (1 - ROUNDING) for start, end in pairs):
            raise ValueError(f"sums of {kind} steps have fallen: the router was restarted between the two")
        differences.append(StepMoments(kind, tuple(max(0.0, end - start) for start, end in pairs)))
    return tuple(each for each in differences if each.sums[0] >= 1)


class AllStepMoments:
    """Of many workers. Invariant: no sum falls when a worker's life ends; what it told last stays counted."""

    def __init__(self) -> None:
        self._living: Mapping[Life, tuple[StepMoments, ...]] = {}
        self._ended: tuple[StepMoments, ...] = ()

    def of_all(self, reported: Mapping[Life, tuple[StepMoments, ...]]) -> tuple[StepMoments, ...]:
        """reported: what each that lives told last. A life that is gone does not come back."""
        for life in self._living.keys() - reported.keys():
            self._ended = added((*self._ended, *self._living[life]))
        self._living = reported
        return added((*self._ended, *(each for moments in reported.values() for each in moments)))
