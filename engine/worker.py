"""One worker from loading to the end of its process: model, KV cache, engine thread, internal gRPC service. Who runs it
(a Ray actor) and who moves its KV are handed in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc.aio
import torch

from engine.config import HostTierConfig, SchedulerConfig
from engine.engine_thread import EngineThread
from engine.host_copies import HostCopies
from engine.host_memory import HostMemory
from engine.model_facts import ModelFacts, read_model_facts
from engine.modelled_runner import ModelledRunner
from engine.paged_kv_cache import PagedKVCache, num_blocks_for
from engine.transfer_port import TransferPort
from engine.worker_config import EngineConfig, WorkerSpec
from engine.worker_core import WorkerCore
from engine.worker_health import WorkerHealth
from engine.worker_host import WorkerHost
from protos import worker_pb2_grpc as pb_grpc
from protos.types import KVLayout, PeerRef

logger = logging.getLogger("twinring.engine")

MakeTransfers = Callable[[PeerRef, PagedKVCache | HostMemory, WorkerHost], TransferPort]

# A handoff's request may be as long as the context: int32 ids of a million tokens still fit.
MAX_FRAME_NBYTES = 64 << 20
EXIT_FENCED = 70
BECOME_GRACE_S = 2.0  # for threads and links to end


@dataclass(frozen=True, slots=True)
class WorkerReady:
    ref: PeerRef
    pid: int
    num_blocks: int
    max_model_len: int
    model_fingerprint: str
    numerics: str = ""  # as in KVLayout


class Worker:
    """Calls in order: load, serve, stop; in place of the last, become and again serve. A worker that lost its lease or
    its engine ends its process: somebody else may own its requests by then, and a new incarnation takes its place."""

    def __init__(self, spec: WorkerSpec, make_transfers: MakeTransfers) -> None:
        self._spec = spec
        self._make_transfers = make_transfers
        self._progress = "created"
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None  # while it serves

    async def progress(self) -> str:
        """What it is doing now, in a few words, for whoever waits for it."""
        return self._progress

    async def load(self) -> None:
        """Take the address, read the weights where there are any to run, allocate the KV cache. ModelLoadError (a
        ValueError) names what is wrong with the model; a ValueError says that the address cannot be had, before minutes
        are spent on weights."""
        self._server, self._address = bound_server(self._spec)
        await asyncio.to_thread(self._load)

    def _load(self) -> None:
        engine = self._spec.engine
        torch.set_num_threads(engine.num_threads)
        if engine.modelled_hardware is None:
            self._load_model()
        else:
            facts = read_model_facts(engine.model).as_run_by(engine)
            layout = facts.kv_layout(engine.dtype, engine.block_size, engine.hash_block_size)
            self._allocate(facts, engine.fixed_num_blocks or num_blocks_for(engine.kv_nbytes or 0, layout))
            self._execute = ModelledRunner(engine.modelled_hardware.cost, time.sleep).execute
        self._progress = "loaded"

    def _load_model(self) -> None:
        # Only here: the process that launches workers knows this class and runs no model.
        from engine.determinism_check import find_fixed_shapes
        from engine.deterministic_runner import DeterministicRunner
        from engine.model_loader import load_model
        from engine.runners import make_runner, num_blocks_beside, use_layer_kernels

        engine = self._spec.engine
        self._progress = "reading weights"
        kernels, packed = use_layer_kernels(engine), engine.deterministic
        loaded = load_model(engine.model, engine.dtype, engine.device, engine.fused, kernels, packed)
        max_model_len = scheduler_config(engine, loaded.facts.max_model_len).max_model_len
        if engine.deterministic:
            self._progress = "trying sizes for deterministic steps"
            shapes = find_fixed_shapes(loaded)
            logger.info("computes deterministically", extra={"fields": {"rows": shapes.rows}})
            self._allocate(loaded.facts, num_blocks_beside(loaded, engine, max_model_len), shapes.digest)
            self._execute = DeterministicRunner(loaded, self._kv_cache, shapes).execute
            return
        self._progress = "finding room for KV"
        self._allocate(loaded.facts, num_blocks_beside(loaded, engine, max_model_len))
        self._execute = make_runner(loaded, self._kv_cache, engine, max_model_len, self._show_progress).execute

    def _show_progress(self, progress: str) -> None:
        self._progress = progress

    def _allocate(self, facts: ModelFacts, num_blocks: int, numerics: str = "") -> None:
        self._progress = "allocating KV blocks"
        engine = self._spec.engine
        layout = facts.kv_layout(engine.dtype, engine.block_size, engine.hash_block_size, numerics)
        self._kv_cache = PagedKVCache(layout, num_blocks, engine.device)
        kv_nbytes_per_token = layout.block_nbytes // layout.block_size
        self._config = replace(scheduler_config(engine, facts.max_model_len), kv_nbytes_per_token=kv_nbytes_per_token)
        self._host_memory: HostMemory | None = None
        if engine.host_cache_bytes:
            self._allocate_host(layout)
        self._facts = facts

    def _allocate_host(self, layout: KVLayout) -> None:
        self._progress = "allocating host memory"
        engine = self._spec.engine
        num_blocks = num_blocks_for(engine.host_cache_bytes, layout, "host_cache_bytes")
        self._host_memory = HostMemory(self._kv_cache, num_blocks)
        host = HostTierConfig(
            num_blocks=self._host_memory.num_blocks,
            s_per_token=self._host_memory.measured_load_s() / layout.block_size,
            max_saving_blocks=-(-engine.max_num_batched_tokens // layout.block_size),  # of a step
        )
        self._config = replace(self._config, host=host)

    async def serve(self) -> WorkerReady:
        """Listen for routers and peers; the lease starts with the first router."""
        threading.excepthook = _end_on_crash
        self._loop = asyncio.get_running_loop()
        fingerprint = self._facts.fingerprint
        me = PeerRef(self._spec.worker_id, self._spec.incarnation, self._address, self._spec.role)
        core = WorkerCore(
            self._config, self._kv_cache.num_blocks, self._spec.hash_key, fingerprint, me.worker_id, _new_pull_id
        )
        host = self._host = WorkerHost(me, fingerprint, self._spec.lease, on_end=end_process)
        self._transfers = self._make_transfers(me, self._host_memory or self._kv_cache, host)
        self._engine = EngineThread(core, self._execute, host.deliver, host.crashed)
        self._copies = None if self._host_memory is None else HostCopies(self._host_memory, self._engine.post)
        host.wire(self._engine, self._transfers, self._copies)
        pb_grpc.add_WorkerServicer_to_server(host, self._server)
        self._transfers.add_to_server(self._server)
        self._health = WorkerHealth(host)
        self._health.add_to_server(self._server)
        await self._health.show()
        await self._transfers.start()
        self._engine.start()
        if self._copies is not None:
            self._copies.start()
        await self._server.start()
        self._tasks.append(asyncio.create_task(host.keep_lease()))
        self._tasks.append(asyncio.create_task(self._health.keep(self._spec.lease.heartbeat_interval_s)))
        self._progress = "serving"
        num_blocks, numerics = self._kv_cache.num_blocks, self._kv_cache.layout.numerics
        return WorkerReady(me, os.getpid(), num_blocks, self._config.max_model_len, fingerprint, numerics)

    def leave(self) -> None:
        """Called on any thread, to have this process ended: its routers see to that, when they need it no more. One
        that does not serve ends now."""
        if self._loop is None:
            end_process("it was told to end before it served")
        else:
            self._loop.call_soon_threadsafe(self._host.leave)

    async def become(self, spec: WorkerSpec) -> None:
        """Leave the cluster and come back as another worker: model and KV memory stay, what was cached there is
        forgotten. ValueError where the new address cannot be had. Host memory is a prefill worker's only, so that a
        change of role needs an engine without."""
        assert spec.engine == self._spec.engine and not spec.engine.host_cache_bytes, spec
        await self.stop(BECOME_GRACE_S)
        self._tasks, self._spec = [], replace(spec, bind_host=self._spec.bind_host)
        self._server, self._address = bound_server(self._spec)

    async def stop(self, grace_s: float) -> None:
        """Stop taking work, then leave nothing behind: threads joined, links and sockets closed."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._health.stop()
        await self._transfers.close()
        await self._server.stop(grace_s)
        await asyncio.to_thread(self._engine.stop, grace_s)
        if self._copies is not None:
            await asyncio.to_thread(self._copies.stop, grace_s)
        self._progress = "stopped"


