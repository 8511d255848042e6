"""Waits until what an operator has ordered is done, by what the routers say of themselves. Orders nothing."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping

import grpc

from cluster.client_messages import failure_of
from cluster.client_types import CallFailed, Status
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerStub

POLL_INTERVAL_S = 0.1
ANSWER_TIMEOUT_S = 5.0
SETTLE_S = 20.0  # beyond a drain's own time: to end processes, and to be heard of

Ask = Callable[[], Status]  # some router's view; CallFailed where none answers


def until(is_done: Callable[[Status], bool], ask: Ask, timeout_s: float) -> bool:
    """False where it is not done after timeout_s. Routers that do not answer meanwhile are asked again."""
    give_up_at = time.monotonic() + timeout_s
    while True:
        try:
            if is_done(ask()):
                return True
        except CallFailed:
            if time.monotonic() >= give_up_at:
                raise
        if time.monotonic() >= give_up_at:
            return False
        time.sleep(POLL_INTERVAL_S)


def end_of_drain(now: Status, who: str, replaces: bool) -> Callable[[Status], bool]:
    """Of a worker: this life of it is gone, and another one serves where it is replaced. Of a router, which only says
    of itself that it is there: another one has said that it has left."""
    lives = [load.incarnation for load in now.workers if load.worker_id == who]
    if not lives:
        since = max((event.at_unix_s for event in now.events), default=0.0)
        words = f"{who} is back on" if replaces else f"{who} has left"
        return lambda status: any(
            event.message.startswith(words) and event.at_unix_s > since for event in status.events
        )

    def is_over(status: Status) -> bool:
        present = [load for load in status.workers if load.worker_id == who]
        has_left = all(load.incarnation not in lives for load in present)
        return has_left and (not replaces or any(load.state == "up" for load in present))

    return is_over


def worker_to_leave(address: str, timeout_s: float) -> bool:
    """Ask the worker that listens there itself, and wait until it listens no more. ConnectionError where none does."""
    with grpc.insecure_channel(address) as channel:
        try:
            WorkerStub(channel).Leave(pb.LeaveRequest(), timeout=ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            raise ConnectionError(f"no worker answers at {address}: {failure_of(error)}") from error
    give_up_at = time.monotonic() + timeout_s
    host, _, port = address.rpartition(":")
    while time.monotonic() < give_up_at:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
        except OSError:
            return True
        time.sleep(POLL_INTERVAL_S)
    return False


def has_sizes(sizes: Mapping[str, int]) -> Callable[[Status], bool]:
    """Each pool has so many workers that serve, and none that drains."""

    def is_so(status: Status) -> bool:
        states: dict[str, list[str]] = {pool: [] for pool in sizes}
        for load in status.workers:
            pool = load.worker_id.rpartition("-")[0]
            if pool in states:
                states[pool].append(load.state)
        return all(states[pool] == ["up"] * size for pool, size in sizes.items())

    return is_so
