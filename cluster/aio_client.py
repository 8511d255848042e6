"""The asynchronous client: as client.py, for asyncio. Cancelling a task that awaits it ends the request."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from cluster import client_messages as messages
from cluster.client import (
    ANSWER_TIMEOUT_S,
    DEFAULT_RETRY,
    DEFAULT_SAMPLING,
    GENERATE_TIMEOUT_S,
    OPEN,
    T,
    make_call,
    was_found,
)
from cluster.client_types import (
    Access,
    CallFailed,
    Chunk,
    Completion,
    ModelInfo,
    Prompt,
    RetryPolicy,
    Route,
    Sampling,
    ServerInfo,
    Status,
    WorkerLoad,
)
from cluster.doors import Doors, addresses_of
from cluster.generation import Generation
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc


@dataclass(frozen=True, slots=True, eq=False)
class _Door:
    address: str
    channel: grpc.aio.Channel
    inference: pb_grpc.InferenceStub
    cluster: pb_grpc.ClusterStub


class AsyncClient:
    """Errors are CallFailed. Belongs to the event loop that it was made on. Several addresses: as Client."""

    def __init__(self, address: str | Sequence[str], retry: RetryPolicy = DEFAULT_RETRY, access: Access = OPEN) -> None:
        self._retry = retry
        self._metadata = messages.metadata_of(access)
        credentials = messages.credentials_of(access)
        self._doors = Doors([_open_door(one, credentials) for one in addresses_of(address)])

    @property
    def address(self) -> str:
        """Where it calls now."""
        return self._doors.current.address

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        for door in self._doors.all:
            await door.channel.close()

    # --- generation -----------------------------------------------------------------------------------------------

    async def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        request_id: str = "",
        priority: int = 0,
        timeout_s: float = GENERATE_TIMEOUT_S,
    ) -> AsyncGenerator[Chunk]:
        """As Client.stream. One that is left before its end should be closed (contextlib.aclosing): the request goes on
        until it is."""
        call = make_call(prompt, sampling, request_id, priority)
        generation, deadline_at = Generation(call, self._retry, random.random), time.monotonic() + timeout_s
        while not generation.is_done:
            attempt = self._read(generation, deadline_at)
            try:
                async for chunk in attempt:
                    yield chunk
            except CallFailed as failure:
                if not generation.is_done:
                    await asyncio.sleep(generation.retry_wait_s(failure, time.monotonic(), deadline_at))
            finally:
                await attempt.aclose()

    async def generate(self, prompt: Prompt, sampling: Sampling = DEFAULT_SAMPLING, **options: Any) -> Completion:
        return (await self.choices(prompt, sampling, **options))[0]

    async def choices(self, prompt: Prompt, sampling: Sampling = DEFAULT_SAMPLING, **options: Any) -> list[Completion]:
        found = [chunk.completion async for chunk in self.stream(prompt, sampling, **options) if chunk.completion]
        return sorted(found, key=lambda completion: completion.choice_index)

    async def abort(self, request_id: str) -> bool:
        failures: list[CallFailed] = []
        for door in self._doors.all:
            try:
                if await self._ask_at(door.inference.Abort, pb.AbortRequest(request_id=request_id), was_found):
                    return True
            except CallFailed as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
        return False

    async def _read(self, generation: Generation, deadline_at: float) -> AsyncGenerator[Chunk]:
        request = messages.request_of(generation.call())
        timeout_s, door = max(0.0, deadline_at - time.monotonic()), self._doors.current
        call = door.inference.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for response in call:
                yield generation.take(messages.chunk_of(response))
        except grpc.RpcError as error:
            failure = messages.failure_of(error)
            self._doors.leaves(door, failure)
            raise failure from error
        finally:
            call.cancel()
        if not generation.is_done:
            raise CallFailed("INTERNAL", "the stream ended before its last word")

    # --- operators ------------------------------------------------------------------------------------------------

    async def explain_route(self, prompt: Prompt, sampling: Sampling = DEFAULT_SAMPLING) -> Route:
        request = messages.request_of(make_call(prompt, sampling))
        return await self._ask(lambda door: door.inference.ExplainRoute, request, messages.route_of)

    async def status(self) -> Status:
        return await self._ask(lambda door: door.cluster.GetStatus, pb.GetStatusRequest(), messages.status_of)

    async def drain(self, who: str, timeout_s: float | None = None, replace: bool = False) -> None:
        request = messages.drain_of(who, timeout_s, replace)
        await self._ask(lambda door: door.cluster.Drain, request, messages.nothing_of)

    async def scale(self, sizes: Mapping[str, int]) -> None:
        await self._ask(lambda door: door.cluster.Scale, pb.ScaleRequest(sizes=sizes), messages.nothing_of)

    async def loads(self) -> tuple[WorkerLoad, ...]:
        return await self._ask(lambda door: door.inference.GetLoads, pb.GetLoadsRequest(), messages.loads_of)

    async def model_info(self) -> ModelInfo:
        return await self._ask(
            lambda door: door.inference.GetModelInfo, pb.GetModelInfoRequest(), messages.model_info_of
        )

    async def server_info(self) -> ServerInfo:
        return await self._ask(
            lambda door: door.inference.GetServerInfo, pb.GetServerInfoRequest(), messages.server_info_of
        )

    async def _ask(self, method_of: Callable[[_Door], Any], request: object, read: Callable[[Any], T]) -> T:
        lost: list[CallFailed] = []
        while len(lost) < len(self._doors.all):
            door = self._doors.current
            try:
                return await self._ask_at(method_of(door), request, read)
            except CallFailed as failure:
                if not self._doors.leaves(door, failure):
                    raise
                lost.append(failure)
        raise lost[-1]

    async def _ask_at(self, method: Any, request: object, read: Callable[[Any], T]) -> T:
        try:
            return read(await method(request, timeout=ANSWER_TIMEOUT_S, metadata=self._metadata))
        except grpc.RpcError as error:
            raise messages.failure_of(error) from error


def _open_door(address: str, credentials: grpc.ChannelCredentials | None) -> _Door:
    channel = (
        grpc.aio.insecure_channel(address, messages.CHANNEL_OPTIONS)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, messages.CHANNEL_OPTIONS)
    )
    return _Door(address, channel, pb_grpc.InferenceStub(channel), pb_grpc.ClusterStub(channel))
