"""How the pools do, as one router sees it: sums that may be added up over routers and over time. Decides nothing; what
is made of them is autoscaler.py's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from protos.types import FinishReason, Role
from router.cluster_view import ClusterView, WorkerView
from router.config import RouterConfig
from router.events import Deliver, Fail, RefusedFor

# Which pools were too small for a request that was refused. Other reasons are no want of workers.
SHORT_OF: Mapping[RefusedFor, tuple[Role, ...]] = {
    RefusedFor.SLO: (Role.PREFILL,),
    RefusedFor.WORKERS_FULL: (Role.DECODE,),
    RefusedFor.MAX_IN_FLIGHT: (Role.PREFILL, Role.DECODE),
}


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """A look at a pool of which no worker was up counts as none."""

    num_ended: int = 0  # requests, refused ones too
    num_in_slo: int = 0  # of them: TTFT for prefill, TPOT for decode
    num_looks: int = 0
    queue: float = 0.0  # work that waits, per worker, in TTFT SLOs: summed over the looks
    use: float = 0.0  # share that is in use, which all routers see alike: summed over the looks
    use_elsewhere: float = 0.0  # what this router's requests would use of it beside, and use elsewhere: likewise

    def __add__(self, other: PoolCounts) -> PoolCounts:
        return PoolCounts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


class PoolWatch:
    """Invariant: it has what was seen since take() was last called."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._counts = dict.fromkeys(Role, PoolCounts())

    def heard(self, effect: Deliver | Fail) -> None:
        """A word to a client. One that ends a request counts, unless the request was cut off; one that refuses it for
        want of room is an SLO that was missed, in the pools that could have had that room."""
        if isinstance(effect, Fail):
            for role in self._short_of(effect.refused_for):
                self._counts[role] += PoolCounts(num_ended=1)
        elif effect.account is not None and effect.finish_reason is not FinishReason.ABORT:
            self._ended(effect.account.ttft_s, effect.account.tpot_s)

    def _short_of(self, reason: RefusedFor | None) -> Sequence[Role]:
        """Where every worker does both there is one pool."""
        roles = () if reason is None else SHORT_OF.get(reason, ())
        return (Role.PREFILL,) if roles and self._config.mode == "colocated" else roles

    def _ended(self, ttft_s: float, tpot_s: float) -> None:
        for role, took_s, slo_s in (
            (Role.PREFILL, ttft_s, self._config.ttft_slo_s),
            (Role.DECODE, tpot_s, self._config.tpot_slo_s),
        ):
            self._counts[role] += PoolCounts(num_ended=1, num_in_slo=took_s <= slo_s)

    def look(self, view: ClusterView) -> None:
        """At regular times. What decodes on a worker that prefills, because no other one had room, is work that the
        decode pool lacks workers for."""
        prefill, decode = view.prefill_workers(), view.decode_workers()
        if prefill:
            self._note(Role.PREFILL, prefill, _prefills)
        if decode:
            num_blocks = sum(worker.stats.num_blocks for worker in decode)
            num_local_blocks = sum(worker.placed_blocks.total for worker in prefill)
            local = num_local_blocks / num_blocks if num_blocks else 0.0
            self._note(Role.DECODE, decode, _kv_use, local)

    def _note(
        self, role: Role, pool: Sequence[WorkerView], use_of: Callable[[WorkerView], float], elsewhere: float = 0.0
    ) -> None:
        queue, use = _queue_s(pool) / max(1e-3, self._config.ttft_slo_s), sum(map(use_of, pool)) / len(pool)
        self._counts[role] += PoolCounts(num_looks=1, queue=queue, use=use, use_elsewhere=elsewhere)

    def take(self) -> dict[Role, PoolCounts]:
        counts, self._counts = self._counts, dict.fromkeys(Role, PoolCounts())
        return counts


def _queue_s(pool: Sequence[WorkerView]) -> float:
    return sum(worker.sent_s + worker.queue.work_s for worker in pool) / len(pool)


def _prefills(worker: WorkerView) -> bool:
    return worker.stats.num_pending_prefill_tokens > 0


def _kv_use(worker: WorkerView) -> float:
    """Of its KV memory; what is only cached makes room."""
    stats = worker.stats
    return (stats.num_held_blocks + stats.num_leased_blocks) / stats.num_blocks if stats.num_blocks else 0.0
