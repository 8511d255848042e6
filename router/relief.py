"""Which running decodes move to which worker, so that none runs out of memory while others have room (Llumnix, OSDI'24,
section 4.4: the least free worker is paired with the most free one). Names the moves and carries none out; knows
requests and workers as values only, and how much longer requests go on as a guess that is handed in.

Nothing swings back and forth: a worker that takes a request stays above the threshold below which it would give some
away, and stays as free as the one that gave it, so a load that does not change is at rest after finitely many moves.
Against loads that do change, neither a request nor the same pair of workers the other way round moves within
`cooldown_s`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from router.events import MigrationWanted
from router.freeness import DecodeLoad, WorkerLoad

FAILED_PAUSE_S = 2.0  # between two workers, after a move that was refused or lost
BURST_S = 1.0  # of the byte rate, that a worker which has moved nothing may move at once


@dataclass(frozen=True, slots=True)
class ReliefConfig:
    low_freeness: float = 64.0  # steps to full memory, below which a worker gives requests away
    high_freeness: float = 256.0  # and above which one takes them
    priority_headroom: float = 0.1  # share of a worker's memory kept free beside requests with a priority above 0
    min_remaining_tokens: int = 64  # that a request is expected to add; one that ends sooner stays
    max_migrations: int = 2  # under way at a time, from and to one worker
    max_nbytes_per_s: float = 1e9  # of KV that leaves or reaches one worker; bursts of one second
    cooldown_s: float = 5.0  # before the same request moves again, or one between the same workers the other way

    def __post_init__(self) -> None:
        if not 0 <= self.low_freeness < self.high_freeness < math.inf:
            raise ValueError(
                f"low_freeness must be in [0, high_freeness {self.high_freeness}) and both finite, got "
                f"{self.low_freeness}"
            )
        if not 0 <= self.priority_headroom < 1:
            raise ValueError(f"priority_headroom must be in [0, 1), got {self.priority_headroom}")
        for name in ("min_remaining_tokens", "max_migrations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.max_nbytes_per_s < math.inf:
            raise ValueError(f"max_nbytes_per_s must be above 0 and finite, got {self.max_nbytes_per_s}")
        if not 0 <= self.cooldown_s < math.inf:
            raise ValueError(f"cooldown_s must be finite and not negative, got {self.cooldown_s}")


class Relief:
    """Invariant: `_moved_at` has the requests, and `_paired_at` the pairs (from, to), of the last `cooldown_s`,
    `_failed_at` the pairs between which a move has failed in the last FAILED_PAUSE_S; `_paid_until` says of each worker
    until when what it has moved uses up its byte rate."""

    def __init__(self, config: ReliefConfig, block_size: int, only_leaving: bool = False) -> None:
        """only_leaving: nobody gives requests away but workers that are to end."""
        self._config = config
        self._block_size = block_size
        self._low = -math.inf if only_leaving else config.low_freeness
        self._moved_at: dict[str, float] = {}
        self._paired_at: dict[tuple[str, str], float] = {}
        self._failed_at: dict[tuple[str, str], float] = {}
        self._paid_until: dict[str, float] = {}

    def failed(self, source_id: str, destination_id: str, now: float) -> None:
        """A move between the two was refused or lost: whatever the reason, it may be there for a while."""
        self._failed_at[source_id, destination_id] = now

    def decide(self, loads: Sequence[WorkerLoad], now: float) -> list[MigrationWanted]:
        """What should begin now. Each of these counts as begun, also where it turns out that it cannot be."""
        self._forget(now)
        workers = [_Worker(load, self._config.priority_headroom, self._block_size) for load in loads]
        wanted: list[MigrationWanted] = []
        while (move := self._next(workers, now)) is not None:
            request, source, destination = move
            wanted.append(MigrationWanted(request.request_id, destination.worker_id, self._reason(*move)))
            source.give(request)
            destination.take(request)
            self._note(request, source, destination, now)
        return wanted

    def _next(self, workers: Sequence[_Worker], now: float) -> tuple[DecodeLoad, _Worker, _Worker] | None:
        """The least free worker that can be helped, and the most free one that can take something of it."""
        ready = [worker for worker in workers if self._has_budget(worker, now)]
        ready.sort(key=lambda worker: (worker.freeness, worker.worker_id))
        for source in ready:
            if not source.is_leaving and source.freeness >= self._low:
                break
            for destination in reversed(ready):
                request = self._choose(source, destination, now) if self._may_take(destination, source, now) else None
                if request is not None:
                    return request, source, destination
        return None

    def _may_take(self, worker: _Worker, source: _Worker, now: float) -> bool:
        """Where a worker is to end, whoever has room may take its requests."""
        above = self._config.low_freeness if source.is_leaving else self._config.high_freeness
        back_at = self._paired_at.get((worker.worker_id, source.worker_id), -math.inf)
        failed_at = self._failed_at.get((source.worker_id, worker.worker_id), -math.inf)
        has_failed = now - failed_at < FAILED_PAUSE_S and not source.is_leaving  # that one has no time to rest
        is_calm = now - back_at >= self._config.cooldown_s and not has_failed
        return worker.freeness > above and worker.runs_one_more and is_calm

    def _choose(self, source: _Worker, destination: _Worker, now: float) -> DecodeLoad | None:
        """Of the least urgent, the one with the least KV: it is over there soonest."""
        for one in source.movable:
            after = destination.room.beside(one).freeness(self._block_size)
            left = source.room.without(one).freeness(self._block_size)
            if after > self._config.low_freeness and after >= left and self._pays(one, source, now):
                return one
        return None

    def _pays(self, request: DecodeLoad, source: _Worker, now: float) -> bool:
        """One that could not go a moment ago must not keep others from going, also where all have to go."""
        is_long = source.is_leaving or request.num_remaining_tokens >= self._config.min_remaining_tokens
        return is_long and now - self._moved_at.get(request.request_id, -math.inf) >= self._config.cooldown_s

    def _has_budget(self, worker: _Worker, now: float) -> bool:
        is_paid = self._paid_until.get(worker.worker_id, now) - now < BURST_S
        return is_paid and worker.num_migrations < self._config.max_migrations

    def _reason(self, request: DecodeLoad, source: _Worker, destination: _Worker) -> str:
        why = "is to end" if source.is_leaving else f"is full in {source.freeness:.0f} steps"
        return (
            f"{source.worker_id} {why}, {destination.worker_id} in {destination.freeness:.0f}; {request.num_blocks} "
            f"blocks to move, about {request.num_remaining_tokens} tokens to come"
        )

    # --- memory -------------------------------------------------------------------------------------------------------

    def _note(self, request: DecodeLoad, source: _Worker, destination: _Worker, now: float) -> None:
        pair = source.worker_id, destination.worker_id
        self._moved_at[request.request_id] = self._paired_at[pair] = now
        move_s = request.num_blocks * source.block_nbytes / self._config.max_nbytes_per_s
        for worker_id in pair:
            self._paid_until[worker_id] = max(now, self._paid_until.get(worker_id, now)) + move_s

    def _forget(self, now: float) -> None:
        oldest = now - self._config.cooldown_s
        self._moved_at = {each: at for each, at in self._moved_at.items() if at > oldest}
        self._paired_at = {each: at for each, at in self._paired_at.items() if at > oldest}
        self._failed_at = {each: at for each, at in self._failed_at.items() if at > now - FAILED_PAUSE_S}
        self._paid_until = {each: until for each, until in self._paid_until.items() if until > now}


class _Worker:
    """A worker as it will be when what is decided so far is done. Invariant: `movable` are the requests that may move
    from it, least urgent first, then by KV."""

    def __init__(self, load: WorkerLoad, headroom: float, block_size: int) -> None:
        self.worker_id = load.worker_id
        self.is_leaving = load.is_leaving
        self.num_migrations = load.num_migrations
        self.block_nbytes = load.block_nbytes
        self.room = load.room(headroom)
        may_move = (one for one in load.requests if one.may_move)
        self.movable = sorted(may_move, key=lambda one: (one.priority, one.num_blocks, one.request_id))
        self._block_size = block_size
        self._max_num_seqs = load.max_num_seqs or math.inf

    @property
    def runs_one_more(self) -> bool:
        """At once, beside those that are there."""
        return self.room.num_requests < self._max_num_seqs

    @property
    def freeness(self) -> float:
        return self.room.freeness(self._block_size)

    def give(self, request: DecodeLoad) -> None:
        self.room = self.room.without(request)
        self.movable.remove(request)
        self.num_migrations += 1

    def take(self, request: DecodeLoad) -> None:
        """What has just come moves no further."""
        self.room = self.room.beside(request)
        self.num_migrations += 1
