"""What a placement policy may ask about one request, and what it answers. Fixes the question only: how a worker's load
is counted is the view's, which worker is best is the policy's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from router.policy import Candidate, Choice


class PlacementView(Protocol):
    """The workers that prefill, at least one, as one request sees them. Every call is cheap; only worker_ids() lets a
    policy's work grow with the number of workers."""

    @property
    def num_tokens(self) -> int:
        """Of the request, cached or not."""

    @property
    def links(self) -> Sequence[bytes]:
        """The chain of its full hash blocks."""

    def worker_ids(self) -> Sequence[str]:
        """All of them, in an order that depends on nothing but who they are. O(1)."""

    def candidate(self, worker_id: str) -> Candidate:
        """O(log links)."""

    def lightest(self) -> str:
        """With the fewest tokens pending. O(1)."""

    def num_pending_tokens(self) -> int:
        """Of all workers together. O(1)."""

    def sample(self, num: int) -> Sequence[str]:
        """Up to `num` distinct workers, from a seeded source that was handed in."""

    def home_key(self) -> bytes | None:
        """The link that both rings are asked with; None for a request without a full block."""

    def home_pair(self) -> tuple[str, ...]:
        """What the two rings say of the home key: two workers, one where only one is up, none without a key."""

    def earlier_homes(self) -> Sequence[str]:
        """Others that may hold its KV, where no home holds as much as the home key stands for: those that earlier keys
        of this prefix named. O(1)."""

    def ring(self, key: bytes) -> Iterator[str]:
        """Workers clockwise from the key's place on the first ring; one may appear again."""

    def last_place(self) -> str | None:
        """The worker on which the longest prompt was placed that this one continues or repeats, as far as this router
        remembers, and where it is up."""

    def eviction_regret(self) -> float:
        """The share of evicted blocks that are asked for again before long, in [0, 1]."""

    def backlog_s(self, worker_id: str, prefill_s: float) -> float:
        """How long a request that takes prefill_s would wait there for its turn."""

    def prefill_s(self, worker_id: str, num_cached_tokens: int) -> float:
        """To prefill what is left of this request there, were so many of its tokens cached; 0 where no speed is known
        yet."""

    def pull_s(self, worker_id: str, num_tokens: int) -> float:
        """For that worker to fetch the KV of so many tokens from another; infinite where it does not pull."""


class PlacementPolicy(Protocol):
    def place(self, view: PlacementView) -> Choice:
        """Where the request is to be prefilled: one of the view's workers."""
