"""The routers of one cluster: starts them, gives all of them the same view of it, hears from each, and puts another one
in the place of one that is lost; one that an operator drains leaves. What the view is, view_publisher.py decides, what
becomes of workers their keeper."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from cluster.router_handle import MakeRouter, RouterAddress, RouterHandle, RouterLost
from cluster.view_publisher import ViewPublisher
from protos.types import PeerRef, Role
from router.config import RouterConfig
from router.pool_counts import PoolCounts
from router.published_view import Drain, Lacking, Order, PlacedOrder, PublishedView

logger = logging.getLogger("twinring.cluster")

MAX_BACKOFF_S = 30.0


class WorkerKeeper(Protocol):
    """All are called on the event loop, and return at once."""

    def on_worker_lost(self, ref: PeerRef, reason: str) -> None:
        """No router reaches it any more; once each."""

    def on_worker_leaving(self, ref: PeerRef) -> None:
        """It was told to end, and says so: again and again."""

    def on_order(self, order: Order) -> str:
        """Why it is refused; empty: it has begun."""

    def on_pool_counts(self, router_id: str, counts: Mapping[Role, PoolCounts]) -> None:
        """How the pools did since this router last said so."""


class Routers:
    """Invariant: a router id has at most one router at a time, always at the address that it got first. Every router in
    `_up` has been given the latest view, or is being given it."""

    def __init__(
        self,
        configs: list[RouterConfig],
        make: MakeRouter,
        on_progress: Callable[[str, str], None],
        drain_timeout_s: float = 30.0,
    ) -> None:
        """drain_timeout_s: what a router that an operator drains has, where the order does not say."""
        self._configs = {f"router-{index}": config for index, config in enumerate(configs)}
        self._make = make
        self._on_progress = on_progress
        self._drain_timeout_s = drain_timeout_s
        self._keeper: WorkerKeeper
        self._publisher = ViewPublisher(configs[0], len(configs))
        self._version = 0  # given out last
        self._handles: dict[str, RouterHandle] = {}
        self._up: dict[str, RouterHandle] = {}
        self._joining: set[PeerRef] = set()
        self._idle: dict[PeerRef, asyncio.Event] = {}  # of those that drain
        self._draining: dict[str, bool] = {}  # routers; whether another one takes its place
        self._tasks: set[asyncio.Task[Any]] = set()

    def wire(self, keeper: WorkerKeeper) -> None:
        """Before the start."""
        self._keeper = keeper

    async def start(self, num_prefill: int, num_decode: int) -> list[RouterAddress]:
        """They listen, and are ready once each has so many workers. OSError where an address cannot be had."""
        self._publisher.expect(num_prefill, num_decode)
        addresses = await asyncio.gather(*(self._start(router_id) for router_id in self._configs))
        for router_id in self._configs:
            self._spawn(self._keep(router_id))
        return addresses

    async def wait_ready(self, timeout_s: float) -> None:
        """The first time. TimeoutError says what is missing."""
        await asyncio.gather(*(handle.wait_ready(timeout_s) for handle in self._up.values()))
        self._publisher.ready()
        self._publish()

    async def stop(self, grace_s: float) -> None:
        """No more requests are taken; those in flight may end within grace_s. May be called again, with less."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(handle.stop(grace_s) for handle in self._handles.values()))
        await asyncio.gather(*(handle.kill() for handle in self._handles.values()))

    # --- workers --------------------------------------------------------------------------------------------------

    async def add_worker(self, ref: PeerRef, pid: int) -> None:
        """Returns when every router has exchanged hellos with it, or failed to and goes on trying. ConnectionError
        where none of them reaches it."""
        self._joining.add(ref)
        self._publisher.joined(ref, pid)
        answers = await asyncio.gather(*self._publish())
        self._joining.discard(ref)
        reasons = [[one.reason for one in lacking if one.ref == ref] for lacking in answers if lacking is not None]
        if reasons and all(reasons):
            self._publisher.left(ref)
            self._publish()
            raise ConnectionError(reasons[0][0])
        if ref not in self._publisher.view.members:
            raise ConnectionError(f"worker {ref.worker_id} at {ref.address} was lost while it joined")

    async def drain_worker(self, ref: PeerRef, timeout_s: float) -> bool:
        """Nothing new goes there from now on. Returns when no router needs it any more, when it is lost, or after
        timeout_s: then False."""
        idle = self._idle[ref] = asyncio.Event()
        self._publisher.draining(ref)
        self._publish()
        try:
            async with asyncio.timeout(timeout_s):
                await idle.wait()
        except TimeoutError:
            return False
        finally:
            del self._idle[ref]
        return True

    async def remove_worker(self, ref: PeerRef) -> None:
        """Returns when every router has let go of it."""
        self._publisher.left(ref)
        await asyncio.gather(*self._publish())

    def expect(self, num_prefill: int, num_decode: int) -> None:
        """So many workers there should be from now on."""
        self._publisher.expect(num_prefill, num_decode)
        self._publish()

    def note_event(self, message: str) -> None:
        for handle in self._up.values():
            self._spawn(_tell(handle, message))

    # --- the view -------------------------------------------------------------------------------------------------

    def _publish(self) -> list[asyncio.Task[tuple[Lacking, ...] | None]]:
        view = self._publisher.view
        self._version = view.version
        return [self._spawn(_give(handle, view)) for handle in self._up.values()]

    def _heed(self, lost: Iterable[Lacking]) -> None:
        """After every word of a router, and its end."""
        if self._publisher.view.version > self._version:
            self._publish()
        for one in lost:
            if one.ref not in self._joining:
                self._keeper.on_worker_lost(one.ref, one.reason)
        for ref, idle in self._idle.items():
            if self._publisher.is_idle(ref):
                idle.set()

    # --- orders ---------------------------------------------------------------------------------------------------

    def _take_order(self, handle: RouterHandle, placed: PlacedOrder) -> None:
        order = placed.order
        if isinstance(order, Drain) and order.timeout_s is not None and not order.timeout_s >= 0:
            refusal = f"timeout_s must not be negative, not {order.timeout_s}"
        elif isinstance(order, Drain) and order.who in self._configs:
            refusal = self._drain_router(order)
        else:
            refusal = self._keeper.on_order(order)
        self._spawn(_answer(handle, placed.order_id, refusal))

    def _drain_router(self, order: Drain) -> str:
        router_id = order.who
        if router_id not in self._up or router_id in self._draining:
            return f"{router_id} {'is not up' if router_id not in self._up else 'drains already'}"
        if len(self._up.keys() - self._draining.keys()) == 1:
            return f"{router_id} is the only router that takes calls; `twinring stop` ends the cluster"
        timeout_s = self._drain_timeout_s if order.timeout_s is None else order.timeout_s
        self._draining[router_id] = order.replaces
        self._spawn(self._leave(router_id, timeout_s))
        return ""

    async def _leave(self, router_id: str, timeout_s: float) -> None:
        """It takes no more calls and finishes those that it has; whoever listens to it then hears that it is gone."""
        self.note_event(f"{router_id} drains")
        handle = self._up[router_id]
        await handle.stop(timeout_s)
        await handle.kill()

    # --- one router -----------------------------------------------------------------------------------------------

    async def _start(self, router_id: str) -> RouterAddress:
        config = self._configs[router_id]
        handle = self._handles[router_id] = self._make(router_id, config)
        address = await handle.start()
        self._configs[router_id] = replace(config, listen=address.grpc, http_listen=address.http)
        self._publisher.router_up(router_id)
        self._up[router_id] = handle
        await handle.take(self._publisher.view)
        return address

    async def _keep(self, router_id: str) -> None:
        while True:
            reason = await self._listen_to(self._up[router_id])
            del self._up[router_id]
            replaces = self._draining.pop(router_id, None)
            if replaces is None:
                logger.warning("router lost", extra={"fields": {"router_id": router_id, "reason": reason}})
            self._on_progress(router_id, f"lost: {reason}" if replaces is None else "drained")
            self.note_event(f"lost {router_id}: {reason}" if replaces is None else f"{router_id} has left")
            self._heed(self._publisher.router_down(router_id))
            if replaces is False:
                return
            await self._replace(router_id)

    async def _listen_to(self, handle: RouterHandle) -> str:
        """Until it is lost, and why."""
        while True:
            try:
                news = await handle.news()
            except RouterLost as error:
                return str(error)
            self._heed(self._publisher.heard(handle.router_id, news))
            for ref in news.leaving:
                self._keeper.on_worker_leaving(ref)
            for placed in news.orders:
                self._take_order(handle, placed)
            self._keeper.on_pool_counts(handle.router_id, news.pools)

    async def _replace(self, router_id: str) -> None:
        from ray.exceptions import RayError

        backoff_s = 0.5
        while True:
            await self._handles[router_id].kill()
            try:
                address = await self._start(router_id)
                break
            except (OSError, RayError) as error:
                self._up.pop(router_id, None)
                self._heed(self._publisher.router_down(router_id))
                logger.warning("router not replaced", extra={"fields": {"router_id": router_id, "error": repr(error)}})
                self.note_event(f"{router_id} could not be replaced: {error!r:.300}")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        self._on_progress(router_id, f"back on {address.grpc}")
        self.note_event(f"{router_id} is back on {address.grpc}")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("bug in the care for routers", exc_info=task.exception())


async def _give(handle: RouterHandle, view: PublishedView) -> tuple[Lacking, ...] | None:
    """None: it is lost, as whoever listens to it will hear."""
    try:
        return await handle.take(view)
    except RouterLost:
        return None


async def _answer(handle: RouterHandle, order_id: int, refusal: str) -> None:
    with contextlib.suppress(RouterLost):
        await handle.answer(order_id, refusal)


async def _tell(handle: RouterHandle, message: str) -> None:
    with contextlib.suppress(RouterLost):
        await handle.note_event(message)


def router_configs(config: RouterConfig, num_routers: int) -> list[RouterConfig]:
    """One for each router: the ports follow the configured ones, where those are not 0."""
    if num_routers == 1:
        return [config]
    return [
        replace(
            config,
            listen=_later(config.listen, index),
            http_listen=_later(config.http_listen, index),
            record_events=config.record_events and f"{config.record_events}.{index}",
        )
        for index in range(num_routers)
    ]


def _later(listen: str, index: int) -> str:
    host, colon, port = listen.rpartition(":")
    return f"{host}:{int(port) + index}" if colon and port.isdigit() and int(port) else listen
