"""What all routers of a cluster share: who its workers are and which routing keys are extended, under one version
number. Plain values; who decides them is cluster/view_publisher.py."""

from __future__ import annotations

from dataclasses import dataclass

from protos.types import PeerRef
from router.key_depth import DepthSnapshot


@dataclass(frozen=True, slots=True)
class KnownWorker:
    ref: PeerRef
    pid: int
    is_up: bool


@dataclass(frozen=True, slots=True)
class PublishedView:
    """Two routers that stand at the same version name the same home pairs."""

    version: int = 0
    workers: tuple[KnownWorker, ...] = ()  # the last life of each
    was_ready: bool = False  # the cluster has been whole once: a router that comes later need not wait for that
    depths: DepthSnapshot | None = None  # None: a router that has no other beside it decides for itself

    @property
    def members(self) -> tuple[PeerRef, ...]:
        """Who is up."""
        return tuple(worker.ref for worker in self.workers if worker.is_up)


@dataclass(frozen=True, slots=True)
class Lacking:
    """A member that a router does not reach."""

    ref: PeerRef
    reason: str


@dataclass(frozen=True, slots=True)
class RouterNews:
    """What a router tells the publisher: all the members that it lacks now, and the prefixes of the requests that it
    took since it last said so."""

    lacking: tuple[Lacking, ...] = ()
    observed: tuple[tuple[bytes, ...], ...] = ()
