"""The taking side of a pull: decides whether a new request waits for a prefix from one of its homes or computes it,
and takes what comes into the prefix cache. The request then starts from there like any other: whoever needs the memory
meanwhile may have it, and what is missing is recomputed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.config import SchedulerConfig
from engine.events import (
    AbortTransfer,
    Effect,
    GrantTransfer,
    PullRefused,
    RefuseTransfer,
    RequestPull,
    TransferArrived,
    TransferLost,
    TransferOffered,
)
from engine.kv_cache_manager import KVCacheManager
from engine.prefill_speed import PrefillSpeed
from engine.pull_speed import PullSpeed
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler
from protos.types import PullOutcome, PullStats


@dataclass(slots=True, eq=False)
class _Pull:
    """Asks for block_hashes[first_block:]; those before were here when it was asked."""

    pull_id: bytes
    block_hashes: tuple[bytes, ...]  # of the asker's prefix, from its first block on
    first_block: int
    asker: Request | None  # None: it has left, others wait on
    asked_at: float = 0.0
    requests: list[Request] = field(default_factory=list)  # all that wait for it, the asker among them
    written: range | None = None  # places in block_hashes that the grant lets the source write


class PullDestination:
    """Invariant: every request in `_waiting` stands in `requests` of exactly that pull, is in no queue of the scheduler
    and has no blocks; every pull in `_pulls` has at least one. Granted blocks are the pull's lease until it has arrived
    or is lost, also when nobody waits for it any more."""

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: Scheduler,
        manager: KVCacheManager,
        speed: PrefillSpeed,
        pull_speed: PullSpeed,
        worker_id: str,
        new_pull_id: Callable[[], bytes] | None,
    ) -> None:
        """worker_id: this worker, which may be one of the homes. new_pull_id: 128 random bits, used once."""
        assert config.pulls is None or (worker_id and new_pull_id)
        self._config = config.pulls
        self._block_size = config.block_size
        self._scheduler = scheduler
        self._manager = manager
        self._speed = speed
        self._pull_speed = pull_speed
        self._worker_id = worker_id
        self._new_pull_id = new_pull_id
        self._waiting: dict[Request, _Pull] = {}
        self._pulls: dict[bytes, _Pull] = {}
        self._pull_by_hash: dict[bytes, _Pull] = {}  # of every block that is asked for
        self._num_by_outcome = dict.fromkeys(PullOutcome, 0)
        self._num_tokens = 0  # that came

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def requests(self) -> list[Request]:
        return list(self._waiting)

    def awaits(self, transfer_id: bytes) -> bool:
        return transfer_id in self._pulls

    @property
    def deadline(self) -> float | None:
        """When the next request will have waited for long enough."""
        return min(map(self._deadline_of, self._waiting), default=None)

    @property
    def stats(self) -> PullStats:
        return PullStats(tuple(sorted(self._num_by_outcome.items())), self._num_tokens)

    # --- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> list[Effect]:
        """Wait for a pull under way that brings what it lacks, ask a home for it, or queue for computing it here."""
        if self._config is None:
            self._queue(request, now)
            return []
        hashes, num_held = self._manager.prefix(request)
        if not self._is_worth_it(request, num_held, len(hashes), now):
            self._queue(request, now)
            return []
        joined = self._pull_by_hash.get(hashes[num_held])
        if joined is not None:
            self._wait(request, joined, now)
            return []
        home = self._take_home(request)
        if home is None:
            self._queue(request, now)
            return []
        pull = _Pull(b"", hashes, num_held, asker=request)
        for block_hash in hashes[num_held:]:
            self._pull_by_hash.setdefault(block_hash, pull)
        self._wait(request, pull, now)
        return [self._ask(pull, request, home, now)]

    def end(self, request: Request, reason: str) -> list[Effect]:
        """The request ends here; others may wait on for the same pull."""
        pull = self._waiting.pop(request)
        pull.requests.remove(request)
        if pull.asker is request:
            pull.asker = None
        if pull.requests:
            return []
        self._forget(pull)
        return [AbortTransfer(pull.pull_id, reason)]

    def expire(self, now: float) -> list[Effect]:
        """Those that have waited for long enough compute their prefix here."""
        effects: list[Effect] = []
        for request in [each for each in self._waiting if self._deadline_of(each) <= now]:
            request.num_failed_pulls += 1
            asked_at = self._waiting[request].asked_at
            given_up = self.end(request, "late")
            if given_up:
                self._num_by_outcome[PullOutcome.LATE] += 1
                self._pull_speed.note_late(now - asked_at)
            effects += given_up
            self._queue(request, now)
        return effects

    # --- the pull's way, for ids that `awaits` knows ------------------------------------------------------------------

    def refused(self, event: PullRefused, now: float) -> list[Effect]:
        """Ask the other home, where there is one."""
        pull = self._pulls.get(event.pull_id)
        if pull is None or pull.written is not None:
            return []
        home = None if pull.asker is None else self._take_home(pull.asker)
        if pull.asker is None or home is None:
            return self._fail(pull, PullOutcome.REFUSED, now)
        self._num_by_outcome[PullOutcome.REFUSED] += 1
        for request in pull.requests:
            request.num_failed_pulls += 1
        del self._pulls[pull.pull_id]
        return [self._ask(pull, pull.asker, home, now)]

    def offered(self, event: TransferOffered, now: float) -> list[Effect]:
        """Make room in free and evictable blocks, or refuse with the numbers and compute here."""
        pull = self._pulls[event.transfer_id]
        if pull.written is not None:
            return []  # repeated
        num_asked = len(pull.block_hashes) - pull.first_block
        if not 0 < event.num_blocks <= num_asked:
            reason = f"{event.num_blocks} blocks offered, {num_asked} were asked for"
        else:
            answer = self._grant(pull, event.num_blocks)
            if isinstance(answer, GrantTransfer):
                return [answer]
            reason = answer
        return [RefuseTransfer(event.transfer_id, reason), *self._fail(pull, PullOutcome.REFUSED, now)]

    def arrived(self, event: TransferArrived, now: float) -> list[Effect]:
        """Its blocks are what was asked for by hash, so they may be found by these hashes from now on."""
        pull = self._pulls[event.transfer_id]
        if pull.written is None:
            return []  # nothing was granted that could have arrived
        self._manager.cache_leased(pull.pull_id, pull.block_hashes[: pull.written.stop])
        self._manager.release_lease(pull.pull_id)
        num_tokens = len(pull.written) * self._block_size
        self._num_by_outcome[PullOutcome.DONE] += 1
        self._num_tokens += num_tokens
        self._pull_speed.note_pull(num_tokens, event.transfer_s, now - pull.asked_at)
        for request in pull.requests:
            self._note_pulled(request, pull)
        return self._dissolve(pull, now)

    def lost(self, event: TransferLost, now: float) -> list[Effect]:
        self._manager.release_lease(event.transfer_id)
        return self._fail(self._pulls[event.transfer_id], PullOutcome.LOST, now)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _is_worth_it(self, request: Request, num_held_blocks: int, num_blocks: int, now: float) -> bool:
        """Whether blocks [num_held_blocks, num_blocks) come sooner from elsewhere than they are computed."""
        cost = self._pull_speed.cost
        if cost is None or num_held_blocks == num_blocks or self._deadline_of(request, now) <= now:
            return False
        pull_s = cost.pull_s((num_blocks - num_held_blocks) * self._block_size)
        return pull_s < self._prefill_s(request, num_held_blocks) - self._prefill_s(request, num_blocks)

    def _prefill_s(self, request: Request, num_held_blocks: int) -> float:
        num_cached_tokens = num_held_blocks * self._block_size
        return self._speed.prefill_s(request.num_tokens - num_cached_tokens, num_cached_tokens)

    def _deadline_of(self, request: Request, now: float = 0.0) -> float:
        """now counts for a request that begins to wait."""
        assert self._config is not None
        since = now if request.pulling_since is None else request.pulling_since
        return since + self._config.deadline_s

    def _take_home(self, request: Request) -> str | None:
        """The next home to ask. Each is asked once."""
        while request.unasked_home_ids:
            home = request.unasked_home_ids.pop(0)
            if home != self._worker_id:
                return home
        return None

    def _ask(self, pull: _Pull, asker: Request, home: str, now: float) -> RequestPull:
        assert self._new_pull_id is not None
        pull.asked_at = now
        pull.pull_id = self._new_pull_id()
        self._pulls[pull.pull_id] = pull
        hashes = pull.block_hashes[pull.first_block :]
        return RequestPull(pull.pull_id, home, asker.request_id, asker.attempt, hashes)

    def _grant(self, pull: _Pull, num_blocks: int) -> GrantTransfer | str:
        """Why not, where there is no room, or what stood before the blocks is gone and they would hang in the air."""
        stop = pull.first_block + num_blocks
        num_spare_blocks = self._scheduler.num_spoken_for_blocks
        granted = self._manager.grant_prefix(pull.pull_id, pull.block_hashes[:stop], pull.first_block, num_spare_blocks)
        if granted is None:
            return (
                f"{num_blocks} blocks needed behind {pull.first_block} cached ones, "
                f"{self._manager.num_available_blocks} of {self._manager.num_blocks} available, "
                f"{num_spare_blocks} of them spoken for"
            )
        num_held_blocks, block_ids = granted
        pull.written = range(num_held_blocks, stop)
        return GrantTransfer(pull.pull_id, num_held_blocks - pull.first_block, tuple(block_ids))

    def _note_pulled(self, request: Request, pull: _Pull) -> None:
        """A request that joined may share the first of the blocks only."""
        assert pull.written is not None
        hashes, _ = self._manager.prefix(request)
        for place in pull.written:
            if place >= len(hashes) or hashes[place] != pull.block_hashes[place]:
                return
            request.pulled_blocks.add(place)

    def _fail(self, pull: _Pull, outcome: PullOutcome, now: float) -> list[Effect]:
        self._num_by_outcome[outcome] += 1
        for request in pull.requests:
            request.num_failed_pulls += 1
        return self._dissolve(pull, now)

    def _dissolve(self, pull: _Pull, now: float) -> list[Effect]:
        """The asker has had its answer; those that joined may have homes of their own to ask for the rest."""
        self._forget(pull)
        for request in pull.requests:
            del self._waiting[request]
        if pull.asker is not None:
            self._queue(pull.asker, now)
        effects: list[Effect] = []
        for request in pull.requests:
            if request is not pull.asker:
                effects += self.add(request, now)
        return effects

    def _forget(self, pull: _Pull) -> None:
        del self._pulls[pull.pull_id]
        for block_hash in pull.block_hashes[pull.first_block :]:
            if self._pull_by_hash.get(block_hash) is pull:
                del self._pull_by_hash[block_hash]

    def _wait(self, request: Request, pull: _Pull, now: float) -> None:
        request.status = RequestStatus.WAITING_FOR_REMOTE_KV
        if request.pulling_since is None:
            request.pulling_since = now
        pull.requests.append(request)
        self._waiting[request] = pull

    def _queue(self, request: Request, now: float) -> None:
        """By its arrival, as if it had been in the queue all the time."""
        if request.pulling_since is not None:
            request.pull_s = now - request.pulling_since
        self._scheduler.add(request)
