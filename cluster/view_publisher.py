"""The view that all routers share, and when it changes: who is up, whose loss is a death, which routing keys are
extended. Knows routers by their ids and what they say; sends nothing."""

from __future__ import annotations

from dataclasses import replace

from protos.types import PeerRef, Role
from router.config import RouterConfig
from router.key_depth import KeyDepths
from router.published_view import KnownWorker, Lacking, PublishedView, RouterNews


class ViewPublisher:
    """Invariant: the version rises with every change of the view and with nothing else. A worker is up in it from
    `joined` until every router that is up lacks it, or until `left`; from `draining` on nothing new goes there."""

    def __init__(self, config: RouterConfig, num_routers: int) -> None:
        self._mode = config.mode
        shares_depths = config.adapts_key_depth and num_routers > 1
        self._depths = KeyDepths(config.key_depth) if shares_depths else None
        self.view = PublishedView(depths=self._depths.table.snapshot() if self._depths else None)
        self._lacking: dict[str, dict[PeerRef, Lacking]] = {}  # by router that is up
        self._idle: dict[str, frozenset[PeerRef]] = {}  # likewise

    def ready(self) -> None:
        """The cluster is whole, for the first time."""
        self._publish(replace(self.view, was_ready=True))

    def expect(self, num_prefill: int, num_decode: int) -> None:
        """So many workers there should be."""
        if self.view.num_expected != (num_prefill, num_decode):
            self._publish(replace(self.view, num_expected=(num_prefill, num_decode)))

    # --- workers --------------------------------------------------------------------------------------------------

    def joined(self, ref: PeerRef, pid: int) -> None:
        """It takes the place of an earlier life of the same worker."""
        for lacking in self._lacking.values():
            lacking.pop(ref, None)  # said before it joined
        workers = {worker.ref.worker_id: worker for worker in self.view.workers}
        workers[ref.worker_id] = KnownWorker(ref, pid, is_up=True)
        self._publish(replace(self.view, workers=tuple(workers.values())))

    def draining(self, ref: PeerRef) -> None:
        """Nothing happens where this life is gone, or drains already."""
        if ref in self.view.members and ref not in self.view.draining:
            workers = (replace(one, is_draining=one.is_draining or one.ref == ref) for one in self.view.workers)
            self._publish(replace(self.view, workers=tuple(workers)))

    def is_idle(self, ref: PeerRef) -> bool:
        """Whether every router that is up has said that it needs this draining one no more, or it is gone."""
        return ref not in self.view.members or (bool(self._idle) and all(ref in said for said in self._idle.values()))

    def left(self, ref: PeerRef) -> None:
        """On purpose: nobody is to miss it. Nothing happens where this life is gone already."""
        rest = tuple(worker for worker in self.view.workers if worker.ref != ref)
        if len(rest) < len(self.view.workers):
            self._publish(replace(self.view, workers=rest))

    # --- routers --------------------------------------------------------------------------------------------------

    def router_up(self, router_id: str) -> None:
        self._lacking[router_id] = {}
        self._idle[router_id] = frozenset()

    def router_down(self, router_id: str) -> tuple[Lacking, ...]:
        """Who is lost with it: the workers that it alone could still reach."""
        self._lacking.pop(router_id, None)
        self._idle.pop(router_id, None)
        return self._lose_unreached()

    def heard(self, router_id: str, news: RouterNews) -> tuple[Lacking, ...]:
        """Whom no router reaches any more: they are gone from the view."""
        if router_id not in self._lacking:
            return ()
        self._lacking[router_id] = {one.ref: one for one in news.lacking}
        self._idle[router_id] = frozenset(news.idle)
        self._observe(news.observed)
        return self._lose_unreached()

    # --- changes --------------------------------------------------------------------------------------------------

    def _lose_unreached(self) -> tuple[Lacking, ...]:
        """One router alone may have lost its way to a worker that serves the others."""
        if not self._lacking:
            return ()
        first, *others = self._lacking.values()
        lost = [ref for ref in self.view.members if ref in first and all(ref in other for other in others)]
        if lost:
            workers = (replace(one, is_up=one.is_up and one.ref not in lost) for one in self.view.workers)
            self._publish(replace(self.view, workers=tuple(workers)))
        return tuple(first[ref] for ref in lost)

    def _observe(self, observed: tuple[tuple[bytes, ...], ...]) -> None:
        num_workers = sum(ref.role is Role.PREFILL or self._mode == "colocated" for ref in self.view.members)
        if self._depths is None or num_workers == 0:
            return
        version = self._depths.table.version
        for links in observed:
            self._depths.observe(links, num_workers)
        if self._depths.table.version != version:
            self._publish(replace(self.view, depths=self._depths.table.snapshot()))

    def _publish(self, view: PublishedView) -> None:
        self.view = replace(view, version=self.view.version + 1)
