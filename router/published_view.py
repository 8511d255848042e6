"""What all routers of a cluster share: who its workers are and which routing keys are extended, under one version
number. Plain values; who decides them is cluster/view_publisher.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from protos.types import PeerRef, Role
from router.key_depth import DepthSnapshot
from router.pool_counts import PoolCounts


@dataclass(frozen=True, slots=True)
class KnownWorker:
    ref: PeerRef
    pid: int
    is_up: bool
    is_draining: bool = False  # it finishes what it has, and leaves: nothing new goes there


@dataclass(frozen=True, slots=True)
class PublishedView:
    """Two routers that stand at the same version name the same home pairs."""

    version: int = 0
    workers: tuple[KnownWorker, ...] = ()  # the last life of each
    num_expected: tuple[int, int] = (0, 0)  # workers that there should be: prefill, decode
    was_ready: bool = False  # the cluster has been whole once: a router that comes later need not wait for that
    depths: DepthSnapshot | None = None  # None: a router that has no other beside it decides for itself

    @property
    def members(self) -> tuple[PeerRef, ...]:
        """Who is up."""
        return tuple(worker.ref for worker in self.workers if worker.is_up)

    @property
    def draining(self) -> tuple[PeerRef, ...]:
        """Those of them that take nothing new."""
        return tuple(worker.ref for worker in self.workers if worker.is_up and worker.is_draining)


@dataclass(frozen=True, slots=True)
class Lacking:
    """A member that a router does not reach."""

    ref: PeerRef
    reason: str


@dataclass(frozen=True, slots=True)
class Drain:
    """A worker, or a router, finishes what it has and leaves."""

    who: str  # its id
    timeout_s: float | None = None  # then it leaves whatever it has; None: as the settings say
    replaces: bool = False  # another one takes its place


@dataclass(frozen=True, slots=True)
class Scale:
    """Pools get so many workers; those not named stay as they are."""

    sizes: tuple[tuple[str, int], ...]  # by pool


Order = Drain | Scale


@dataclass(frozen=True, slots=True)
class PlacedOrder:
    order_id: int  # among those of one router
    order: Order


@dataclass(frozen=True, slots=True)
class RouterNews:
    """What a router tells the publisher: all the members that it lacks now, that want to leave, and that drain and have
    nothing more to do for it; and since it last said so, the prefixes of the requests that it took, operators' orders,
    and how the pools did."""

    lacking: tuple[Lacking, ...] = ()
    leaving: tuple[PeerRef, ...] = ()
    idle: tuple[PeerRef, ...] = ()
    observed: tuple[tuple[bytes, ...], ...] = ()
    orders: tuple[PlacedOrder, ...] = ()
    pools: Mapping[Role, PoolCounts] = field(default_factory=dict)
