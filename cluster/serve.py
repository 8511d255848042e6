"""The composition root of a serving process: its one router in this process, or several as Ray actors; workers as Ray
actors; one way in and one way out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

from transformers import AutoTokenizer

from cluster.config import ServeConfig
from cluster.model_folder import model_folder, model_name
from cluster.pools import pools_of, worker_slots
from cluster.ray_cluster import ray_cluster
from cluster.router_handle import LocalRouter, RayRouter, RouterAddress
from cluster.routers import Routers, router_configs
from cluster.run_state import RunState, announced
from cluster.supervisor import Progress, Supervisor
from engine.model_facts import ModelFacts, read_model_facts
from engine.paged_kv_cache import num_blocks_for
from engine.worker_config import EngineConfig
from protos.types import Role
from router.served_model import ServedModel
from router.tls import read_key_and_chain

logger = logging.getLogger("twinring.cluster")

T = TypeVar("T")

LINK_TIMEOUT_S = 30.0
RAY_CHECK_INTERVAL_S = 1.0


class Stopped(Exception):
    """A signal asked for the end."""


def run(config: ServeConfig, on_progress: Progress, log_level: str) -> None:
    """Serve until SIGINT or SIGTERM. ValueError or OSError where the model, the address or Ray is not fit to serve.

    Ray comes first: it forks, which a process with gRPC threads must not do."""
    facts = read_model_facts(model_folder(config.engine.model, config.hub_cache)).as_run_by(config.engine)
    for router in router_configs(config.router, config.num_routers):
        _require_free(router.listen)
        _require_free(router.http_listen)
    read_key_and_chain(config.router)  # what is wrong with it should be known now, not once the model is loaded
    signal.signal(signal.SIGTERM, _exit)  # until the event loop has handlers of its own
    on_progress("ray", "starting" if config.ray.address is None else f"joining {config.ray.address}")
    with ray_cluster(config.ray, list(pools_of(config).slots.values())) as has_lost_ray:
        asyncio.run(_serve(config, facts, has_lost_ray, on_progress, log_level))
        if has_lost_ray():
            raise OSError(f"the Ray node that had joined {config.ray.address} has ended: start again to join it anew")


async def _serve(
    config: ServeConfig, facts: ModelFacts, has_lost_ray: Callable[[], bool], on_progress: Progress, log_level: str
) -> None:
    stop, stop_now = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, lambda: (stop_now if stop.is_set() else stop).set())
    hash_key = secrets.token_bytes(32)
    served = served_model(config, facts, hash_key)
    routers = Routers(
        router_configs(config.router, config.num_routers),
        LocalRouter.made_for(served) if config.num_routers == 1 else RayRouter.made_for(served, log_level),
        on_progress,
        config.worker_drain_timeout_s,
    )
    supervisor = Supervisor(with_folder(config, facts), hash_key, routers, on_progress, log_level)
    routers.wire(supervisor)
    try:
        addresses = await _until_ready(config, routers, supervisor, stop, on_progress)
        grpc, http = [one.grpc for one in addresses], [one.http for one in addresses if one.http]
        with announced(RunState(os.getpid(), tuple(grpc), tuple(http), config.drain_timeout_s)):
            on_progress("router", f"ready on {' and '.join(grpc)}; {kv_estimate(config, facts)}")
            if http:
                scheme = "http" if config.router.tls_cert is None else "https"
                on_progress("http", " and ".join(f"{scheme}://{one}/v1, /ui" for one in http))
            while not stop.is_set() and not has_lost_ray():  # without Ray no worker can be replaced
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), RAY_CHECK_INTERVAL_S)
    except Stopped:
        pass
    finally:
        on_progress("router", "stopping")
        await _drain(routers, config.drain_timeout_s, stop_now)
        await supervisor.stop()


async def _drain(routers: Routers, timeout_s: float, stop_now: asyncio.Event) -> None:
    """Running requests go on until they end, timeout_s has passed, or a second signal comes."""
    draining, hurried = asyncio.create_task(routers.stop(timeout_s)), asyncio.create_task(stop_now.wait())
    await asyncio.wait({draining, hurried}, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not draining.done():
        await routers.stop(0.0)
    await draining


def with_folder(config: ServeConfig, facts: ModelFacts) -> ServeConfig:
    """As the workers get it: they load from a folder, whatever name the model goes by."""
    engines = {
        name: dataclasses.replace(engine, model=str(facts.path))
        for name in ("engine", "prefill_engine", "decode_engine")
        if (engine := getattr(config, name)) is not None
    }
    return dataclasses.replace(config, **engines)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _require_free(listen: str) -> None:
    """Before Ray is started: a port in use should be known at once. Empty: a front that is off."""
    if not listen:
        return
    host, _, port = listen.rpartition(":")
    try:
        socket.create_server((host.strip("[]"), int(port))).close()
    except (OSError, OverflowError, ValueError) as error:
        raise ValueError(f"cannot listen on {listen}: {error}") from error


async def _until_ready(
    config: ServeConfig, routers: Routers, supervisor: Supervisor, stop: asyncio.Event, on_progress: Progress
) -> list[RouterAddress]:
    addresses = await _unless_stopped(stop, routers.start(*pools_of(config).num_expected))
    await _unless_stopped(stop, supervisor.start())
    on_progress("router", "warming links")
    await _unless_stopped(stop, routers.wait_ready(LINK_TIMEOUT_S))
    return addresses


async def _unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, or cancel it and raise Stopped where a signal comes first."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Stopped
        return task.result()
    finally:
        stopped.cancel()
        task.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


def served_model(config: ServeConfig, facts: ModelFacts, hash_key: bytes) -> ServedModel:
    """What the front door must know to validate, tokenize and hash."""
    engine = config.engine
    return ServedModel(
        name=model_name(engine.model),
        architecture=facts.architecture,
        dtype=engine.dtype,
        tokenizer=AutoTokenizer.from_pretrained(facts.path, local_files_only=True, trust_remote_code=False),
        vocab_size=facts.vocab_size,
        max_model_len=min(engine.max_model_len or facts.max_model_len, facts.max_model_len),
        eos_token_ids=facts.eos_token_ids,
        model_fingerprint=facts.fingerprint,
        block_size=engine.block_size,
        hash_block_size=engine.hash_block_size,
        hash_key=hash_key,
    )


def kv_estimate(config: ServeConfig, facts: ModelFacts) -> str:
    roles = dict.fromkeys(role for _, role in worker_slots(config))
    fits = {role: _kv_room(config.engine_of(role), facts) for role in roles}
    by_role = "; ".join(f"each {role} worker fits {room}" for role, room in fits.items())
    text = by_role if len(set(fits.values())) > 1 else f"each worker fits {fits[Role.PREFILL]}"
    return text if config.engine.modelled is None else f"{text}; steps are modelled: nothing is computed"


def _kv_room(engine: EngineConfig, facts: ModelFacts) -> str:
    layout = facts.kv_layout(engine.dtype, engine.block_size, engine.hash_block_size)
    if engine.fixed_num_blocks is None and engine.kv_nbytes is None:
        return f"the KV that {engine.gpu_memory_utilization:.0%} of a GPU has room for beside the model"
    num_blocks = engine.fixed_num_blocks or num_blocks_for(engine.kv_nbytes or 0, layout)
    mib = num_blocks * layout.block_nbytes / 2**20
    return f"{num_blocks * engine.block_size:,} tokens of KV ({num_blocks} blocks, {mib:,.0f} MiB)"
