"""What operators are told: which workers are known, what has happened, and whether the cluster is ready. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from protos.types import PeerRef, Role
from router.cluster_view import ClusterView
from router.config import RouterConfig

MAX_EVENTS = 256


@dataclass(frozen=True, slots=True)
class KnownWorker:
    ref: PeerRef
    pid: int
    is_up: bool


@dataclass(frozen=True, slots=True)
class StatusEvent:
    at_unix_s: float
    message: str


class ClusterStatus:
    """Invariant: `known` has the last life of every worker that was added and not yet removed."""

    def __init__(self, config: RouterConfig, view: ClusterView) -> None:
        self.known: dict[str, KnownWorker] = {}
        self.events: deque[StatusEvent] = deque(maxlen=MAX_EVENTS)
        self.membership_version = 0
        self._config = config
        self._view = view
        self._max_kv_tokens = 0
        self.num_expected: dict[Role, int] = {Role.PREFILL: 0, Role.DECODE: 0}

    def set_expected(self, num_prefill: int, num_decode: int) -> None:
        self.num_expected = {Role.PREFILL: num_prefill, Role.DECODE: num_decode}

    def note_up(self, ref: PeerRef, pid: int) -> None:
        self.known[ref.worker_id] = KnownWorker(ref, pid, is_up=True)

    def note_down(self, ref: PeerRef) -> None:
        worker = self.known.get(ref.worker_id)
        if worker is not None and worker.ref == ref:
            self.known[ref.worker_id] = replace(worker, is_up=False)

    def shortfall(self) -> str:
        """What is missing before the cluster is ready; empty when it is."""
        num_expected = sum(self.num_expected.values())
        num_up = sum(min(self._num_up(role), self.num_expected[role]) for role in Role)
        if num_expected == 0:
            return "no workers are configured yet"
        if num_up < num_expected:
            return f"{num_up} of {num_expected} workers loaded"
        num_blank = sum(view.stats.num_blocks == 0 for view in self._view.workers.values())
        if num_blank:
            return f"{num_blank} of {num_expected} workers have not reported yet"
        return self._missing_links()

    def _num_up(self, role: Role) -> int:
        return sum(view.ref.role is role for view in self._view.workers.values())

    def _missing_links(self) -> str:
        """KV may be asked to move from every prefill worker to every decode worker."""
        decode = {view.worker_id for view in self._view.decode_workers()}
        prefill = self._view.prefill_workers()
        num_warm = sum(len(decode.intersection(view.stats.warm_links)) for view in prefill)
        num_links = len(decode) * len(prefill)
        return "" if num_warm == num_links else f"{num_warm} of {num_links} links between workers warm"

    def max_kv_tokens(self) -> int:
        """What the smallest worker's KV pool holds: a request must fit wherever it goes. While no worker is up, the
        last known size stands in, because requests may wait for one."""
        sizes = [view.stats.num_blocks for view in self._view.workers.values() if view.stats.num_blocks]
        if sizes:
            self._max_kv_tokens = min(sizes) * self._config.block_size
        return self._max_kv_tokens
