"""What operators are told: which workers are known, what has happened, and whether the cluster is ready. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from protos.types import PeerRef, Role
from router.cluster_view import ClusterView
from router.config import RouterConfig
from router.published_view import KnownWorker

MAX_EVENTS = 256


@dataclass(frozen=True, slots=True)
class StatusEvent:
    at_unix_s: float
    message: str


class ClusterStatus:
    """Invariant: `known` has the last life of every worker of the published view."""

    def __init__(self, config: RouterConfig, view: ClusterView, router_id: str = "router-0") -> None:
        self.router_id = router_id
        self.known: dict[str, KnownWorker] = {}
        self.events: deque[StatusEvent] = deque(maxlen=MAX_EVENTS)
        self.view_version = 0  # of the published view; 0 while this router lacks a member of it
        self.num_changes = 0  # of who is up: the rings stay as they are in between
        self._config = config
        self._view = view
        self._max_kv_tokens = 0
        self.num_expected: dict[Role, int] = {Role.PREFILL: 0, Role.DECODE: 0}

    def set_expected(self, num_prefill: int, num_decode: int) -> None:
        self.num_expected = {Role.PREFILL: num_prefill, Role.DECODE: num_decode}

    def note(self, worker: KnownWorker) -> None:
        self.known[worker.ref.worker_id] = worker

    def note_up(self, ref: PeerRef) -> None:
        self._note_is_up(ref, True)

    def note_down(self, ref: PeerRef) -> None:
        self._note_is_up(ref, False)

    def _note_is_up(self, ref: PeerRef, is_up: bool) -> None:
        self.num_changes += 1
        worker = self.known.get(ref.worker_id)
        if worker is not None and worker.ref == ref:
            self.known[ref.worker_id] = replace(worker, is_up=is_up)

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

    def serves_the_view(self) -> bool:
        """Every member is reached and has reported; there may be fewer of them than expected."""
        return self.view_version > 0 and all(view.stats.num_blocks for view in self._view.workers.values())

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
