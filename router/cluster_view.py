"""Which workers are up, what they last reported, and what this router has sent them since. Decides nothing about
requests."""

from __future__ import annotations

from collections.abc import Sequence

from protos.types import PeerRef, Role, WorkerStats
from router.config import RouterConfig
from router.hash_ring import RingPair
from router.policy import Candidate
from router.prefix_index import PrefixIndex

INITIAL_MAX_LINKS = 4096  # of a worker's prefix index, until it has said how many blocks it has


class WorkerView:
    """One life of one worker, as this router sees it.

    Invariant: `pending_tokens` has an entry for every request sent here and not yet prefilled, `placed_blocks` for
    every request that decodes or will decode here; both are empty when no request in flight needs this worker."""

    def __init__(self, ref: PeerRef) -> None:
        self.ref = ref
        self.stats = WorkerStats()
        self.prefixes = PrefixIndex(INITIAL_MAX_LINKS)
        self.pending_tokens: dict[str, int] = {}
        self.placed_blocks: dict[str, int] = {}

    @property
    def worker_id(self) -> str:
        return self.ref.worker_id

    @property
    def num_free_blocks(self) -> int:
        """By its own last report or by what was placed here since, whichever is less."""
        reported = self.stats.num_free_blocks + self.stats.num_cached_blocks
        return min(reported, self.stats.num_blocks - sum(self.placed_blocks.values()))

    def release(self, request_id: str) -> None:
        self.pending_tokens.pop(request_id, None)
        self.placed_blocks.pop(request_id, None)


class ClusterView:
    """Invariant: the rings name exactly the workers that prefill and are up."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._rings = RingPair(config.ring_seed, config.num_virtual_nodes)
        self.workers: dict[str, WorkerView] = {}

    def add(self, ref: PeerRef) -> None:
        assert ref.worker_id not in self.workers, ref
        self.workers[ref.worker_id] = WorkerView(ref)
        if self._prefills(ref.role):
            self._rings.add(ref.worker_id)

    def remove(self, worker_id: str) -> None:
        del self.workers[worker_id]
        self._rings.remove(worker_id)

    def find(self, worker_id: str, incarnation: str) -> WorkerView | None:
        view = self.workers.get(worker_id)
        return view if view is not None and view.ref.incarnation == incarnation else None

    def is_live(self, view: WorkerView) -> bool:
        return self.workers.get(view.worker_id) is view

    def note_stats(self, view: WorkerView, stats: WorkerStats) -> None:
        if stats.num_blocks != view.stats.num_blocks:
            view.prefixes.resize(stats.num_blocks * self._config.block_size // self._config.hash_block_size)
        view.stats = stats

    def prefill_workers(self) -> list[WorkerView]:
        return [view for view in self.workers.values() if self._prefills(view.ref.role)]

    def decode_workers(self) -> list[WorkerView]:
        """Those that take handoffs: none where every worker serves requests from end to end."""
        return [view for view in self.workers.values() if not self._prefills(view.ref.role)]

    def home_worker_ids(self, links: Sequence[bytes]) -> tuple[str, ...]:
        """The home pair of a prompt: what the rings say of its first key_depth_blocks blocks. No full block, none."""
        if not links:
            return ()
        return self._rings.candidates(links[min(self._config.key_depth_blocks, len(links)) - 1])

    def candidate(self, view: WorkerView, links: Sequence[bytes], num_tokens: int) -> Candidate:
        hash_block_size = self._config.hash_block_size
        # The last token is always computed, so that there is something to sample from: it never counts as cached.
        max_cached_tokens = (num_tokens - 1) // hash_block_size * hash_block_size
        return Candidate(
            worker_id=view.worker_id,
            num_cached_tokens=min(view.prefixes.num_matching(links) * hash_block_size, max_cached_tokens),
            num_pending_tokens=sum(view.pending_tokens.values()),
            prefill_s_per_token=view.stats.prefill_s_per_token,
            num_blocks=view.stats.num_blocks,
            num_free_blocks=view.num_free_blocks,
            num_requests=len(view.placed_blocks),
        )

    def _prefills(self, role: Role) -> bool:
        return role is Role.PREFILL or self._config.mode == "colocated"
