"""DualMap (ICLR 2026): affinity within the home pair until the SLO is threatened, then load."""

from __future__ import annotations

from dataclasses import dataclass

from router.policies.base import PlacementView
from router.policies.by_load import lightest
from router.policy import Candidate, Choice


@dataclass(frozen=True, slots=True)
class DualMap:
    """As published, section 4. The warm candidate is the one that lacks fewer tokens. It is taken while its TTFT
    estimate meets the SLO; else the candidate with the least estimate. Needs to know two workers: O(1).

    Without the SLO switch, which is its paper's ablation, the warm candidate is always taken."""

    ttft_slo_s: float
    has_slo_switch: bool = True

    def place(self, view: PlacementView) -> Choice:
        home = view.home_pair()
        if not home:
            return lightest(view)
        pair = [view.candidate(worker_id) for worker_id in home]
        warm = min(pair, key=lambda c: (-c.num_cached_tokens, c.num_pending_tokens, c.worker_id))
        cached = f"{warm.num_cached_tokens} of {view.num_tokens} tokens cached"
        if not self.has_slo_switch:
            return Choice(warm.worker_id, f"affinity: {cached}, whatever its load")
        if warm.ttft_s <= self.ttft_slo_s:
            return Choice(warm.worker_id, f"affinity: {cached}, TTFT {warm.ttft_s:.2f} s <= {self.ttft_slo_s:g} s")
        return self._by_load(pair, warm, cached)

    def _by_load(self, pair: list[Candidate], warm: Candidate, cached: str) -> Choice:
        light = min(pair, key=lambda c: (c.ttft_s, c.num_pending_tokens - c.num_cached_tokens, c.worker_id))
        if light.worker_id == warm.worker_id:
            return Choice(warm.worker_id, f"affinity: {cached}, TTFT {warm.ttft_s:.2f} s, and no candidate is lighter")
        return Choice(
            light.worker_id,
            f"load: TTFT {light.ttft_s:.2f} s, warm {warm.worker_id} {warm.ttft_s:.2f} s > {self.ttft_slo_s:g} s",
        )
