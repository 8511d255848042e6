"""Which worker decodes, for a request whose prefill worker is known. Knows the view, and how long answers have been;
changes nothing in the view."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from router.cluster_view import ClusterView, WorkerView
from router.config import RouterConfig
from router.decode_peak import OutputLengths, peak_tokens
from router.policies.peak_room import PeakRoom
from router.policy import Candidate, MostFreeBlocks, Policy

NUM_RECENT_OUTPUTS = 1000


class DecodePlacement:
    """Looks at the head of the view's ranking by room. The policy that predicts has the first few workers to choose
    from, since it looks at every request there; for the other one the head is the choice.

    Invariant: `_outputs` are the lengths of recent answers that ended by themselves."""

    def __init__(self, config: RouterConfig, view: ClusterView) -> None:
        self._block_size = config.block_size
        self._view = view
        self._predicts = config.decode_policy == "peak_room"
        self._policy: Policy = PeakRoom() if self._predicts else MostFreeBlocks()
        self._num_candidates = config.num_decode_candidates if self._predicts else 1
        self._outputs = OutputLengths(NUM_RECENT_OUTPUTS)

    def note_output(self, num_output_tokens: int) -> None:
        """An answer has ended by itself."""
        self._outputs.note(num_output_tokens)

    def choose(
        self,
        prefill: WorkerView,
        links: Sequence[bytes],
        num_tokens: int,
        num_remaining_tokens: int,
        refused: Collection[str],
    ) -> tuple[WorkerView, str] | None:
        """One that has not refused this attempt; one that `prefill` has a link to, where there is one."""
        roomiest = self._roomiest(prefill, refused)
        if not roomiest:
            return None
        candidates = [self._view.candidate(view, links, num_tokens) for view in roomiest]
        if self._predicts:
            coming = num_tokens, self._outputs.remaining(0, num_remaining_tokens)
            candidates = [self._with_peak(one, coming) for one in candidates]
        choice = self._policy.choose(num_tokens, candidates)
        return self._view.workers[choice.worker_id], choice.reason

    def _roomiest(self, prefill: WorkerView, refused: Collection[str]) -> list[WorkerView]:
        linked: list[WorkerView] = []
        others: list[WorkerView] = []
        for view in self._view.decode_workers():
            if view.worker_id in refused:
                continue
            if view.worker_id in prefill.warm_links:
                linked.append(view)
                if len(linked) == self._num_candidates:
                    break
            elif len(others) < self._num_candidates:
                others.append(view)
        return linked or others

    def _with_peak(self, candidate: Candidate, coming: tuple[int, int]) -> Candidate:
        """A request that resumes counts as a new one, but for its limit."""
        requests = [coming]
        for one in self._view.workers[candidate.worker_id].decoding.values():
            remaining = self._outputs.remaining(one.num_generated_tokens, one.num_remaining_tokens)
            requests.append((one.num_tokens, remaining))
        return replace(candidate, num_peak_blocks=-(-peak_tokens(requests) // self._block_size))
