"""Keeps one router connected to the members of the published view, and says which of them it lacks. Whether one that it
lacks is gone is not decided here: another router may reach it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

from protos.types import PeerRef, WorkerReport
from router.config import RouterConfig
from router.driver import Driver
from router.events import DepthsPublished, Reported, WorkerDown, WorkerDraining, WorkerUp
from router.orders import Orders
from router.published_view import Lacking, PublishedView, RouterNews
from router.status import ClusterStatus
from router.worker_channel import RouterIdentity, WorkerChannel

RETRY_S = 1.0  # between two tries to reach a member
NEWS_INTERVAL_S = 0.5  # the longest silence


class Membership:
    """Invariant: the Router knows as up exactly the workers that have a channel, all of them members; every other
    member is being tried."""

    def __init__(
        self,
        config: RouterConfig,
        identity: RouterIdentity,
        driver: Driver,
        status: ClusterStatus,
        note_event: Callable[[str], None],
        orders: Orders,
    ) -> None:
        self._config = config
        self._identity = identity
        self._driver = driver
        self._status = status
        self._note_event = note_event
        self._orders = orders
        self._view = PublishedView()
        self._lacking: dict[PeerRef, Lacking] = {}  # from its loss until it is heard again
        self._tries: dict[PeerRef, asyncio.Task[Lacking | None]] = {}
        self._closing: set[asyncio.Task[None]] = set()  # channels on their way out
        self._leaving: set[PeerRef] = set()  # they have said so themselves
        self._has_news = orders.has_news
        self._is_closed = False

    async def take(self, view: PublishedView) -> tuple[Lacking, ...]:
        """Returns when every new member has been tried: those that are not reached. An older view than the last one
        changes nothing."""
        if view.version <= self._view.version or self._is_closed:
            return ()
        former, self._view = self._view, view
        self._leave_others()
        self._status.set_expected(*view.num_expected)
        for worker in view.workers:
            self._status.note(replace(worker, is_up=self._has_channel(worker.ref)))
            self._drain(worker.ref)
        if view.depths is not None and view.depths != former.depths:
            self._driver.feed(DepthsPublished(view.depths))
        self._changed()
        for channel in self._driver.channels.values():
            channel.send_members(view.version, view.members)
        tries = [self._try(ref, 0.0) for ref in view.members if ref not in former.members]
        if tries:
            await asyncio.wait(tries)
        found = [task.result() for task in tries if not task.cancelled()]
        return tuple(one for one in found if one is not None)

    @property
    def is_late(self) -> bool:
        """It came to a cluster that had been whole before."""
        return self._view.was_ready

    async def news(self) -> RouterNews:
        """Comes when somebody is lost or found, and after NEWS_INTERVAL_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NEWS_INTERVAL_S):
                await self._has_news.wait()
        self._has_news.clear()
        return RouterNews(
            lacking=tuple(self._lacking.values()),
            leaving=tuple(self._leaving),
            idle=tuple(ref for ref in self._view.draining if self._is_idle(ref)),
            observed=self._driver.router.view.take_observed(),
            orders=self._orders.take(),
            pools=self._driver.pools.take(),
        )

    async def close(self) -> None:
        """Leaves all workers."""
        self._is_closed = True
        for task in self._tries.values():
            task.cancel()
        for channel in list(self._driver.channels.values()):
            self._drop(channel, "the router stops")
        await asyncio.gather(*self._tries.values(), *self._closing, return_exceptions=True)

    # --- coming ---------------------------------------------------------------------------------------------------

    def _try(self, ref: PeerRef, delay_s: float) -> asyncio.Task[Lacking | None]:
        task = asyncio.create_task(self._connect(ref, delay_s))
        self._tries[ref] = task
        return task

    async def _connect(self, ref: PeerRef, delay_s: float) -> Lacking | None:
        """None: it is reached."""
        await asyncio.sleep(delay_s)
        channel = WorkerChannel(ref, self._config, self._identity, self._reported, self._lost)
        try:
            await channel.connect()
        except ConnectionError as error:
            return self._lacks(Lacking(ref, str(error)))
        # No await from here on: the channel's first report must find the worker known.
        del self._tries[ref]
        self._driver.channels[ref.worker_id] = channel
        self._driver.feed(WorkerUp(ref))
        self._drain(ref)
        self._status.note_up(ref)
        self._changed()
        channel.send_members(self._view.version, self._view.members)
        return None

    def _reported(self, ref: PeerRef, report: WorkerReport) -> None:
        # Its hello is not enough to have it back: that comes from a worker whose engine hangs, too.
        if report.heartbeat and self._lacking.pop(ref, None) is not None:
            self._note_event(f"{ref.worker_id} ({ref.incarnation}) is heard again")
            self._has_news.set()
        if report.is_leaving and ref not in self._leaving:
            self._leaving.add(ref)
            self._has_news.set()
        self._driver.feed(Reported(ref.worker_id, ref.incarnation, report))

    # --- going ----------------------------------------------------------------------------------------------------

    def _drain(self, ref: PeerRef) -> None:
        """Where the view says so; before it is reached, and again, this changes nothing."""
        if ref in self._view.draining:
            self._driver.feed(WorkerDraining(ref.worker_id, ref.incarnation))

    def _is_idle(self, ref: PeerRef) -> bool:
        """No request here needs it, and it has said that it has none, sends no KV and receives none."""
        router = self._driver.router
        view = router.view.find(ref.worker_id, ref.incarnation)
        return view is None or not (
            router.num_needing(view)
            or not view.stats.num_blocks
            or view.stats.num_running
            or view.stats.num_waiting
            or view.stats.num_held_blocks
            or view.stats.num_leased_blocks
        )

    def _leave_others(self) -> None:
        """Than the members."""
        members = set(self._view.members)
        for channel in list(self._driver.channels.values()):
            if channel.ref not in members:
                self._drop(channel, "it is no member any more")
        for ref in self._tries.keys() - members:
            self._tries.pop(ref).cancel()
        for ref in self._lacking.keys() - members:
            del self._lacking[ref]
        self._leaving &= members
        for worker_id in self._status.known.keys() - {worker.ref.worker_id for worker in self._view.workers}:
            del self._status.known[worker_id]

    def _lost(self, ref: PeerRef, reason: str) -> None:
        if not self._has_channel(ref):
            return
        self._drop(self._driver.channels[ref.worker_id], reason)
        self._changed()
        self._note_event(f"lost {ref.worker_id} ({ref.incarnation}): {reason}")
        self._lacks(Lacking(ref, reason))

    def _lacks(self, lacking: Lacking) -> Lacking:
        self._lacking.setdefault(lacking.ref, lacking)  # the first reason is the one to tell
        self._has_news.set()
        self._try(lacking.ref, RETRY_S)
        return lacking

    def _drop(self, channel: WorkerChannel, reason: str) -> None:
        del self._driver.channels[channel.ref.worker_id]
        self._driver.feed(WorkerDown(channel.ref.worker_id, channel.ref.incarnation, reason))
        self._status.note_down(channel.ref)
        task = asyncio.create_task(channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _has_channel(self, ref: PeerRef) -> bool:
        channel = self._driver.channels.get(ref.worker_id)
        return channel is not None and channel.ref == ref

    def _changed(self) -> None:
        is_whole = all(self._has_channel(ref) for ref in self._view.members)
        self._status.view_version = self._view.version if is_whole else 0
