"""Starts a private Ray on loopback, or joins one, and leaves nothing of it behind. Ray starts, places and watches the
workers; tokens and KV never pass through it."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator

from cluster.config import RayConfig

OBJECT_STORE_NBYTES = 80 << 20  # Ray's least; nothing of ours goes through it
PROBE_TIMEOUT_S = 3.0


class RayUnavailable(ValueError):
    """The cluster cannot be reached or cannot hold what was asked for."""


@contextlib.contextmanager
def ray_cluster(config: RayConfig, num_workers: int) -> Iterator[None]:
    """Connected to a Ray that has room for num_workers workers; RayUnavailable says what is missing."""
    if config.address is None:
        with _private_ray():
            _require_resources(config, num_workers)
            yield
        return
    _probe(config.address)
    import ray

    ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        _require_resources(config, num_workers)
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _private_ray() -> Iterator[None]:
    # Ray reads this when it is imported: without "cluster" support its processes listen on 127.0.0.1 only.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    # The folder's name is short: Ray's socket paths live below it and may not exceed 107 bytes.
    folder = tempfile.mkdtemp(prefix="twr-", dir="/tmp")
    try:
        ray.init(
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_NBYTES,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            # Each worker is an actor with a process of its own; idle ones would only cost start-up time, and niceness
            # would let anything else on the machine stall a worker beyond its lease.
            _system_config={
                "enable_worker_prestart": False,
                "prestart_worker_first_driver": False,
                "worker_niceness": 0,
            },
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _probe(address: str) -> None:
    """ray.init retries a dead address for minutes; a socket knows at once."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        raise RayUnavailable(f"Ray address {address!r} is not host:port (Ray Client addresses are not supported)")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise RayUnavailable(f"no Ray cluster at {address}: {error}") from error
    if not _is_loopback(host) and os.environ.get("RAY_AUTH_MODE") != "token":
        raise RayUnavailable(
            f"Ray at {address} is not on loopback: set RAY_AUTH_MODE=token there and here, or anyone who reaches it "
            "can run code on it"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _require_resources(config: RayConfig, num_workers: int) -> None:
    """Wait a little for nodes that are still joining, then say what is lacking."""
    import ray

    needed = {"CPU": num_workers * config.num_cpus_per_worker, "GPU": num_workers * config.num_gpus_per_worker}
    give_up_at = time.monotonic() + (config.schedule_timeout_s if config.address is not None else 0.0)
    while True:
        free = ray.available_resources()
        lacking = [f"{amount:g} {name}" for name, amount in needed.items() if amount > free.get(name, 0.0)]
        if not lacking:
            return
        if time.monotonic() >= give_up_at:
            have = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in needed)
            raise RayUnavailable(
                f"too few Ray resources: {num_workers} workers need {' and '.join(lacking)}, free are {have}"
            )
        time.sleep(0.5)
