"""Which worker decodes, for a request whose prefill worker is known, and whether it should prefill there, too. Knows
the view, how long answers have been and what was placed; changes only what workers are thought to hold."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from router.cluster_view import ClusterView, WorkerView
from router.config import RouterConfig
from router.decode_peak import Decoding, OutputLengths, peak_tokens
from router.last_places import LastPlaces
from router.policies.held_room import HeldRoom
from router.policies.peak_room import PeakRoom
from router.policy import Candidate, MostFreeBlocks, Policy

NUM_RECENT_OUTPUTS = 1000


class DecodePlacement:
    """Looks at the head of the view's ranking by room: where room alone decides it is the choice, else the first few
    are candidates, and for held_room the worker that had the request's last turn, too.

    Invariant: `_outputs` are the lengths of recent answers that ended by themselves."""

    def __init__(self, config: RouterConfig, view: ClusterView) -> None:
        self._block_size = config.block_size
        self._view = view
        self._predicts = config.decode_policy == "peak_room"
        self._counts_held = config.decode_policy == "held_room"
        self._max_local_tokens = config.max_local_prefill_tokens
        self._max_requests = config.max_requests_per_worker
        self._policy = _policy(config)
        self._num_candidates = 1 if config.decode_policy == "most_free_blocks" else config.num_decode_candidates
        self._outputs = OutputLengths(NUM_RECENT_OUTPUTS)
        self._last_places = LastPlaces[str]()

    def note_output(self, num_output_tokens: int) -> None:
        """An answer has ended by itself."""
        self._outputs.note(num_output_tokens)

    def num_expected_tokens(self, one: Decoding) -> int:
        """That it will still add, by the answers that have ended."""
        return self._outputs.remaining(one.num_generated_tokens, one.num_remaining_tokens)

    def note_held(self, view: WorkerView, links: Sequence[bytes]) -> None:
        """A request decodes there, so it has the KV of this chain. What is generated has no links yet."""
        if (self._counts_held or self._max_local_tokens) and view.worker_id not in self._view.rings.members:
            view.prefixes.note(links)
            if self._counts_held:
                self._last_places.note(links, view.worker_id)

    def choose(
        self,
        prefill: WorkerView,
        links: Sequence[bytes],
        num_tokens: int,
        num_remaining_tokens: int,
        refused: Collection[str],
    ) -> tuple[WorkerView, str] | None:
        """One that has not refused this attempt; one that `prefill` has a link to, where there is one."""
        views = self._roomiest(prefill, refused)
        if not views:
            return None
        if self._counts_held:
            views += self._last_place(links, views, prefill, refused)
        views = [view for view in views if view.num_requests < self._max_requests] or views
        candidates = [self._view.candidate(view, links, num_tokens) for view in views]
        if self._predicts:
            coming = num_tokens, self._outputs.remaining(0, num_remaining_tokens)
            candidates = [self._with_peak(one, coming) for one in candidates]
        choice = self._policy.choose(num_tokens, candidates)
        return self._view.workers[choice.worker_id], choice.reason

    def local_reason(self, candidate: Candidate, num_tokens: int) -> str:
        """Why a request that is to decode there should prefill there, too; empty where it should not. What is computed
        there delays those that decode, so it is bounded, for all such requests together."""
        num_new_tokens = num_tokens - candidate.num_cached_tokens
        has_room = candidate.num_free_blocks * self._block_size >= num_tokens
        if not has_room or candidate.num_pending_tokens + num_new_tokens > self._max_local_tokens:
            return ""
        return f"{num_new_tokens} of {num_tokens} tokens to prefill are not worth a handoff"

    def _last_place(
        self, links: Sequence[bytes], views: Sequence[WorkerView], prefill: WorkerView, refused: Collection[str]
    ) -> list[WorkerView]:
        """Where the prompt that this one continues was sent to decode, unless it is in `views` or less well linked."""
        worker_id = self._last_places.find(links)
        view = self._view.workers.get(worker_id) if worker_id else None
        if view is None or view in views or view.worker_id in refused or view.worker_id in self._view.rings.members:
            return []
        if not self._view.takes_work(view.worker_id):
            return []
        is_worse = views[0].worker_id in prefill.warm_links and view.worker_id not in prefill.warm_links
        return [] if is_worse else [view]

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
            requests.append((one.num_tokens, self.num_expected_tokens(one)))
        return replace(candidate, num_peak_blocks=-(-peak_tokens(requests) // self._block_size))


def _policy(config: RouterConfig) -> Policy:
    match config.decode_policy:
        case "peak_room":
            return PeakRoom()
        case "held_room":
            return HeldRoom(config.block_size)
        case "most_free_blocks":
            return MostFreeBlocks()
