"""Policies that compare all workers for every request: what each of them has cached, and how much is before it. Their
work grows with the number of workers, and what they know must be kept in step with all of them."""

from __future__ import annotations

from dataclasses import dataclass

from router.policies.base import PlacementView
from router.policies.estimates import Estimate, estimate_alone, estimate_with_holder
from router.policy import Candidate, Choice


@dataclass(frozen=True, slots=True)
class Threshold:
    """The rule of SGLang's router: the longest match where it is more than min_match_share of the prompt and the pool
    is balanced, else the shortest queue. Unbalanced is where the most loaded worker has more than max_imbalance_tokens
    tokens and more than max_imbalance_ratio times what the least loaded one has; the original counts requests, whose
    work differs by orders of magnitude. O(workers)."""

    min_match_share: float
    max_imbalance_tokens: int
    max_imbalance_ratio: float

    def place(self, view: PlacementView) -> Choice:
        candidates = _all(view)
        light = min(candidates, key=_by_queue)
        heavy = max(candidates, key=_by_queue)
        if self._is_unbalanced(light.num_pending_tokens, heavy.num_pending_tokens):
            return Choice(light.worker_id, f"unbalanced, shortest queue: {light.num_pending_tokens} tokens pending")
        best = max(candidates, key=lambda c: (c.num_cached_tokens, -c.num_pending_tokens))
        cached = f"{best.num_cached_tokens} of {view.num_tokens} tokens cached"
        if best.num_cached_tokens > self.min_match_share * view.num_tokens:
            return Choice(best.worker_id, f"longest match: {cached}")
        return Choice(light.worker_id, f"shortest queue: {light.num_pending_tokens} tokens pending, at most {cached}")

    def _is_unbalanced(self, light: int, heavy: int) -> bool:
        return heavy - light > self.max_imbalance_tokens and heavy > self.max_imbalance_ratio * light


@dataclass(frozen=True, slots=True)
class MinTtft:
    """The least TTFT estimate of all workers; with pulls, whatever the worker with the longest match holds can be moved
    (Mooncake, FAST'25, section 6). O(workers)."""

    pulls: bool

    def place(self, view: PlacementView) -> Choice:
        return _least_ttft(view, _all(view), self.pulls)


@dataclass(frozen=True, slots=True)
class ExploitExplore:
    """Preble's rule (ICLR'25, section 3): the lightest of those with the longest match where that is min_match_share of
    the prompt or more, else the least TTFT estimate. O(workers)."""

    min_match_share: float
    pulls: bool

    def place(self, view: PlacementView) -> Choice:
        candidates = _all(view)
        best = max(candidates, key=lambda c: (c.num_cached_tokens, -c.ttft_s, -c.num_pending_tokens))
        # Without a link nothing can match, and a share of 0 would otherwise send all of it to one worker.
        if 0 < best.num_cached_tokens >= self.min_match_share * view.num_tokens:
            cached = f"{best.num_cached_tokens} of {view.num_tokens} tokens cached"
            return Choice(best.worker_id, f"exploit: {cached}")
        return _least_ttft(view, candidates, self.pulls)


@dataclass(frozen=True, slots=True)
class OverlapCost:
    """Dynamo's rule: the least overlap_weight * prefill_blocks + decode_blocks, where prefill_blocks are what is to be
    computed there with this request and decode_blocks what its requests hold. O(workers)."""

    overlap_weight: float
    block_size: int  # tokens

    def place(self, view: PlacementView) -> Choice:
        def cost(one: Candidate) -> float:
            num_tokens = one.num_pending_tokens + view.num_tokens - one.num_cached_tokens
            return self.overlap_weight * num_tokens / self.block_size + one.num_blocks - one.num_free_blocks

        best = min(_all(view), key=lambda c: (cost(c), c.num_pending_tokens))
        return Choice(best.worker_id, f"overlap: cost {cost(best):.1f} blocks, {best.num_cached_tokens} tokens cached")


def _all(view: PlacementView) -> list[Candidate]:
    return [view.candidate(worker_id) for worker_id in view.worker_ids()]


def _by_queue(candidate: Candidate) -> tuple[int, int]:
    return candidate.num_pending_tokens, candidate.num_requests


def _least_ttft(view: PlacementView, candidates: list[Candidate], pulls: bool) -> Choice:
    holder = max(candidates, key=lambda c: (c.num_cached_tokens, -c.num_pending_tokens))
    estimates = [estimate_with_holder(view, one, holder) if pulls else estimate_alone(one) for one in candidates]

    def order(one: Estimate) -> tuple[float, int]:
        return one.ttft_s, one.load

    best = min(estimates, key=order)
    sources = (holder.worker_id,) if best.num_pulled_tokens else ()
    return Choice(best.candidate.worker_id, f"least of {len(estimates)}: {best}", sources)
