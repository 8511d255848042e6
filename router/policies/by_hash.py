"""Policies that place a prefix by one hash on one ring."""

from __future__ import annotations

from dataclasses import dataclass

from router.policies.base import PlacementView
from router.policies.by_load import lightest
from router.policy import Choice


@dataclass(frozen=True, slots=True)
class PrefixHash:
    """The owner of the hash of the first num_blocks blocks, whatever its load. Knows nothing of any worker: O(1)."""

    num_blocks: int

    def place(self, view: PlacementView) -> Choice:
        if not view.links:
            return lightest(view)
        depth = min(self.num_blocks, len(view.links))
        return Choice(next(view.ring(view.links[depth - 1])), f"hash of the first {depth} blocks")


@dataclass(frozen=True, slots=True)
class SingleRing:
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, SODA 2018), loads counted in tokens: the
    first worker clockwise with less pending than load_factor times the mean, this request counted in the mean. So none
    goes beyond that bound by more than one request. Needs the total and the workers that it passes: O(1) while the pool
    is balanced, O(workers) at worst."""

    load_factor: float

    def place(self, view: PlacementView) -> Choice:
        key = view.home_key()
        if key is None:
            return lightest(view)
        bound = self.load_factor * (view.num_pending_tokens() + view.num_tokens) / len(view.worker_ids())
        passed: set[str] = set()
        for worker_id in view.ring(key):
            num_pending_tokens = view.candidate(worker_id).num_pending_tokens
            if num_pending_tokens < bound:
                reason = f"ring: {num_pending_tokens} tokens pending, less than {bound:.0f}; {len(passed)} passed"
                return Choice(worker_id, reason)
            passed.add(worker_id)
        raise AssertionError("the lightest worker has no more than the mean")
