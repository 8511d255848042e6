"""How busy each worker is, over time, and how long there was one. Looks on; changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from protos.types import PeerRef, Role
from router.cluster_view import ClusterView
from simulator.result import LoadSample, WorkerSpan, WorkerUse
from simulator.worker import SimulatedWorker


@dataclass(slots=True)
class _Watched:
    ref: PeerRef
    engine: SimulatedWorker
    joined_at: float
    left_at: float | None = None
    sampled_busy_s: float = 0.0


class LoadProbe:
    """Invariant: `_watched` has every life of every worker, in the order of joining; a life that has ended is not
    sampled any more."""

    def __init__(self, view: ClusterView) -> None:
        self.samples: list[LoadSample] = []
        self._view = view
        self._watched: list[_Watched] = []
        self._begun: dict[str, tuple[Role, float]] = {}
        self._ended: list[WorkerSpan] = []
        self._sampled_at = 0.0

    def started(self, worker_id: str, role: Role, now: float) -> None:
        """Its process: it joins later, or never."""
        self._begun[worker_id] = role, now

    def joined(self, ref: PeerRef, engine: SimulatedWorker, now: float) -> None:
        self._begun.setdefault(ref.worker_id, (ref.role, now))
        self._watched.append(_Watched(ref, engine, now))

    def left(self, worker_id: str, now: float) -> None:
        self._ended.append(WorkerSpan(worker_id, *self._begun.pop(worker_id), now))
        for each in self._watched:
            if each.ref.worker_id == worker_id and each.left_at is None:
                each.left_at = now

    def sample(self, now: float) -> None:
        """The interval since the last sample, of the workers that prefill and are up."""
        shares: dict[str, float] = {}
        for each in self._watched:
            span_s = now - max(self._sampled_at, each.joined_at)
            if each.left_at is not None or each.ref.role is not Role.PREFILL or span_s <= 0:  # 0: it joins just now
                continue
            busy_s = each.engine.busy_until(now)
            shares[each.ref.worker_id] = (busy_s - each.sampled_busy_s) / span_s
            each.sampled_busy_s = busy_s
        pending = tuple(self._num_pending_tokens(worker_id) for worker_id in shares)
        self.samples.append(LoadSample(now, tuple(shares), tuple(shares.values()), pending))
        self._sampled_at = now

    def spans(self, now: float) -> tuple[WorkerSpan, ...]:
        """Of all processes, those too that are still there."""
        return (*self._ended, *(WorkerSpan(worker_id, *begun, now) for worker_id, begun in self._begun.items()))

    def uses(self, now: float) -> tuple[WorkerUse, ...]:
        """Of every life."""
        return tuple(
            WorkerUse(
                each.ref.worker_id,
                each.engine.busy_s / max(1e-9, (now if each.left_at is None else each.left_at) - each.joined_at),
                each.engine.num_steps,
            )
            for each in self._watched
        )

    def _num_pending_tokens(self, worker_id: str) -> int:
        view = self._view.workers.get(worker_id)
        return 0 if view is None else view.num_pending_tokens