def bound_server(spec: WorkerSpec) -> tuple[grpc.aio.Server, str]:
    """Not started: nobody is answered yet. Its address with the port it got."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_FRAME_NBYTES), ("grpc.so_reuseport", 0)])
    try:
        port = server.add_insecure_port(f"{spec.bind_host}:{spec.bind_port}")
    except RuntimeError as error:
        hint = "; two workers on one machine cannot share a worker_port" if spec.bind_port else ""
        raise ValueError(
            f"worker {spec.worker_id} cannot listen on {spec.bind_host}:{spec.bind_port} (worker_bind_host, "
            f"worker_port){hint}: {error}"
        ) from error
    return server, f"{spec.bind_host}:{port}"


def scheduler_config(engine: EngineConfig, model_max_len: int) -> SchedulerConfig:
    max_model_len = min(engine.max_model_len or model_max_len, model_max_len)
    return SchedulerConfig(
        max_model_len=max_model_len,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=engine.max_num_seqs,
        block_size=engine.block_size,
        hash_block_size=engine.hash_block_size,
        enable_prefix_caching=engine.enable_prefix_caching,
        max_migration_tail_blocks=engine.max_migration_tail_blocks,
        pulls=engine.pulls if engine.enable_prefix_caching else None,
    )


def _new_pull_id() -> bytes:
    return secrets.token_bytes(16)


def _end_on_crash(crash: threading.ExceptHookArgs) -> None:
    """A thread that died may have held blocks or a link's order: nothing here can be trusted after it."""
    logger.error("thread ended", exc_info=crash.exc_value, extra={"fields": {"thread": str(crash.thread)}})
    end_process(f"a thread crashed: {crash.exc_value!r}")


def end_process(reason: str) -> None:
    logger.error("worker ends", extra={"fields": {"reason": reason}})
    logging.shutdown()
    os._exit(EXIT_FENCED)
