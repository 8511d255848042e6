"""Twinring's own policy: the two hashes say where a prefix's KV is kept, not where it must be computed."""

from __future__ import annotations

from dataclasses import dataclass

from router.policies.base import PlacementView
from router.policies.by_load import lightest
from router.policies.estimates import Estimate, estimate_alone, estimate_with_holder
from router.policy import Candidate, Choice

# A copy is not free where memory is plentiful: what it serves is spread over more workers from then on.
LEAST_REGRET = 0.04


@dataclass(frozen=True, slots=True)
class HomePair:
    """The least TTFT estimate among those that may hold its KV (the pair, where a prompt that this one continues was
    placed last, where the homes miss also those that earlier keys named) and num_sampled random workers, where a worker
    may pull what another holds; ties go to the pair.

    A copy takes memory from other prefixes: what a worker would hold although another one does already is charged with
    duplicate_cost times what computing it takes, times the share of evicted blocks that are asked for again. Needs to
    know 3 + num_sampled workers, a few more on a miss: O(1)."""

    num_sampled: int
    pulls: bool
    remembers: bool
    duplicate_cost: float

    def place(self, view: PlacementView) -> Choice:
        home = view.home_pair()
        if not home:
            return lightest(view)
        last = view.last_place() if self.remembers else None
        may_hold = dict.fromkeys((*home, *((last,) if last else ()), *view.earlier_homes()))
        holders = [view.candidate(worker_id) for worker_id in may_hold]
        sampled = [view.candidate(one) for one in view.sample(self.num_sampled) if one not in may_hold]
        return self._least(view, home, holders, sampled)

    def _least(
        self, view: PlacementView, home: tuple[str, ...], holders: list[Candidate], sampled: list[Candidate]
    ) -> Choice:
        holder = max(holders, key=lambda one: (one.num_cached_tokens, -one.num_pending_tokens))
        estimates = [
            estimate_with_holder(view, one, holder) if self.pulls else estimate_alone(one)
            for one in (*holders, *sampled)
        ]

        def order(one: Estimate) -> tuple[float, bool, int]:
            return one.ttft_s + self._duplicate_s(view, one.candidate, holder), one.worker_id not in home, one.load

        best = min(estimates, key=order)
        place = "home" if best.worker_id in home else "away from home"
        sources = tuple(dict.fromkeys((holder.worker_id, *home))) if best.num_pulled_tokens else ()
        return Choice(best.worker_id, f"{place}: {best}, the best of {len(estimates)}", sources)

    def _duplicate_s(self, view: PlacementView, candidate: Candidate, holder: Candidate) -> float:
        """What the second copy of what only `holder` has is charged with."""
        if not self.duplicate_cost or candidate.num_cached_tokens >= holder.num_cached_tokens:
            return 0.0
        computing_s = candidate.prefill_s - view.prefill_s(candidate.worker_id, holder.num_cached_tokens)
        return self.duplicate_cost * max(LEAST_REGRET, view.eviction_regret()) * computing_s
