"""Which workers are up, what they last reported, and what this router has sent them since. Decides nothing about
requests."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import UserDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protos.cost_model import CostModel
from protos.types import PeerRef, Role, WorkerStats
from router.config import RouterConfig
from router.decode_peak import Decoding
from router.eviction_regret import EvictionRegret
from router.hash_ring import RingPair
from router.key_depth import DepthSnapshot, DepthTable, KeyDepths
from router.last_places import LastPlaces
from router.policy import Candidate, by_pending, by_room
from router.prefix_index import PrefixIndex, unheeded
from router.queue_order import make_order
from router.ranking import Ranking
from router.worker_queue import WorkerQueue

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


@dataclass(frozen=True, slots=True)
class Answer:
    """Where the KV of a prompt and its answer is, and of how many tokens. What was generated has no links here: whether
    another prompt goes on with it is a guess."""

    worker_id: str
    num_tokens: int


class WorkerView:
    """One life of one worker, as this router sees it; on_load is called when what it is ranked by may have changed.

    Invariant: `pending_tokens` and `pending_us` have an entry for every request sent here and not yet prefilled,
    `queue` for every one placed here and not yet sent, `placed_blocks` and `decoding` for every one that decodes or
    will decode here; all are empty when no request in flight needs this worker."""

    def __init__(
        self,
        ref: PeerRef,
        config: RouterConfig,
        on_load: Callable[[WorkerView], None],
        on_evict: Callable[[bytes], None],
    ) -> None:
        self.ref = ref
        self.stats = WorkerStats()
        self.warm_links: frozenset[str] = frozenset()  # of `stats`
        self.prefixes = PrefixIndex(INITIAL_MAX_LINKS, on_evict)
        self.pending_tokens = Tally(lambda: on_load(self))
        self.pending_us = Tally(lambda: None)  # microseconds, by the cost model: sums of integers do not drift
        self.placed_blocks = Tally(lambda: on_load(self))
        self.decoding: dict[str, Decoding] = {}
        order = make_order(config.queue_order, config.max_queue_wait_s)
        self.queue = WorkerQueue(order, config.dispatch_tokens, lambda: on_load(self))
        self.rebalanced_at = float("-inf")  # when its queue was last looked through
        self._fixed_cost = config.cost
        self._pull_s_per_token = config.pull_s_per_token
        self._estimates_by_order = config.estimates_by_order

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
        """To compute for requests that are queued here, or sent and not yet prefilled."""
        return self.pending_tokens.total + self.queue.num_tokens

    @property
    def num_requests(self) -> int:
        return len(self.placed_blocks)

    @property
    def has_credit(self) -> bool:
        return self.queue.has_credit(self.pending_tokens.total)

    @property
    def sent_s(self) -> float:
        """How long the worker is busy with what it was sent and has not prefilled."""
        if self._cost is None:
            return self.pending_tokens.total * self.stats.prefill_s_per_token
        return self.pending_us.total / 1e6

    def backlog_s(self, prefill_s: float) -> float:
        """How long a request that takes prefill_s would wait for its turn, by the order of the queue where estimates go
        by that: else behind all that is queued."""
        return self.sent_s + (self.queue.work_before_s(prefill_s) if self._estimates_by_order else self.queue.work_s)

    def prefill_s(self, num_new_tokens: int, num_cached_tokens: int) -> float:
        """By the cost model, else by what the worker says a token takes: 0 until it does."""
        if self._cost is None:
            return num_new_tokens * self.stats.prefill_s_per_token
        return self._cost.prefill_s([(num_new_tokens, num_cached_tokens)])

    def pull_s(self, num_tokens: int) -> float:
        """To fetch so much KV from another worker; for ever, where it does not pull."""
        if self._pull_s_per_token is None:
            cost = self.stats.pull_cost
            return float("inf") if cost is None else cost.pull_s(num_tokens)
        return num_tokens * self._pull_s_per_token if self._pull_s_per_token else float("inf")

    @property
    def _cost(self) -> CostModel | None:
        """The settings', else what the worker has fitted to its steps."""
        return self._fixed_cost or self.stats.prefill_cost

    def charge(self, request_id: str, num_tokens: int, prefill_s: float) -> None:
        """It was sent, with so much to compute."""
        self.pending_us[request_id] = round(prefill_s * 1e6)
        self.pending_tokens[request_id] = num_tokens

    def place_to_decode(self, request_id: str, num_blocks: int, decoding: Decoding) -> None:
        self.decoding[request_id] = decoding
        self.placed_blocks[request_id] = num_blocks

    def note_refused(self, request_id: str) -> None:
        """It will not decode here."""
        self.placed_blocks.pop(request_id, None)
        self.decoding.pop(request_id, None)

    def note_prefilled(self, request_id: str) -> None:
        self.pending_us.pop(request_id, None)
        self.pending_tokens.pop(request_id, None)

    def release(self, request_id: str) -> None:
        self.note_prefilled(request_id)
        self.note_refused(request_id)


