"""Which workers are up, what they last reported, and what this router has sent them since. Decides nothing about
requests."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Sequence

from protos.types import PeerRef, Role, WorkerStats
from router.config import RouterConfig
from router.hash_ring import RingPair
from router.policy import Candidate, by_pending, by_room
from router.prefix_index import PrefixIndex
from router.ranking import Ranking

INITIAL_MAX_LINKS = 4096  # of a worker's prefix index, until it has said how many blocks it has


class Tally(UserDict[str, int]):
    """Amounts by request. Invariant: `total` is their sum; on_change is called after every change."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        super().__init__()
        self.total = 0
        self._on_change = on_change

    def __setitem__(self, request_id: str, amount: int) -> None:
        self.total += amount - self.data.get(request_id, 0)
        self.data[request_id] = amount
        self._on_change()

    def __delitem__(self, request_id: str) -> None:
        self.total -= self.data.pop(request_id)
        self._on_change()


class WorkerView:
    """One life of one worker, as this router sees it; on_load is called when what it is ranked by may have changed.

    Invariant: `pending_tokens` has an entry for every request sent here and not yet prefilled, `placed_blocks` for
    every request that decodes or will decode here; both are empty when no request in flight needs this worker."""

    def __init__(self, ref: PeerRef, on_load: Callable[[WorkerView], None]) -> None:
        self.ref = ref
        self.stats = WorkerStats()
        self.warm_links: frozenset[str] = frozenset()  # of `stats`
        self.prefixes = PrefixIndex(INITIAL_MAX_LINKS)
        self.pending_tokens = Tally(lambda: on_load(self))
        self.placed_blocks = Tally(lambda: on_load(self))

    @property
    def worker_id(self) -> str:
        return self.ref.worker_id

    @property
    def num_free_blocks(self) -> int:
        """By its own last report or by what was placed here since, whichever is less."""
        reported = self.stats.num_free_blocks + self.stats.num_cached_blocks
        return min(reported, self.stats.num_blocks - self.placed_blocks.total)

    @property
    def num_pending_tokens(self) -> int:
        return self.pending_tokens.total

    @property
    def num_requests(self) -> int:
        return len(self.placed_blocks)

    def release(self, request_id: str) -> None:
        self.pending_tokens.pop(request_id, None)
        self.placed_blocks.pop(request_id, None)


class ClusterView:
    """Invariant: the rings name exactly the workers that prefill and are up; every worker that is up stands in one of
    the rankings, in the place that its load gives it."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self.rings = RingPair(config.ring_seed, config.num_virtual_nodes)
        self._prefill: Ranking[WorkerView] = Ranking(by_pending)
        self._decode: Ranking[WorkerView] = Ranking(by_room)
        self.workers: dict[str, WorkerView] = {}

    def add(self, ref: PeerRef) -> None:
        assert ref.worker_id not in self.workers, ref
        self.workers[ref.worker_id] = WorkerView(ref, self._rank)
        self._rank(self.workers[ref.worker_id])
        if self._prefills(ref.role):
            self.rings.add(ref.worker_id)

    def remove(self, worker_id: str) -> None:
        view = self.workers.pop(worker_id)
        self._ranking_of(view).remove(worker_id)
        self.rings.remove(worker_id)

    def find(self, worker_id: str, incarnation: str) -> WorkerView | None:
        view = self.workers.get(worker_id)
        return view if view is not None and view.ref.incarnation == incarnation else None

    def is_live(self, view: WorkerView) -> bool:
        return self.workers.get(view.worker_id) is view

    def note_stats(self, view: WorkerView, stats: WorkerStats) -> None:
        if stats.num_blocks != view.stats.num_blocks:
            view.prefixes.resize(stats.num_blocks * self._config.block_size // self._config.hash_block_size)
        if stats.warm_links != view.stats.warm_links:
            view.warm_links = frozenset(stats.warm_links)
        view.stats = stats
        self._rank(view)

    def prefill_workers(self) -> Sequence[WorkerView]:
        """Least pending first."""
        return self._prefill.members

    def decode_workers(self) -> Sequence[WorkerView]:
        """Those that take handoffs, most room first: none where every worker serves requests from end to end."""
        return self._decode.members

    def home_worker_ids(self, links: Sequence[bytes]) -> tuple[str, ...]:
        """The home pair of a prompt: what the rings say of its first key_depth_blocks blocks. No full block, none."""
        if not links:
            return ()
        return self.rings.candidates(links[min(self._config.key_depth_blocks, len(links)) - 1])

    def candidate(self, view: WorkerView, links: Sequence[bytes], num_tokens: int) -> Candidate:
        hash_block_size = self._config.hash_block_size
        # The last token is always computed, so that there is something to sample from: it never counts as cached.
        max_cached_tokens = (num_tokens - 1) // hash_block_size * hash_block_size
        return Candidate(
            worker_id=view.worker_id,
            num_cached_tokens=min(view.prefixes.num_matching(links) * hash_block_size, max_cached_tokens),
            num_pending_tokens=view.num_pending_tokens,
            prefill_s_per_token=view.stats.prefill_s_per_token,
            num_blocks=view.stats.num_blocks,
            num_free_blocks=view.num_free_blocks,
            num_requests=view.num_requests,
        )

    def _rank(self, view: WorkerView) -> None:
        """One that is no longer up may still change, while its requests leave it."""
        if self.is_live(view):
            self._ranking_of(view).put(view.worker_id, view)

    def _ranking_of(self, view: WorkerView) -> Ranking[WorkerView]:
        return self._prefill if self._prefills(view.ref.role) else self._decode

    def _prefills(self, role: Role) -> bool:
        return role is Role.PREFILL or self._config.mode == "colocated"
