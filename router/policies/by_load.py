"""Policies that do not look at the prefix: in turn, at random, by load."""

from __future__ import annotations

from dataclasses import dataclass

from router.policies.base import PlacementView
from router.policy import Choice


def lightest(view: PlacementView) -> Choice:
    """The worker with the fewest prompt tokens before this request; for prompts that have no home."""
    worker_id = view.lightest()
    num_pending_tokens = view.candidate(worker_id).num_pending_tokens
    return Choice(
        worker_id,
        f"no home: {view.num_tokens} tokens fill no hash block; lightest with {num_pending_tokens} tokens pending",
    )


@dataclass(slots=True)
class RoundRobin:
    """Each worker in turn. Knows who they are and who was last: O(1)."""

    num_placed: int = 0

    def place(self, view: PlacementView) -> Choice:
        worker_ids = view.worker_ids()
        worker_id = worker_ids[self.num_placed % len(worker_ids)]
        self.num_placed += 1
        return Choice(worker_id, f"in turn, of {len(worker_ids)} workers")


@dataclass(frozen=True, slots=True)
class Random:
    """Any worker, each as likely: O(1)."""

    def place(self, view: PlacementView) -> Choice:
        (worker_id,) = view.sample(1)
        return Choice(worker_id, "at random")


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """The worker with the fewest tokens pending. The view keeps workers in that order: O(1)."""

    def place(self, view: PlacementView) -> Choice:
        worker_id = view.lightest()
        return Choice(worker_id, f"lightest: {view.candidate(worker_id).num_pending_tokens} tokens pending")
