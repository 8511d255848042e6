"""The synchronous client: plain values in, plain values out, over one channel to one front door. What is sent again
after a failure, and when, is generation.py's affair."""

from __future__ import annotations

import random
import secrets
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import replace
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
from cluster.generation import Generation
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc

T = TypeVar("T")

GENERATE_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 5.0  # for all that generates nothing
DEFAULT_SAMPLING = Sampling()
DEFAULT_RETRY = RetryPolicy()
OPEN = Access()


class Client:
    """Errors are CallFailed, with the server's status and message. May be shared by threads."""

    def __init__(self, address: str, retry: RetryPolicy = DEFAULT_RETRY, access: Access = OPEN) -> None:
        self.address = address
        self._retry = retry
        self._metadata = messages.metadata_of(access)
        credentials = messages.credentials_of(access)
        self._channel = (
            grpc.insecure_channel(address, messages.CHANNEL_OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, messages.CHANNEL_OPTIONS)
        )
        self._inference = pb_grpc.InferenceStub(self._channel)
        self._cluster = pb_grpc.ClusterStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

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

        A lost connection is made again and the output goes on behind the last token, within timeout_s in all."""
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
        """Ends a request in flight, which then finishes with FinishReason.ABORT; False: there is none of that id."""
        return self._ask(self._inference.Abort, pb.AbortRequest(request_id=request_id), was_found)

    def _read(self, generation: Generation, deadline_at: float) -> Generator[Chunk]:
        request = messages.request_of(generation.call())
        timeout_s = max(0.0, deadline_at - time.monotonic())
        call = self._inference.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            for response in call:
                yield generation.take(messages.chunk_of(response))
        except grpc.RpcError as error:
            raise messages.failure_of(error) from error
        finally:
            call.cancel()  # the user has closed the iterator; after an end it changes nothing
        if not generation.is_done:
            raise CallFailed("INTERNAL", "the stream ended before its last word")

    # --- operators ------------------------------------------------------------------------------------------------

    def explain_route(self, prompt: Prompt, sampling: Sampling = DEFAULT_SAMPLING) -> Route:
        """Where the request would go now, and why; runs nothing."""
        request = messages.request_of(make_call(prompt, sampling))
        return self._ask(self._inference.ExplainRoute, request, messages.route_of)

    def status(self) -> Status:
        return self._ask(self._cluster.GetStatus, pb.GetStatusRequest(), messages.status_of)

    def loads(self) -> tuple[WorkerLoad, ...]:
        return self._ask(self._inference.GetLoads, pb.GetLoadsRequest(), messages.loads_of)

    def model_info(self) -> ModelInfo:
        return self._ask(self._inference.GetModelInfo, pb.GetModelInfoRequest(), messages.model_info_of)

    def server_info(self) -> ServerInfo:
        return self._ask(self._inference.GetServerInfo, pb.GetServerInfoRequest(), messages.server_info_of)

    def _ask(self, method: Any, request: object, read: Callable[[Any], T]) -> T:
        try:
            return read(method(request, timeout=ANSWER_TIMEOUT_S, metadata=self._metadata))
        except grpc.RpcError as error:
            raise messages.failure_of(error) from error


def was_found(answer: pb.AbortResponse) -> bool:
    return answer.found


def make_call(prompt: Prompt, sampling: Sampling, request_id: str = "", priority: int = 0) -> Call:
    """With an id, to abort it by, and a seed, to resume with."""
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return Call(prompt, replace(sampling, seed=seed), request_id or f"req-{uuid.uuid4().hex}", priority)
