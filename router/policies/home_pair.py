"""Twinring's own policy: the two hashes say where a prefix's KV is kept, not where it must be computed."""

from __future__ import annotations

from dataclasses import dataclass

from router.policies.base import PlacementView
from router.policies.by_load import lightest
from router.policies.estimates import Estimate, estimate_alone, estimate_with_holder
from router.policy import Candidate, Choice


@dataclass(frozen=True, slots=True)
class HomePair:
    """The home that holds most, while its TTFT estimate is at most `affinity_s`: every copy of a prefix takes memory
    from another. Else the least estimate among the pair and num_sampled random workers, where a worker may pull what a
    home holds; ties go to the pair. Where the homes miss, those that earlier keys named are asked too. Needs to know
    2 + num_sampled workers, a few more on a miss: O(1)."""

    num_sampled: int
    pulls: bool
    affinity_s: float

    def place(self, view: PlacementView) -> Choice:
        home = view.home_pair()
        if not home:
            return lightest(view)
        holders = [view.candidate(worker_id) for worker_id in (*home, *(view.earlier_homes() if self.pulls else ()))]
        holder = max(holders, key=lambda c: (c.num_cached_tokens, -c.num_pending_tokens))
        if holder.ttft_s <= self.affinity_s and holder.num_cached_tokens:
            return Choice(holder.worker_id, f"affinity: {estimate_alone(holder)}, at most {self.affinity_s:g} s")
        return self._least(view, home, holders, holder)

    def _least(self, view: PlacementView, home: tuple[str, ...], holders: list[Candidate], holder: Candidate) -> Choice:
        known = {one.worker_id for one in holders}
        sampled = [view.candidate(one) for one in view.sample(self.num_sampled) if one not in known]
        estimates = [
            estimate_with_holder(view, one, holder) if self.pulls else estimate_alone(one)
            for one in (*holders, *sampled)
        ]

        def order(one: Estimate) -> tuple[float, bool, int]:
            return one.ttft_s, one.candidate.worker_id not in home, one.load

        best = min(estimates, key=order)
        chosen = best.candidate.worker_id
        place = "home" if chosen in home else "away from home"
        sources = tuple(dict.fromkeys((holder.worker_id, *home))) if best.num_pulled_tokens else ()
        return Choice(chosen, f"{place}: {best}, the least of {len(estimates)}", sources)
