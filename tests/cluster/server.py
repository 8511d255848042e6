"""A real `twinring serve` in a process of its own, and what tests need to ask of it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

from cluster.client import Client
from cluster.client_types import Status
from cluster.run_state import RunState, running_servers
from protos import inference_pb2 as pb

T = TypeVar("T")

LISTEN = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
# These machines stall: a test of something else must not lose a worker because its neighbour took the processor, nor be
# refused because its workers have become slow.
PATIENT = (
    *("lease.lease_s=6.0", "transfer.silence_timeout_s=6.0", "transfer.chunk_timeout_s=5.0"),
    "router.refuses_early=false",
)


class Server:
    """One serving process and its children."""

    def __init__(self, arguments: list[str], log: Path, program: tuple[str, ...] = ("cluster.cli",)) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *program, "serve", *LISTEN, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.address = self.http_address = ""
        self.addresses: tuple[str, ...] = ()  # of all routers
        self.http_addresses: tuple[str, ...] = ()

    def wait_ready(self) -> None:
        def announced() -> RunState | None:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            return next((state for state in running_servers() if state.pid == self.process.pid), None)

        state = eventually(announced, START_TIMEOUT_S)
        assert state is not None, f"not ready within {START_TIMEOUT_S:g} s:\n{self.log.read_text()}"
        self.address, self.http_address = state.address, state.http_address
        self.addresses, self.http_addresses = state.addresses, state.http_addresses

    def client(self) -> Client:
        return Client(self.address)

    def status(self) -> Status:
        with self.client() as client:
            return client.status()

    def worker_pid(self, worker_id: str) -> int:
        return next(load.pid for load in self.status().workers if load.worker_id == worker_id)

    def family(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def serving(
    folder: Path,
    *arguments: str,
    settings: tuple[str, ...] = PATIENT,
    program: tuple[str, ...] = ("cluster.cli",),
) -> Iterator[Server]:
    """A ready server; after the block every ledger must balance with nothing held, and every process must be gone."""
    options = [option for setting in settings for option in ("--set", setting)]
    server = Server([*arguments, *options], folder / "serve.log", program)
    try:
        server.wait_ready()
        yield server
        assert_clean(server)
    finally:
        family = server.family() if server.process.poll() is None else []
        server.stop()
        eventually(lambda: not [process for process in family if process.is_running()], 10.0)


def assert_clean(server: Server) -> None:
    """Within a second of the last request nothing is held or leased anywhere, and every ledger balances."""

    def clean() -> bool:
        status = server.status()
        return status.num_requests_in_flight == 0 and all(
            load.ledger_balanced and load.num_held_blocks == load.num_leased_blocks == 0
            and load.num_free_blocks + load.num_cached_blocks == load.num_blocks
            for load in status.workers
            if load.state == "up"
        )  # fmt: skip

    assert eventually(clean, 5.0), server.status()


def eventually(probe: Callable[[], T], timeout_s: float) -> T:
    """The first true answer of `probe`, or its last answer once timeout_s has passed."""
    give_up_at = time.monotonic() + timeout_s
    while not (answer := probe()) and time.monotonic() < give_up_at:
        time.sleep(0.05)
    return answer


def request(
    prompt: list[int] | str, max_tokens: int, *, stream: bool = True, temperature: float = 0.0, **sampling: object
) -> pb.GenerateRequest:
    params = pb.SamplingParams(max_tokens=max_tokens, temperature=temperature, **sampling)  # type: ignore[arg-type]
    if isinstance(prompt, str):
        return pb.GenerateRequest(text=prompt, sampling_params=params, stream=stream)
    return pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=prompt), sampling_params=params, stream=stream)
