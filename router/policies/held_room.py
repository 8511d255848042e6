"""Decode placement that spares the links: by room, and by what a worker holds of the request already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.policy import Candidate, Choice, by_room


@dataclass(frozen=True, slots=True)
class HeldRoom:
    """The candidate with the most free blocks, those that it holds of this request counted as well: it is preferred
    while its room is worse by less than what need not move. One without room for the request comes last."""

    block_size: int  # tokens

    def choose(self, num_tokens: int, candidates: Sequence[Candidate]) -> Choice:
        best = min(candidates, key=lambda c: (self._is_full(c, num_tokens), -self._score(c), by_room(c)))
        return Choice(
            best.worker_id,
            f"most room and KV: {best.num_cached_tokens} of {num_tokens} tokens held, {best.num_free_blocks} of "
            f"{best.num_blocks} blocks free, {best.num_requests} requests there",
        )

    def _is_full(self, candidate: Candidate, num_tokens: int) -> bool:
        return candidate.num_free_blocks * self.block_size < num_tokens

    def _score(self, candidate: Candidate) -> int:
        return candidate.num_free_blocks + candidate.num_cached_tokens // self.block_size
