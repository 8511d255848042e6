"""Which of several candidate workers takes a request, and why. Policies see plain values and keep nothing; who the
candidates are is decided elsewhere (placement.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a policy may know about a worker, for one request."""

    worker_id: str
    num_cached_tokens: int = 0  # of this request's tokens, by the router's guess
    num_pending_tokens: int = 0  # of other requests: sent there and not yet prefilled
    prefill_s_per_token: float = 0.0  # measured by the worker; 0 until it has measured
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_requests: int = 0  # placed there to decode


@dataclass(frozen=True, slots=True)
class Choice:
    worker_id: str
    reason: str  # goes into the log line and the reply: every route explains itself


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
    def choose(self, num_tokens: int, candidates: Sequence[Candidate]) -> Choice:
        """One of the candidates, which are never empty, for a request of num_tokens tokens."""


@dataclass(frozen=True, slots=True)
class DualMap:
    """Affinity while the warm candidate is expected to meet the TTFT SLO, else the lighter one (DualMap, ICLR 2026)."""

    ttft_slo_s: float

    def choose(self, num_tokens: int, candidates: Sequence[Candidate]) -> Choice:
        warm = min(candidates, key=lambda c: (num_tokens - c.num_cached_tokens, _load(num_tokens, c), c.worker_id))
        ttft_s = ttft_estimate_s(num_tokens, warm)
        cached = f"{warm.num_cached_tokens} of {num_tokens} tokens cached"
        if ttft_s <= self.ttft_slo_s:
            return Choice(warm.worker_id, f"affinity: {cached}, TTFT {ttft_s:.2f} s <= {self.ttft_slo_s:g} s")
        light = min(candidates, key=lambda c: (ttft_estimate_s(num_tokens, c), _load(num_tokens, c), c.worker_id))
        if light.worker_id == warm.worker_id:
            return Choice(warm.worker_id, f"affinity: {cached}, TTFT {ttft_s:.2f} s, and no candidate is lighter")
        return Choice(
            light.worker_id,
            f"load: TTFT {ttft_estimate_s(num_tokens, light):.2f} s, warm {warm.worker_id} {ttft_s:.2f} s"
            f" > {self.ttft_slo_s:g} s",
        )


@dataclass(frozen=True, slots=True)
class LeastPending:
    """The candidate with the fewest prompt tokens before this request; for prompts that have no home."""

    def choose(self, num_tokens: int, candidates: Sequence[Candidate]) -> Choice:
        light = min(candidates, key=by_pending)
        return Choice(
            light.worker_id,
            f"no home: {num_tokens} tokens fill no hash block; lightest with {light.num_pending_tokens} tokens pending",
        )


@dataclass(frozen=True, slots=True)
class MostFreeBlocks:
    """The candidate with the most room for KV; among equals the one that decodes fewer requests."""

    def choose(self, num_tokens: int, candidates: Sequence[Candidate]) -> Choice:
        free = min(candidates, key=by_room)
        return Choice(
            free.worker_id,
            f"most room: {free.num_free_blocks} of {free.num_blocks} blocks free, {free.num_requests} requests there",
        )


def _load(num_tokens: int, candidate: Candidate) -> int:
    return candidate.num_pending_tokens + num_tokens - candidate.num_cached_tokens


def ttft_estimate_s(num_tokens: int, candidate: Candidate) -> float:
    """The estimate; 0 until the worker has measured its speed."""
    return _load(num_tokens, candidate) * candidate.prefill_s_per_token
