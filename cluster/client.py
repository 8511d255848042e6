"""The synchronous client: plain values in, plain values out, over one channel to each front door. What is sent again
after a failure, and when, is generation.py's affair."""

from __future__ import annotations

import random
import secrets
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grpc

from cluster import client_messages as messages
from cluster.client_types import (
    Access,
    Call,
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

T = TypeVar("T")

GENERATE_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 5.0  # for all that generates nothing
DEFAULT_SAMPLING = Sampling()
DEFAULT_RETRY = RetryPolicy()
OPEN = Access()


@dataclass(frozen=True, slots=True, eq=False)
class _Door:
    address: str
    channel: grpc.Channel
    inference: pb_grpc.InferenceStub
    cluster: pb_grpc.ClusterStub


class Client:
    """Errors are CallFailed, with the server's status and message. May be shared by threads.

    With the addresses of several routers of one cluster it calls at the first, and at the next one when that one cannot
    be reached or takes nothing more."""

    def __init__(self, address: str | Sequence[str], retry: RetryPolicy = DEFAULT_RETRY, access: Access = OPEN) -> None:
        self._retry = retry
        self._metadata = messages.metadata_of(access)
        credentials = messages.credentials_of(access)
        self._doors = Doors([_open_door(one, credentials) for one in addresses_of(address)])

    @property
    def address(self) -> str:
        """Where it calls now."""
        return self._doors.current.address

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        for door in self._doors.all:
            door.channel.close()

    # --- generation -----------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        request_id: str = "",
        priority: int = 0,
        timeout_s: float = GENERATE_TIMEOUT_S,
    ) -> Generator[Chunk]:
        """Chunks as they come; each choice's last one has its completion. Closing the iterator ends the request.

        A lost connection is made again, or made to another router, and the output goes on behind the last token, within
        timeout_s in all."""
        call = make_call(prompt, sampling, request_id, priority)
        generation, deadline_at = Generation(call, self._retry, random.random), time.monotonic() + timeout_s
        while not generation.is_done:
            try:
                yield from self._read(generation, deadline_at)
            except CallFailed as failure:
                if not generation.is_done:
                    time.sleep(generation.retry_wait_s(failure, time.monotonic(), deadline_at))

    def generate(self, prompt: Prompt, sampling: Sampling = DEFAULT_SAMPLING, **options: Any) -> Completion:
        """The whole output; options as for stream(). The first choice where there are several."""
        return self.choices(prompt, sampling, **options)[0]

    def choices(self, prompt: Prompt, sampling: Sampling = DEFAULT_SAMPLING, **options: Any) -> list[Completion]:
        """All `sampling.n` of them, in order."""
        found = [chunk.completion for chunk in self.stream(prompt, sampling, **options) if chunk.completion]
        return sorted(found, key=lambda completion: completion.choice_index)

    def abort(self, request_id: str) -> bool:
        """Ends a request in flight, which then finishes with FinishReason.ABORT. False: no router has one of that
        id."""
        failures: list[CallFailed] = []
        for door in self._doors.all:
            try:
                if self._ask_at(door.inference.Abort, pb.AbortRequest(request_id=request_id), was_found):
                    return True
            except CallFailed as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
        return False

    def _read(self, generation: Generation, deadline_at: float) -> Generator[Chunk]:
        request = messages.request_of(generation.call())
        timeout_s, door = max(0.0, deadline_at - time.monotonic()), self._doors.current
        call = door.inference.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            for response in call:
                yield generation.take(messages.chunk_of(response))
        except grpc.RpcError as error:
            failure = messages.failure_of(error)
            self._doors.leaves(door, failure)
            raise failure from error
        finally:
            call.cancel()  # the user has closed the iterator; after an end it changes nothing
        if not generation.is_done:
            raise CallFailed("INTERNAL", "the stream ended before its last word")

    # --- operators ------------------------------------------------------------------------------------------------

    def explain_route(self, prompt: Prompt, sampling: Sampling = DEFAULT_SAMPLING) -> Route:
        """Where the request would go now, and why; runs nothing."""
        request = messages.request_of(make_call(prompt, sampling))
        return self._ask(lambda door: door.inference.ExplainRoute, request, messages.route_of)

    def status(self) -> Status:
        return self._ask(lambda door: door.cluster.GetStatus, pb.GetStatusRequest(), messages.status_of)

    def drain(self, who: str, timeout_s: float | None = None, replace: bool = False) -> None:
        """A worker, or a router, finishes what it has and leaves; another one takes its place, where that is asked for.
        Returns when that has begun."""
        self._ask(lambda door: door.cluster.Drain, messages.drain_of(who, timeout_s, replace), messages.nothing_of)

    def scale(self, sizes: Mapping[str, int]) -> None:
        """Pools, by name, get so many workers. Returns when that has begun."""
        self._ask(lambda door: door.cluster.Scale, pb.ScaleRequest(sizes=sizes), messages.nothing_of)

    def loads(self) -> tuple[WorkerLoad, ...]:
        return self._ask(lambda door: door.inference.GetLoads, pb.GetLoadsRequest(), messages.loads_of)

    def model_info(self) -> ModelInfo:
        return self._ask(lambda door: door.inference.GetModelInfo, pb.GetModelInfoRequest(), messages.model_info_of)

    def server_info(self) -> ServerInfo:
        return self._ask(lambda door: door.inference.GetServerInfo, pb.GetServerInfoRequest(), messages.server_info_of)

    def _ask(self, method_of: Callable[[_Door], Any], request: object, read: Callable[[Any], T]) -> T:
        """At each door in turn, until one answers."""
        lost: list[CallFailed] = []
        while len(lost) < len(self._doors.all):
            door = self._doors.current
            try:
                return self._ask_at(method_of(door), request, read)
            except CallFailed as failure:
                if not self._doors.leaves(door, failure):
                    raise
                lost.append(failure)
        raise lost[-1]

    def _ask_at(self, method: Any, request: object, read: Callable[[Any], T]) -> T:
        try:
            return read(method(request, timeout=ANSWER_TIMEOUT_S, metadata=self._metadata))
        except grpc.RpcError as error:
            raise messages.failure_of(error) from error


def _open_door(address: str, credentials: grpc.ChannelCredentials | None) -> _Door:
    channel = (
        grpc.insecure_channel(address, messages.CHANNEL_OPTIONS)
        if credentials is None
        else grpc.secure_channel(address, credentials, messages.CHANNEL_OPTIONS)
    )
    return _Door(address, channel, pb_grpc.InferenceStub(channel), pb_grpc.ClusterStub(channel))


def was_found(answer: pb.AbortResponse) -> bool:
    return answer.found


def make_call(prompt: Prompt, sampling: Sampling, request_id: str = "", priority: int = 0) -> Call:
    """With an id, to abort it by, and a seed, to resume with."""
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return Call(prompt, replace(sampling, seed=seed), request_id or f"req-{uuid.uuid4().hex}", priority)
