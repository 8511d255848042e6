"""What is known of a worker when a request is placed, the orders by load, and which of several workers decodes. Who
prefills is policies/ to say; who the candidates are is decided elsewhere (placement.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a policy may know about a worker, for one request."""

    worker_id: str
    num_cached_tokens: int = 0  # of this request's tokens, by the router's guess
    num_pending_tokens: int = 0  # of other requests: placed there and not yet prefilled, less what is cached
    backlog_s: float = 0.0  # to prefill these; 0 until a speed is known, like prefill_s
    prefill_s: float = 0.0  # to prefill what is not cached of this request
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_requests: int = 0  # placed there to decode
    num_peak_blocks: int = 0  # held there at once at the worst moment to come, this request included

    @property
    def ttft_s(self) -> float:
        """The estimate, where nothing is pulled."""
        return self.backlog_s + self.prefill_s


@dataclass(frozen=True, slots=True)
class Choice:
    worker_id: str
    reason: str  # goes into the log line and the reply: every route explains itself
    sources: tuple[str, ...] = ()  # workers to pull KV from, best first; empty: the home pair


class WorkerLoad(Protocol):
    """What the load orders below are made of: a Candidate, or a worker that a ranking keeps in its place."""

    @property
    def worker_id(self) -> str: ...

    @property
    def num_pending_tokens(self) -> int: ...

    @property
    def num_free_blocks(self) -> int: ...

    @property
    def num_requests(self) -> int: ...


def by_pending(load: WorkerLoad) -> tuple[int, int, str]:
    """The fewest prompt tokens in front first."""
    return load.num_pending_tokens, load.num_requests, load.worker_id


def by_room(load: WorkerLoad) -> tuple[int, int, str]:
    """The most room for KV first; among equals the one that decodes fewer requests."""
    return -load.num_free_blocks, load.num_requests, load.worker_id


class Policy(Protocol):
    """Of a decode worker. It sees plain values and keeps nothing."""

    def choose(self, num_tokens: int, candidates: Sequence[Candidate]) -> Choice:
        """One of the candidates, which are never empty, for a request of num_tokens tokens."""


@dataclass(frozen=True, slots=True)
class MostFreeBlocks:
    """The candidate with the most room for KV; among equals the one that decodes fewer requests."""

    def choose(self, num_tokens: int, candidates: Sequence[Candidate]) -> Choice:
        free = min(candidates, key=by_room)
        return Choice(
            free.worker_id,
            f"most room: {free.num_free_blocks} of {free.num_blocks} blocks free, {free.num_requests} requests there",
        )
