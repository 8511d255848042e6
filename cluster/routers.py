"""The routers of one cluster: starts them, gives all of them the same view of it, hears from each, and puts another one
in the place of one that is lost. What the view is, view_publisher.py decides."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from cluster.router_handle import MakeRouter, RouterAddress, RouterHandle, RouterLost
from cluster.view_publisher import ViewPublisher
from protos.types import PeerRef
from router.config import RouterConfig
from router.published_view import Lacking, PublishedView

logger = logging.getLogger("twinring.cluster")

MAX_BACKOFF_S = 30.0


class Routers:
    """Invariant: a router id has at most one router at a time, always at the address that it got first. Every router in
    `_up` has been given the latest view, or is being given it."""

    def __init__(
        self,
        configs: list[RouterConfig],
        make: MakeRouter,
        on_worker_lost: Callable[[PeerRef, str], None],
        on_progress: Callable[[str, str], None],
    ) -> None:
        """`on_worker_lost` hears of every worker that no router reaches any more, once each."""
        self._configs = {f"router-{index}": config for index, config in enumerate(configs)}
        self._make = make
        self._on_worker_lost = on_worker_lost
        self._on_progress = on_progress
        self._publisher = ViewPublisher(configs[0], len(configs))
        self._version = 0  # given out last
        self._handles: dict[str, RouterHandle] = {}
        self._up: dict[str, RouterHandle] = {}
        self._joining: set[PeerRef] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._num_expected = (0, 0)

    async def start(self, num_prefill: int, num_decode: int) -> list[RouterAddress]:
        """They listen, and are ready once each has so many workers. OSError where an address cannot be had."""
        self._num_expected = (num_prefill, num_decode)
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
                self._on_worker_lost(one.ref, one.reason)

    # --- one router -----------------------------------------------------------------------------------------------

    async def _start(self, router_id: str) -> RouterAddress:
        config = self._configs[router_id]
        handle = self._handles[router_id] = self._make(router_id, config)
        address = await handle.start(*self._num_expected)
        self._configs[router_id] = replace(config, listen=address.grpc, http_listen=address.http)
        self._publisher.router_up(router_id)
        self._up[router_id] = handle
        await handle.take(self._publisher.view)
        return address

    async def _keep(self, router_id: str) -> None:
        while True:
            reason = await self._listen_to(self._up[router_id])
            del self._up[router_id]
            logger.warning("router lost", extra={"fields": {"router_id": router_id, "reason": reason}})
            self._on_progress(router_id, f"lost: {reason}")
            self.note_event(f"lost {router_id}: {reason}")
            self._heed(self._publisher.router_down(router_id))
            await self._replace(router_id)

    async def _listen_to(self, handle: RouterHandle) -> str:
        """Until it is lost, and why."""
        while True:
            try:
                news = await handle.news()
            except RouterLost as error:
                return str(error)
            self._heed(self._publisher.heard(handle.router_id, news))

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
