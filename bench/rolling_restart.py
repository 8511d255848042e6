"""Every worker of a running cluster is replaced, one after the other, under load: drained, and beside it killed, which
is what a restart costs where nothing drains."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc.aio

from bench.harness import Figure
from bench.service import serving
from cluster.aio_client import AsyncClient
from cluster.client_types import Status
from cluster.wait_for import end_of_drain
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from protos.codec import unpack_token_ids

DESCRIPTION = "every worker replaced under load, drained or killed: failed requests, lost tokens, longest gap"

NUM_CLIENTS = 4
NUM_NEW_TOKENS = 150
PROMPT_LEN = 130  # tokens: two full blocks
NUM_PROMPTS = 12
UNDISTURBED_S = 20.0
RESTART_TIMEOUT_S = 150.0
SETTINGS = (
    *("num_prefill=2", "num_decode=2", "engine.num_blocks=512"),
    *("lease.lease_s=6.0", "transfer.silence_timeout_s=6.0", "ray.start_timeout_s=150"),
)


@dataclass
class Phase:
    """What the clients saw in one of the three stretches."""

    num_requests: int = 0
    num_failed: int = 0
    num_wrong_indices: int = 0  # tokens that came twice, or never
    num_different: int = 0  # requests whose tokens differ from those of the first stretch
    num_attempts: int = 0
    worst_gap_s: float = 0.0
    restarts_s: list[float] = field(default_factory=list)


class Clients:
    """Invariant: NUM_CLIENTS requests are in flight, from start() to stop()."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.phase = Phase()
        self._stub = pb_grpc.InferenceStub(channel)
        self._expected: dict[int, list[int]] = {}
        self._stopped = False

    async def run(self) -> None:
        await asyncio.gather(*(self._ask_on(number) for number in range(NUM_CLIENTS)))

    def stop(self) -> None:
        self._stopped = True

    async def _ask_on(self, number: int) -> None:
        while not self._stopped:
            number = (number + 1) % NUM_PROMPTS
            phase = self.phase
            phase.num_requests += 1
            try:
                token_ids = await self._ask(number)
            except grpc.aio.AioRpcError:
                phase.num_failed += 1
                continue
            phase.num_different += self._expected.setdefault(number, token_ids) != token_ids

    async def _ask(self, number: int) -> list[int]:
        params = pb.SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)
        prompt = [number, *(number * position % 251 for position in range(1, PROMPT_LEN))]
        request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=prompt), sampling_params=params, stream=True)
        token_ids: list[int] = []
        last_at: float | None = None
        async for response in self._stub.Generate(request, timeout=120.0):
            part = response.complete if response.HasField("complete") else response.chunk
            new = unpack_token_ids(part.token_ids)
            if new:
                now = time.monotonic()
                gap_s, last_at = 0.0 if last_at is None else now - last_at, now
                self.phase.worst_gap_s = max(self.phase.worst_gap_s, gap_s)
                self.phase.num_wrong_indices += abs(part.first_index - len(token_ids))
                token_ids += new
            if response.HasField("complete"):
                self.phase.num_attempts += response.complete.placement.attempts - 1
        self.phase.num_wrong_indices += abs(NUM_NEW_TOKENS - len(token_ids))
        return token_ids


def run(quick: bool) -> list[Figure]:
    with serving(SETTINGS) as address:
        phases = asyncio.run(_measure(address, quick))
    return [figure for name, phase in phases.items() for figure in _figures(name, phase)]


async def _measure(address: str, quick: bool) -> dict[str, Phase]:
    phases = {name: Phase() for name in ("undisturbed", "drained", "killed")}
    async with AsyncClient(address) as operator, grpc.aio.insecure_channel(address) as channel:
        clients = Clients(channel)
        clients.phase = phases["undisturbed"]
        asking = asyncio.create_task(clients.run())
        await asyncio.sleep(5.0 if quick else UNDISTURBED_S)
        for name, restart in (("drained", _drain), ("killed", _kill)):
            clients.phase = phases[name]
            phases[name].restarts_s = await _restart_all(operator, restart, 2 if quick else None)
        clients.stop()
        await asyncio.wait_for(asking, 120.0)
    return phases


Restart = Callable[[AsyncClient, Status, str], Awaitable[None]]


async def _restart_all(operator: AsyncClient, restart: Restart, num: int | None) -> list[float]:
    """How long each took to be gone and to be back."""
    found: list[float] = []
    names = [load.worker_id for load in (await operator.status()).workers]
    for worker_id in itertools.islice(reversed(names), num):
        before = await operator.status()
        began_at = time.monotonic()
        await restart(operator, before, worker_id)
        is_back = end_of_drain(before, worker_id, replaces=True)
        async with asyncio.timeout(RESTART_TIMEOUT_S):
            while not is_back(await operator.status()):  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.1)
        found.append(time.monotonic() - began_at)
    return found


async def _drain(operator: AsyncClient, status: Status, worker_id: str) -> None:
    await operator.drain(worker_id, timeout_s=60.0, replace=True)


async def _kill(operator: AsyncClient, status: Status, worker_id: str) -> None:
    os.kill(next(load.pid for load in status.workers if load.worker_id == worker_id), signal.SIGKILL)


def _figures(name: str, phase: Phase) -> list[Figure]:
    note = f"{phase.num_requests} requests, {len(phase.restarts_s)} workers replaced"
    target = 0.0 if name == "drained" else None
    counts = (
        ("failed", phase.num_failed, "requests", target),
        ("wrong_indices", phase.num_wrong_indices, "tokens", target),
        ("attempts_lost", phase.num_attempts, "attempts", target),
        ("different", phase.num_different, "requests", None),
    )
    figures = [Figure(f"{name}_{key}", value, unit, goal, "lower", note) for key, value, unit, goal in counts]
    figures.append(Figure(f"{name}_worst_gap_ms", 1e3 * phase.worst_gap_s, "ms", better="lower"))
    if phase.restarts_s:
        slowest_s = max(phase.restarts_s)
        figures.append(
            Figure(f"{name}_slowest_restart_s", slowest_s, "s", better="lower", note="until it serves again")
        )
    return figures
