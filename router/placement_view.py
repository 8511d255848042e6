"""What a placement policy may ask about the cluster, for one request. Answers from the view; decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from router.cluster_view import Answer, ClusterView
from router.config import RouterConfig
from router.policy import Candidate
from router.sampling import Sampler


class RequestView:
    """Invariant: what it has answered about a worker stays the same: a request is placed in one go."""

    def __init__(
        self, config: RouterConfig, view: ClusterView, sampler: Sampler, links: Sequence[bytes], num_tokens: int
    ) -> None:
        self.links = links
        self.num_tokens = num_tokens
        self._hash_block_size = config.hash_block_size
        self._view = view
        self._sampler = sampler
        self._candidates: dict[str, Candidate] = {}
        self._home: tuple[str, ...] | None = None

    def worker_ids(self) -> Sequence[str]:
        return self._view.prefill_worker_ids

    def candidate(self, worker_id: str) -> Candidate:
        found = self._candidates.get(worker_id)
        if found is None:
            found = self._view.candidate(self._view.workers[worker_id], self.links, self.num_tokens)
            self._candidates[worker_id] = found
        return found

    def lightest(self) -> str:
        return self._view.prefill_workers()[0].worker_id

    def num_pending_tokens(self) -> int:
        return self._view.num_pending_tokens

    def sample(self, num: int) -> Sequence[str]:
        return self._sampler.sample(self._view.prefill_worker_ids, num)

    def home_key(self) -> bytes | None:
        return self._view.home_key(self.links)

    def home_pair(self) -> tuple[str, ...]:
        if self._home is None:
            self._home = self._view.home_worker_ids(self.links)
        return self._home

    def earlier_homes(self) -> Sequence[str]:
        home = self.home_pair()
        num_key_tokens = self._view.key_depth(self.links) * self._hash_block_size
        if any(self.candidate(worker_id).num_cached_tokens >= num_key_tokens for worker_id in home):
            return ()
        earlier = (self._view.rings.candidates(key) for key in self._view.earlier_keys(self.links))
        return [one for one in dict.fromkeys(chain.from_iterable(earlier)) if one not in home]

    def last_place(self) -> str | None:
        return self._view.last_place(self.links)

    def answer(self) -> Answer | None:
        """Who has the KV of the turn before, and of how many of these tokens, in full blocks."""
        found, block = self._view.answer(self.links, self.num_tokens), self._hash_block_size
        return found and Answer(found.worker_id, found.num_tokens // block * block)

    def held_by_leaving(self) -> Answer | None:
        """Who of those that take no new work any more has most of it; its last token is always computed."""
        found, block = self._view.held_by_leaving(self.links), self._hash_block_size
        return found and Answer(found.worker_id, min(found.num_tokens, (self.num_tokens - 1) // block * block))

    def ring(self, key: bytes) -> Iterator[str]:
        return self._view.rings.rings[0].walk(key)

    def eviction_regret(self) -> float:
        return self._view.regret.share

    def backlog_s(self, worker_id: str, prefill_s: float) -> float:
        return self._view.workers[worker_id].backlog_s(prefill_s)

    def prefill_s(self, worker_id: str, num_cached_tokens: int) -> float:
        return self._view.workers[worker_id].prefill_s(self.num_tokens - num_cached_tokens, num_cached_tokens)

    def pull_s(self, worker_id: str, num_tokens: int) -> float:
        return self._view.workers[worker_id].pull_s(num_tokens)
