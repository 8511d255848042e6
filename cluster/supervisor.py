"""Keeps the configured workers alive: makes each one, waits until it is loaded, shows it to the routers, and puts a new
incarnation in the place of one that died. Places no request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable

from cluster.actors import PROGRESS_INTERVAL_S, ActorHandle
from cluster.config import ServeConfig
from cluster.routers import Routers
from engine.worker_config import WorkerSpec
from protos.types import PeerRef, Role

logger = logging.getLogger("twinring.cluster")

MAX_BACKOFF_S = 30.0
STOP_GRACE_S = 2.0

Progress = Callable[[str, str], None]  # worker id, what it is doing


class Supervisor:
    """Invariant: a worker id has at most one actor at a time, and routers know only incarnations that serve."""

    def __init__(
        self, config: ServeConfig, hash_key: bytes, routers: Routers, on_progress: Progress, log_level: str
    ) -> None:
        self._config = config
        self._hash_key = hash_key
        self._routers = routers
        self._on_progress = on_progress
        self._log_level = log_level
        self._actors: dict[str, ActorHandle] = {}
        self._replacements: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def start(self) -> None:
        """All workers loaded and known to the routers. Raises what the first failing one raised (ModelLoadError, a Ray
        error, TimeoutError)."""
        await asyncio.gather(*(self._make(worker_id, role) for worker_id, role in worker_slots(self._config)))

    def on_worker_lost(self, ref: PeerRef, reason: str) -> None:
        """No router reaches this incarnation any more; called on the event loop."""
        actor = self._actors.get(ref.worker_id)
        if self._stopping or actor is None or actor.spec.incarnation != ref.incarnation:
            return
        logger.warning("worker lost", extra={"fields": {"worker_id": ref.worker_id, "reason": reason}})
        if self._config.replace_dead_workers:
            task = asyncio.create_task(self._replace(ref.worker_id, ref.role))
            self._replacements.add(task)
            task.add_done_callback(self._replacements.discard)

    async def stop(self) -> None:
        self._stopping = True
        for task in list(self._replacements):
            task.cancel()
        await asyncio.gather(*self._replacements, return_exceptions=True)
        await asyncio.gather(*(self._end(actor) for actor in self._actors.values()))
        self._actors.clear()

    async def _make(self, worker_id: str, role: Role) -> None:
        spec = WorkerSpec(
            worker_id=worker_id,
            incarnation=secrets.token_hex(4),
            role=role,
            engine=self._config.engine_of(role),
            hash_key=self._hash_key,
            lease=self._config.lease,
            bind_host=self._config.worker_bind_host,
            bind_port=self._config.worker_port,
        )
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
        await self._routers.add_worker(ready.ref, ready.pid)
        self._on_progress(worker_id, "serving")
        self._routers.note_event(f"worker {worker_id} ({spec.incarnation}) joined, pid {ready.pid}")

    async def _show_progress(self, actor: ActorHandle) -> None:
        while True:
            self._on_progress(actor.spec.worker_id, await actor.progress())
            await asyncio.sleep(PROGRESS_INTERVAL_S)

    async def _replace(self, worker_id: str, role: Role) -> None:
        backoff_s = 0.5
        while not self._stopping:
            await self._kill(self._actors[worker_id])
            try:
                await self._make(worker_id, role)
                return
            except Exception as error:  # noqa: BLE001  (whatever it was, the pool stays short: say so and try again)
                self._routers.note_event(f"worker {worker_id} could not be replaced: {error!r:.300}")
                logger.warning("replacement failed", extra={"fields": {"worker_id": worker_id, "error": repr(error)}})
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _end(self, actor: ActorHandle) -> None:
        with contextlib.suppress(Exception):  # dead already, or too slow: killed next
            await actor.stop(STOP_GRACE_S)
        await self._kill(actor)

    async def _kill(self, actor: ActorHandle) -> None:
        with contextlib.suppress(Exception):  # Ray may be gone, and the actor with it
            await asyncio.wait_for(asyncio.to_thread(actor.kill), STOP_GRACE_S)


def worker_slots(config: ServeConfig) -> list[tuple[str, Role]]:
    """Colocated workers are prefill workers that nobody asks to hand off."""
    if config.router.mode == "colocated":
        return [(f"worker-{i}", Role.PREFILL) for i in range(config.num_prefill + config.num_decode)]
    return [(f"prefill-{i}", Role.PREFILL) for i in range(config.num_prefill)] + [
        (f"decode-{i}", Role.DECODE) for i in range(config.num_decode)
    ]
