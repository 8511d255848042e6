"""Clients that ask on and on, and what they should be answered."""

from __future__ import annotations

import asyncio

import grpc.aio

from protos import inference_pb2 as pb
from tests.cluster.server import request
from tests.cluster.streams import Answer, generate

NUM_CLIENTS = 6
NUM_TOKENS = 60
REQUESTS = [request([i, *range(40, 240)], NUM_TOKENS, ignore_eos=True) for i in range(12)]


class Load:
    """Clients that ask again soon after they are answered, until `stopped` is set. Any failure ends them with it."""

    def __init__(self, num_clients: int = NUM_CLIENTS, pause_s: float = 0.0) -> None:
        self._pause_s = pause_s
        self._num_clients = num_clients
        self.stopped = asyncio.Event()
        self.answers: list[tuple[int, Answer]] = []

    async def run(self, channel: grpc.aio.Channel) -> None:
        await asyncio.gather(*(self._ask(channel, client) for client in range(self._num_clients)))

    def workers(self, first: int) -> set[str]:
        """Who took part in the answers from the first on."""
        placements = [answer.placement for _, answer in self.answers[first:]]
        return {place for one in placements for place in (one.prefill_worker, one.decode_worker)}

    async def _ask(self, channel: grpc.aio.Channel, number: int) -> None:
        while not self.stopped.is_set():
            number = (number + 1) % len(REQUESTS)
            self.answers.append((number, await generate(channel, REQUESTS[number])))
            await asyncio.sleep(self._pause_s)


async def undisturbed(channel: grpc.aio.Channel, requests: list[pb.GenerateRequest]) -> list[list[int]]:
    return [answer.token_ids for answer in await asyncio.gather(*(generate(channel, one) for one in requests))]
