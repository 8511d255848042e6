"""Keeps the workers that there should be alive: makes each one, waits until it is loaded, shows it to the routers, puts
a new incarnation in the place of one that died, and takes those out that are to leave. Which there should be,
router/pools.py says. Places no request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping

from cluster.actors import PROGRESS_INTERVAL_S, ActorHandle
from cluster.config import ServeConfig
from cluster.pools import pools_of
from cluster.routers import Routers
from engine.worker import WorkerReady
from engine.worker_config import WorkerSpec
from protos.types import PeerRef, Role
from router.autoscaling import Autoscaling
from router.pool_counts import PoolCounts
from router.pools import Turn
from router.published_view import Drain, Order, Scale

logger = logging.getLogger("twinring.cluster")

MAX_BACKOFF_S = 30.0
STOP_GRACE_S = 2.0

Progress = Callable[[str, str], None]  # worker id, what it is doing


class Supervisor:
    """Invariant: a worker id has at most one actor at a time, and routers know only incarnations that serve. What
    happens to a worker (it is made, replaced, drained) is one task at a time, in `_coming` or in `_leaving`."""

    def __init__(
        self, config: ServeConfig, hash_key: bytes, routers: Routers, on_progress: Progress, log_level: str
    ) -> None:
        self._config = config
        self._hash_key = hash_key
        self._routers = routers
        self._on_progress = on_progress
        self._log_level = log_level
        self._pools = pools_of(config)
        self._actors: dict[str, ActorHandle] = {}
        self._coming: dict[str, asyncio.Task[None]] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._shown: dict[str, PeerRef] = {}  # what routers know by each name, alive or dead
        self._first: WorkerReady | None = None  # of all workers: what it computes, the others must compute, too
        self._autoscaling = Autoscaling(config.autoscaler, self._pools.may_turn) if config.autoscaler.enabled else None
        self._has_started = False
        self._stopping = False

    async def start(self) -> None:
        """All workers loaded and known to the routers. Raises what the first failing one raised (ModelLoadError, a Ray
        error, TimeoutError)."""
        await asyncio.gather(*(self._make(worker_id, role) for worker_id, role in self._pools.slots.items()))
        self._has_started = True

    async def stop(self) -> None:
        self._stopping = True
        tasks = [*self._coming.values(), *self._leaving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(actor) for actor in self._actors.values()))
        self._actors.clear()

    # --- what routers tell ----------------------------------------------------------------------------------------

    def on_worker_lost(self, ref: PeerRef, reason: str) -> None:
        """No router reaches this incarnation any more. One that drains has its successor coming, where it has one."""
        actor = self._serving(ref)
        if actor is None or ref.worker_id in self._leaving:
            return
        logger.warning("worker lost", extra={"fields": {"worker_id": ref.worker_id, "reason": reason}})
        if self._config.replace_dead_workers:
            self._begin(self._coming, ref.worker_id, self._replace(ref.worker_id, ref.role))

    def on_worker_leaving(self, ref: PeerRef) -> None:
        """It was sent SIGTERM: its machine goes, not its place in the pool."""
        if self._serving(ref) is not None and ref.worker_id not in self._leaving.keys() | self._coming.keys():
            self._begin_drain(ref.worker_id, self._config.worker_drain_timeout_s)

    def on_order(self, order: Order) -> str:
        """Why it is refused; empty: it has begun."""
        if not self._has_started or self._stopping:
            return f"the cluster is {'stopping' if self._stopping else 'starting'}"
        try:
            match order:
                case Drain():
                    self._order_drain(order)
                case Scale(sizes):
                    self._scale(dict(sizes))
        except ValueError as error:
            return str(error)
        return ""

    def on_pool_counts(self, router_id: str, counts: Mapping[Role, PoolCounts]) -> None:
        """Where pools change their sizes by themselves; one that is changing is left alone until it has changed."""
        if self._autoscaling is None or not self._has_started or self._stopping:
            return
        sizes = self._pools.settled(self._actors, changing=[*self._coming, *self._leaving])
        resizes = self._autoscaling.heard(router_id, counts, sizes, asyncio.get_running_loop().time())
        for together in self._autoscaling.at_once(resizes):
            for resize in together:
                self._routers.note_event(f"autoscaler: {resize.reason}")
            try:
                self._scale({self._pools.pool_of(resize.role): resize.num_workers for resize in together})
            except ValueError as error:
                self._routers.note_event(f"autoscaler: not possible: {error}")

    def _order_drain(self, order: Drain) -> None:
        if order.who not in self._pools.slots:
            known = ", ".join(self._pools.slots)
            raise ValueError(f"no worker or router is called {order.who!r}; workers are {known}")
        if order.who in self._leaving:
            raise ValueError(f"{order.who} drains already")
        if order.who in self._coming or order.who not in self._actors:
            raise ValueError(f"{order.who} does not serve yet")
        if not order.replaces:
            self._pools.without(order.who)
            self._routers.expect(*self._pools.num_expected)
        timeout_s = self._config.worker_drain_timeout_s if order.timeout_s is None else order.timeout_s
        self._begin_drain(order.who, timeout_s)

    def _scale(self, sizes: dict[str, int]) -> None:
        changes = self._pools.scale(sizes, taken=self._actors.keys() | self._leaving.keys())
        self._routers.expect(*self._pools.num_expected)
        for worker_id in changes.starts:
            self._begin(self._coming, worker_id, self._replace(worker_id, self._pools.slots[worker_id]))
        for worker_id in changes.drains:
            self._let_go(worker_id)
        for turn in changes.turns:
            self._turn(turn)

    # --- coming ---------------------------------------------------------------------------------------------------

    async def _make(self, worker_id: str, role: Role) -> None:
        spec = self._spec(worker_id, role)
        self._on_progress(worker_id, "starting")
        actor = await asyncio.to_thread(ActorHandle, spec, self._config.transfer, self._config.ray, self._log_level)
        self._actors[worker_id] = actor
        await actor.progress()  # placed and importing; raises within start_timeout_s
        watch = asyncio.create_task(self._show_progress(actor))
        try:
            await actor.load()
            ready = await actor.serve()
        finally:
            watch.cancel()
        await self._show(ready)

    def _spec(self, worker_id: str, role: Role) -> WorkerSpec:
        return WorkerSpec(
            worker_id=worker_id,
            incarnation=secrets.token_hex(4),
            role=role,
            engine=self._config.engine_of(role),
            hash_key=self._hash_key,
            lease=self._config.lease,
            bind_host=self._config.worker_bind_host,
            bind_port=self._config.worker_port,
        )

    async def _show(self, ready: WorkerReady) -> None:
        self._require_same_bits(ready)
        ref = self._shown[ready.ref.worker_id] = ready.ref
        await self._routers.add_worker(ref, ready.pid)
        self._on_progress(ref.worker_id, "serving")
        self._routers.note_event(f"worker {ref.worker_id} ({ref.incarnation}) joined, pid {ready.pid}")

    def _require_same_bits(self, ready: WorkerReady) -> None:
        """Of deterministic workers: a stream that goes on where other bits are computed becomes another one."""
        first = self._first = self._first or ready
        if ready.numerics != first.numerics:
            raise ValueError(
                f"engine.deterministic: worker {ready.ref.worker_id} computes other bits than {first.ref.worker_id}; "
                f"it has another processor, PyTorch or number of threads"
            )

    async def _show_progress(self, actor: ActorHandle) -> None:
        while True:
            self._on_progress(actor.spec.worker_id, await actor.progress())
            await asyncio.sleep(PROGRESS_INTERVAL_S)

    async def _replace(self, worker_id: str, role: Role) -> None:
        """Or make the first one of this name, as often as it takes."""
        backoff_s = 0.5
        while not self._stopping:
            if worker_id in self._actors:
                await self._kill(self._actors[worker_id])
            try:
                await self._make(worker_id, role)
                return
            except Exception as error:  # noqa: BLE001  (whatever it was, the pool stays short: say so and try again)
                self._routers.note_event(f"worker {worker_id} could not be replaced: {error!r:.300}")
                logger.warning("replacement failed", extra={"fields": {"worker_id": worker_id, "error": repr(error)}})
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    # --- going ----------------------------------------------------------------------------------------------------

    def _let_go(self, worker_id: str) -> None:
        """One that does not serve yet has nothing to finish; one that leaves already will not be replaced."""
        if worker_id in self._coming:
            self._coming[worker_id].cancel()
            self._begin(self._leaving, worker_id, self._drop(worker_id))
        elif worker_id in self._actors and worker_id not in self._leaving:
            self._begin_drain(worker_id, self._config.worker_drain_timeout_s)

    def _begin_drain(self, worker_id: str, timeout_s: float) -> None:
        self._begin(self._leaving, worker_id, self._drain(self._actors[worker_id], timeout_s))

    async def _drain(self, actor: ActorHandle, timeout_s: float) -> None:
        """Another one takes its place where the pools have one for it."""
        worker_id, role = actor.spec.worker_id, actor.spec.role
        await self._leave(actor, timeout_s)
        await self._drop(worker_id)
        self._fill(worker_id, role)

    def _fill(self, worker_id: str, role: Role) -> None:
        """With a new actor, where this name is still to be there and nobody has begun."""
        if worker_id in self._pools.slots and worker_id not in self._coming:
            self._begin(self._coming, worker_id, self._replace(worker_id, role))

    async def _drop(self, worker_id: str) -> None:
        actor, ref = self._actors.pop(worker_id, None), self._shown.pop(worker_id, None)
        if ref is not None:
            await self._routers.remove_worker(ref)
        if actor is not None:
            await self._end(actor)

    async def _leave(self, actor: ActorHandle, timeout_s: float) -> bool:
        """It is no member any more. False: requests needed it still, and go on elsewhere."""
        ref, loop = actor.ref, asyncio.get_running_loop()
        assert ref is not None
        began_at = loop.time()
        self._on_progress(ref.worker_id, "draining")
        self._routers.note_event(f"worker {ref.worker_id} ({ref.incarnation}) drains")
        is_idle = await self._routers.drain_worker(ref, timeout_s)
        await self._routers.remove_worker(ref)
        how = "" if is_idle else "; what it still had goes on elsewhere"
        self._on_progress(ref.worker_id, "has left")
        self._routers.note_event(f"worker {ref.worker_id} has left after {loop.time() - began_at:.1f} s{how}")
        return is_idle

    def _turn(self, turn: Turn) -> None:
        actor = self._actors.get(turn.worker_id)
        if actor is None or turn.worker_id in self._coming or turn.worker_id in self._leaving:
            self._let_go(turn.worker_id)
            self._fill(turn.becomes, turn.role)
        else:
            self._begin(self._leaving, turn.worker_id, self._turn_over(actor, turn))

    async def _turn_over(self, actor: ActorHandle, turn: Turn) -> None:
        """Only where nothing hangs on its former life any more; else another actor takes the place."""
        is_idle = await self._leave(actor, self._config.worker_drain_timeout_s)
        if is_idle and turn.becomes in self._pools.slots:
            self._actors[turn.becomes] = self._actors.pop(turn.worker_id)
            del self._shown[turn.worker_id]
            self._begin(self._coming, turn.becomes, self._become(actor, turn))
            return
        await self._drop(turn.worker_id)
        self._fill(turn.becomes, turn.role)

    async def _become(self, actor: ActorHandle, turn: Turn) -> None:
        try:
            await self._show(await actor.become(self._spec(turn.becomes, turn.role)))
            self._routers.note_event(f"worker {turn.worker_id} became {turn.becomes}")
        except Exception as error:  # noqa: BLE001  (whatever it was, a new actor is sure)
            self._routers.note_event(f"worker {turn.worker_id} did not become {turn.becomes}: {error!r:.300}")
            await self._replace(turn.becomes, turn.role)

    async def _end(self, actor: ActorHandle) -> None:
        with contextlib.suppress(Exception):  # dead already, or too slow: killed next
            await actor.stop(STOP_GRACE_S)
        await self._kill(actor)

    async def _kill(self, actor: ActorHandle) -> None:
        with contextlib.suppress(Exception):  # Ray may be gone, and the actor with it
            await asyncio.wait_for(asyncio.to_thread(actor.kill), STOP_GRACE_S)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _serving(self, ref: PeerRef) -> ActorHandle | None:
        actor = self._actors.get(ref.worker_id)
        return actor if not self._stopping and actor is not None and actor.spec.incarnation == ref.incarnation else None

    def _begin(self, tasks: dict[str, asyncio.Task[None]], worker_id: str, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        tasks[worker_id] = task

        def ended(task: asyncio.Task[None]) -> None:
            if tasks.get(worker_id) is task:
                del tasks[worker_id]
            if not task.cancelled() and task.exception() is not None:
                logger.error("bug in the care for workers", exc_info=task.exception())

        task.add_done_callback(ended)
