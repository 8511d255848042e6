"""Decode placement by the room that will be left at the worst moment, not by what is free now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.policy import Candidate, Choice, by_room


@dataclass(frozen=True, slots=True)
class PeakRoom:
    """The candidate with the most blocks left at its predicted peak, this request included (Past-Future, ASPLOS'25);
    among equals the one with the most room now. Needs num_peak_blocks of each: O(requests there) to predict."""

    def choose(self, num_tokens: int, candidates: Sequence[Candidate]) -> Choice:
        best = min(candidates, key=lambda c: (c.num_peak_blocks - c.num_blocks, by_room(c)))
        return Choice(
            best.worker_id,
            f"most room at its peak: {best.num_peak_blocks} of {best.num_blocks} blocks, {best.num_requests} requests"
            " there",
        )
