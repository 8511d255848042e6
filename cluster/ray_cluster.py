"""Starts a private Ray on loopback, or joins one, and leaves nothing of it behind. Ray starts, places and watches the
workers; tokens and KV never pass through it."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from cluster.config import RayConfig
from cluster.ray_node import OBJECT_STORE_NBYTES, RayNode, RayUnavailable, ray_folder, ray_node
from protos.types import Role

PROBE_TIMEOUT_S = 3.0
PROBE_INTERVAL_S = 0.5


@contextlib.contextmanager
def ray_cluster(config: RayConfig, roles: Sequence[Role]) -> Iterator[Callable[[], bool]]:
    """Connected to a Ray that has room for a worker of each of `roles`; RayUnavailable says what is missing. What it
    gives says whether the node that was started here for it has ended, and the connection with it."""
    with _private_ray() if config.address is None else _joined_ray(config, config.address) as node:
        _require_resources(config, roles)
        yield node.has_ended if node is not None else lambda: False


@contextlib.contextmanager
def _joined_ray(config: RayConfig, address: str) -> Iterator[RayNode | None]:
    with contextlib.ExitStack() as stack:
        node = None
        if config.join_as_node:  # this machine comes up with the cluster, perhaps before its head
            _probe(address, config.schedule_timeout_s)
            node = stack.enter_context(ray_node(address, config.start_timeout_s))
        else:
            _probe(address, 0.0)
        import ray

        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, _temp_dir=node and node.folder)
            yield node
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _private_ray() -> Iterator[None]:
    # Ray reads this when it is imported: without "cluster" support its processes listen on 127.0.0.1 only.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    with ray_folder() as folder:
        try:
            ray.init(
                num_cpus=os.cpu_count(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_NBYTES,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
                # Each worker is an actor with a process of its own; idle ones would only cost start-up time, and
                # niceness would let anything else on the machine stall a worker beyond its lease.
                _system_config={
                    "enable_worker_prestart": False,
                    "prestart_worker_first_driver": False,
                    "worker_niceness": 0,
                },
            )
            yield
        finally:
            ray.shutdown()


def _probe(address: str, wait_s: float) -> None:
    """ray.init retries a dead address for minutes; a socket knows at once. Tried for wait_s, at least once."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        raise RayUnavailable(f"Ray address {address!r} is not host:port (Ray Client addresses are not supported)")
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S).close()
            break
        except (OSError, OverflowError) as error:
            if time.monotonic() >= give_up_at:
                raise RayUnavailable(f"no Ray cluster at {address}: {error}") from error
        time.sleep(PROBE_INTERVAL_S)
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


def needed_resources(config: RayConfig, roles: Sequence[Role]) -> dict[str, float]:
    needed = {"CPU": len(roles) * config.num_cpus_per_worker, "GPU": len(roles) * config.num_gpus_per_worker}
    return needed | Counter(name for role in roles if (name := config.resource_of(role)))


def _require_resources(config: RayConfig, roles: Sequence[Role]) -> None:
    """Wait for nodes that are still joining, then say what is lacking."""
    import ray

    needed = needed_resources(config, roles)
    give_up_at = time.monotonic() + (config.schedule_timeout_s if config.address is not None else 0.0)
    while True:
        free = ray.available_resources()
        lacking = [f"{amount:g} {name}" for name, amount in needed.items() if amount > free.get(name, 0.0)]
        if not lacking:
            return
        if time.monotonic() >= give_up_at:
            have = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in needed)
            raise RayUnavailable(
                f"too few Ray resources: {len(roles)} workers need {' and '.join(lacking)}, free are {have}"
            )
        time.sleep(0.5)
