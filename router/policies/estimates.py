"""When the first token may be expected, if KV can come from another worker."""

from __future__ import annotations

from dataclasses import dataclass

from router.policies.base import PlacementView
from router.policy import Candidate


@dataclass(frozen=True, slots=True)
class Estimate:
    candidate: Candidate
    ttft_s: float
    num_pulled_tokens: int  # 0: everything that is not cached is computed

    @property
    def worker_id(self) -> str:
        return self.candidate.worker_id

    @property
    def load(self) -> int:
        """In tokens: settles ties, and decides while no worker's speed is known."""
        return self.candidate.num_pending_tokens - self.candidate.num_cached_tokens - self.num_pulled_tokens

    def __str__(self) -> str:
        pulled = f" and {self.num_pulled_tokens} pulled" if self.num_pulled_tokens else ""
        return f"TTFT {self.ttft_s:.2f} s with {self.candidate.num_cached_tokens} tokens cached{pulled}"


def estimate(view: PlacementView, candidate: Candidate, num_pullable_tokens: int, pull_s: float) -> Estimate:
    """The wait, then the quicker of two: compute all that is not cached, or pull num_pullable_tokens of it from another
    worker and compute the rest (Mooncake, FAST'25, section 6)."""
    if num_pullable_tokens > 0:
        rest_s = view.prefill_s(candidate.worker_id, candidate.num_cached_tokens + num_pullable_tokens)
        if pull_s + rest_s < candidate.prefill_s:
            ttft_s = view.backlog_s(candidate.worker_id, rest_s) + pull_s + rest_s
            return Estimate(candidate, ttft_s, num_pullable_tokens)
    return estimate_alone(candidate)


def estimate_with_holder(view: PlacementView, candidate: Candidate, holder: Candidate) -> Estimate:
    """Where what `holder` has cached can be pulled from it."""
    num_pullable_tokens = max(0, holder.num_cached_tokens - candidate.num_cached_tokens)
    return estimate(view, candidate, num_pullable_tokens, view.pull_s(candidate.worker_id, num_pullable_tokens))


def estimate_alone(candidate: Candidate) -> Estimate:
    """Where nothing is pulled."""
    return Estimate(candidate, candidate.ttft_s, 0)