class ClusterView:
    """Invariant: the rings and `prefill_worker_ids` name exactly the workers that prefill, are up and take new work;
    every worker that is up and takes new work stands in one of the rankings, in the place that its load gives it."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self.rings = RingPair(config.ring_seed, config.num_virtual_nodes)
        self._prefill: Ranking[WorkerView] = Ranking(by_pending)
        self._decode: Ranking[WorkerView] = Ranking(by_room)
        self.workers: dict[str, WorkerView] = {}
        self.draining: dict[str, WorkerView] = {}  # those of them that take no new work; what they hold may be pulled
        self._decides = KeyDepths(config.key_depth) if config.adapts_key_depth else None
        self._depths = self._decides.table if self._decides else None
        self._follows_depths = False
        self._observed: deque[tuple[bytes, ...]] = deque(maxlen=config.key_depth.window)  # for whoever decides
        self.prefill_worker_ids: list[str] = []  # sorted: the same in every router
        self.num_pending_tokens = 0  # of all that prefill
        self._last_places = LastPlaces[str]()
        self._answers = LastPlaces[Answer]()
        self.regret = EvictionRegret(INITIAL_MAX_LINKS)
        self._counted: dict[str, int] = defaultdict(int)  # what each has added to it
        self._changed: dict[str, WorkerView] = {}  # their load has changed while requests were queued

    def add(self, ref: PeerRef) -> None:
        assert ref.worker_id not in self.workers, ref
        on_evict = self.regret.evicted if self._prefills(ref.role) else unheeded
        self.workers[ref.worker_id] = WorkerView(ref, self._config, self._rank, on_evict)
        self._rank(self.workers[ref.worker_id])
        if self._prefills(ref.role):
            self.rings.add(ref.worker_id)
            insort(self.prefill_worker_ids, ref.worker_id)

    def remove(self, worker_id: str) -> None:
        view = self.workers.pop(worker_id)
        self.draining.pop(worker_id, None)
        self._take_off(view)

    def drain(self, view: WorkerView) -> None:
        """It is up, and nobody's choice any more."""
        self.draining[view.worker_id] = view
        self._take_off(view)

    def _take_off(self, view: WorkerView) -> None:
        worker_id = view.worker_id
        self._ranking_of(view).remove(worker_id)
        self._changed.pop(worker_id, None)
        self.num_pending_tokens -= self._counted.pop(worker_id, 0)
        if worker_id in self.rings.members:
            self.rings.remove(worker_id)
            del self.prefill_worker_ids[bisect_left(self.prefill_worker_ids, worker_id)]

    def find(self, worker_id: str, incarnation: str) -> WorkerView | None:
        view = self.workers.get(worker_id)
        return view if view is not None and view.ref.incarnation == incarnation else None

    def is_live(self, view: WorkerView) -> bool:
        return self.workers.get(view.worker_id) is view

    def takes_work(self, worker_id: str) -> bool:
        return worker_id in self.workers and worker_id not in self.draining

    def note_stats(self, view: WorkerView, stats: WorkerStats) -> None:
        num_blocks = stats.num_blocks + stats.num_host_blocks
        if num_blocks != view.stats.num_blocks + view.stats.num_host_blocks:
            view.prefixes.resize(num_blocks * self._config.block_size // self._config.hash_block_size)
            self.regret.resize(sum(self.workers[one].prefixes.max_links for one in self.prefill_worker_ids))
        if stats.warm_links != view.stats.warm_links:
            view.warm_links = frozenset(stats.warm_links)
        view.stats = stats
        self._rank(view)

    def take_changed(self) -> list[WorkerView]:
        """Those that may have room for one that is queued there: their load has changed since this was last asked."""
        changed, self._changed = list(self._changed.values()), {}
        return changed

    def prefill_workers(self) -> Sequence[WorkerView]:
        """Least pending first."""
        return self._prefill.members

    def decode_workers(self) -> Sequence[WorkerView]:
        """Those that take handoffs, most room first: none where every worker serves requests from end to end."""
        return self._decode.members

    def home_key(self, links: Sequence[bytes]) -> bytes | None:
        """What the rings are asked with: the last of the blocks that make the key. No full block, none."""
        return links[self.key_depth(links) - 1] if links else None

    def key_depth(self, links: Sequence[bytes]) -> int:
        """How many blocks make the key."""
        depth = self._config.key_depth_blocks if self._depths is None else self._depths.depth(links)
        return min(depth, len(links))

    def earlier_keys(self, links: Sequence[bytes]) -> list[bytes]:
        """Other keys under which KV of this prefix may have been placed; none where key depths do not adapt."""
        return [] if self._depths is None else [links[depth - 1] for depth in self._depths.earlier_depths(links)]

    def observe(self, links: Sequence[bytes]) -> None:
        """A request was taken: where key depths adapt, its prefixes count from now on."""
        if self._follows_depths:
            self._observed.append(tuple(links[: self._config.key_depth.max_blocks]))
        elif self._decides is not None and self.prefill_worker_ids:
            self._decides.observe(links, len(self.prefill_worker_ids))

    def follow(self, depths: DepthSnapshot) -> None:
        """Key depths are another's to decide from now on: these."""
        self._follows_depths, self._depths = True, DepthTable(self._config.key_depth, depths)

    def take_observed(self) -> tuple[tuple[bytes, ...], ...]:
        """The prefixes of the requests taken since this was last asked, for whoever decides on key depths."""
        observed = tuple(self._observed)
        self._observed.clear()
        return observed

    def home_worker_ids(self, links: Sequence[bytes]) -> tuple[str, ...]:
        """The home pair of a prompt."""
        key = self.home_key(links)
        return () if key is None else self.rings.candidates(key)

    def note_placed(self, view: WorkerView, links: Sequence[bytes]) -> None:
        """It is going to compute this chain: those that follow may count on it from now on."""
        if view.worker_id in self.rings.members:
            self.regret.missed(links[view.prefixes.num_matching(links) :])
            self._last_places.note(links, view.worker_id)
        view.prefixes.note(links)

    def last_place(self, links: Sequence[bytes]) -> str | None:
        """The worker, where it is up, that was given the longest prompt which this one continues or repeats."""
        worker_id = self._last_places.find(links)
        return worker_id if worker_id in self.rings.members else None

    def note_answer(self, view: WorkerView, links: Sequence[bytes], num_tokens: int) -> None:
        """It has decoded the answer to this prompt, and has the KV of so many tokens of both."""
        self._answers.note(links, Answer(view.worker_id, num_tokens))

    def answer(self, links: Sequence[bytes], num_tokens: int) -> Answer | None:
        """To the longest prompt that this one of num_tokens tokens may continue, where the worker that has its KV is
        up. A next turn is longer than the last one with its answer; another question is mostly not."""
        found = self._answers.find(links)
        is_here = found is not None and found.worker_id in self.workers and found.num_tokens < num_tokens
        return found if is_here else None

    def held_by_leaving(self, links: Sequence[bytes]) -> Answer | None:
        """The worker on its way out that has the most of this chain: its successors may pull it while it is there."""
        block = self._config.hash_block_size
        held = [Answer(one.worker_id, one.prefixes.num_matching(links) * block) for one in self.draining.values()]
        return max(held, key=lambda one: one.num_tokens, default=None)

    def candidate(self, view: WorkerView, links: Sequence[bytes], num_tokens: int) -> Candidate:
        block = self._config.hash_block_size
        # The last token is always computed, so that there is something to sample from: it never counts as cached.
        num_cached_tokens = min(view.prefixes.num_matching(links) * block, (num_tokens - 1) // block * block)
        prefill_s = view.prefill_s(num_tokens - num_cached_tokens, num_cached_tokens)
        return Candidate(
            worker_id=view.worker_id,
            num_cached_tokens=num_cached_tokens,
            num_pending_tokens=view.num_pending_tokens,
            num_blocks=view.stats.num_blocks,
            num_free_blocks=view.num_free_blocks,
            num_requests=view.num_requests,
            backlog_s=view.backlog_s(prefill_s),
            prefill_s=prefill_s,
        )

    def _rank(self, view: WorkerView) -> None:
        """One that is no longer up, or drains, may still change, while its requests leave it."""
        if self.is_live(view) and view.worker_id not in self.draining:
            self._ranking_of(view).put(view.worker_id, view)
            self._count(view)
            if len(view.queue):
                self._changed[view.worker_id] = view

    def _count(self, view: WorkerView) -> None:
        if self._prefills(view.ref.role):
            self.num_pending_tokens += view.num_pending_tokens - self._counted[view.worker_id]
            self._counted[view.worker_id] = view.num_pending_tokens

    def _ranking_of(self, view: WorkerView) -> Ranking[WorkerView]:
        return self._prefill if self._prefills(view.ref.role) else self._decode

    def _prefills(self, role: Role) -> bool:
        return role is Role.PREFILL or self._config.mode == "colocated"
