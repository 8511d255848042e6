"""A Ray node without resources on this machine, for as long as it is needed: a Ray driver can only join a cluster of
which its own machine is a node. Nothing is ever placed on it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OBJECT_STORE_NBYTES = 80 << 20  # Ray's least; nothing of ours goes through it
STOP_TIMEOUT_S = 5.0


class RayUnavailable(ValueError):
    """The cluster cannot be reached or cannot hold what was asked for."""


@dataclass(frozen=True, slots=True)
class RayNode:
    folder: str  # by which ray.init tells it from other nodes on this machine
    process: subprocess.Popen[bytes]

    def has_ended(self) -> bool:
        """As it does a minute after the cluster's head is gone."""
        return self.process.poll() is not None


@contextlib.contextmanager
def ray_folder() -> Iterator[str]:
    """The name is short: Ray's socket paths live below it and may not exceed 107 bytes."""
    folder = tempfile.mkdtemp(prefix="twr-", dir="/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ray_node(address: str, timeout_s: float) -> Iterator[RayNode]:
    """A node of the cluster at `address` (host:port), up within timeout_s."""
    with ray_folder() as folder:
        log = Path(folder, "start.log")
        process = _start(address, folder, log)
        try:
            _wait_until_up(process, folder, log, address, timeout_s)
            yield RayNode(folder, process)
        finally:
            _end(process)


def _start(address: str, folder: str, log: Path) -> subprocess.Popen[bytes]:
    options = {
        "address": address,
        "temp-dir": folder,
        "num-cpus": 0,
        "num-gpus": 0,
        "object-store-memory": OBJECT_STORE_NBYTES,
        "include-log-monitor": False,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, "--block", "--disable-usage-stats"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is for us; and all of the node's processes are one group
        )


def _wait_until_up(process: subprocess.Popen[bytes], folder: str, log: Path, address: str, timeout_s: float) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not Path(folder, "ray_current_cluster").exists():  # written by `ray start` once its node is up
        has_ended = process.poll() is not None
        if has_ended or time.monotonic() >= give_up_at:
            said = log.read_text(errors="replace").strip().rpartition("\n")[2][:300]
            what = "ended" if has_ended else f"is not up after {timeout_s:g} s"
            raise RayUnavailable(f"the Ray node that was to join {address} {what}: {said}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """`ray start --block` ends its processes on SIGTERM; what it leaves is killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
