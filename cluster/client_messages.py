"""Between the client's plain values and the messages and errors of the wire. Decides nothing."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc

from cluster.client_types import (
    Access,
    Call,
    CallFailed,
    Chunk,
    ClusterEvent,
    Completion,
    Message,
    ModelInfo,
    Placement,
    Route,
    RouteCandidate,
    Sampling,
    ServerInfo,
    Status,
    WarmLink,
    WorkerLoad,
)
from protos import inference_pb2 as pb
from protos.codec import pack_token_ids, unpack_token_ids
from protos.types import FinishReason, Logprobs, ServingMode

T = TypeVar("T")

FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
    pb.FINISH_REASON_ERROR: FinishReason.ERROR,
}
SERVING_MODES = {
    pb.SERVING_MODE_DISAGGREGATED: ServingMode.DISAGGREGATED,
    pb.SERVING_MODE_LOCAL: ServingMode.LOCAL,
    pb.SERVING_MODE_RECOMPUTED: ServingMode.RECOMPUTED,
}
# A server that comes back is found within a second: gRPC's own waits grow to two minutes.
CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also how long one try to connect may take
    ("grpc.max_reconnect_backoff_ms", 1000),
)
PUSHBACK = "grpc-retry-pushback-ms"


# --- access -------------------------------------------------------------------------------------------------------


def credentials_of(access: Access) -> grpc.ChannelCredentials | None:
    """None: without TLS. OSError where ca_file cannot be read."""
    if access.ca_file is None and not access.tls:
        return None
    return grpc.ssl_channel_credentials(None if access.ca_file is None else Path(access.ca_file).read_bytes())


def metadata_of(access: Access) -> tuple[tuple[str, str], ...]:
    """ValueError where the token cannot be sent; gRPC's own error would quote it."""
    if access.token is None:
        return ()
    if not (access.token.isascii() and access.token.isprintable()):
        raise ValueError("the token has a line end or another character that no header may have")
    return (("authorization", f"Bearer {access.token}"),)


# --- to the server ------------------------------------------------------------------------------------------------


def request_of(call: Call, stream: bool = True) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        request_id=call.request_id,
        sampling_params=_sampling(call.sampling),
        stream=stream,
        priority=call.priority,
        output_token_ids=pack_token_ids(call.output_token_ids),
    )
    if isinstance(call.prompt, str):
        request.text = call.prompt
    elif call.prompt and isinstance(call.prompt[0], Message):
        messages = [pb.ChatMessage(role=turn.role, content=turn.content) for turn in call.prompt]  # type: ignore[union-attr]
        request.chat.CopyFrom(pb.Chat(messages=messages))
    else:
        request.tokenized.CopyFrom(pb.TokenizedInput(input_ids=call.prompt))  # type: ignore[arg-type]
    return request


def _sampling(sampling: Sampling) -> pb.SamplingParams:
    given = {one.name: getattr(sampling, one.name) for one in fields(sampling)}
    return pb.SamplingParams(**{name: value for name, value in given.items() if value is not None})


def drain_of(who: str, timeout_s: float | None, replace: bool) -> pb.DrainRequest:
    request = pb.DrainRequest(who=who, replace=replace)
    if timeout_s is not None:
        request.timeout_s = timeout_s
    return request


# --- from the server ----------------------------------------------------------------------------------------------


def failure_of(error: grpc.RpcError) -> CallFailed:
    """Of either kind of channel."""
    metadata: dict[str, Any] = dict(cast(Any, error.trailing_metadata() or ()))
    pushback_s = _seconds(str(metadata[PUSHBACK])) if PUSHBACK in metadata else None
    return CallFailed(error.code().name, error.details() or "", pushback_s)


def _seconds(milliseconds: str) -> float:
    """What is no number means, as gRPC has it: do not come back."""
    return int(milliseconds) / 1000 if milliseconds.isdecimal() else -1.0


def chunk_of(response: pb.GenerateResponse) -> Chunk:
    """The completion of a last word has only what that one carries; generation.py makes it whole."""
    is_last = response.HasField("complete")
    part = response.complete if is_last else response.chunk
    token_ids, logprobs = tuple(unpack_token_ids(part.token_ids)), tuple(map(_logprobs, part.logprobs))
    completion = _completion(response.request_id, response.complete, token_ids, logprobs) if is_last else None
    return Chunk(response.request_id, part.choice_index, part.first_index, token_ids, part.text, logprobs, completion)


def _completion(
    request_id: str, complete: pb.GenerateComplete, token_ids: tuple[int, ...], logprobs: tuple[Logprobs, ...]
) -> Completion:
    matched = complete.WhichOneof("matched_stop")
    return Completion(
        request_id=request_id,
        text=complete.text,
        token_ids=token_ids,
        finish_reason=FINISH_REASONS[complete.finish_reason],
        prompt_tokens=complete.prompt_tokens,
        cached_tokens=complete.cached_tokens,
        seed=complete.seed,
        placement=_plain(Placement, complete.placement, mode=SERVING_MODES.get(complete.placement.mode)),
        matched_stop=getattr(complete, matched) if matched else None,
        choice_index=complete.choice_index,
        logprobs=logprobs,
    )


def _logprobs(one: pb.TokenLogprob) -> Logprobs:
    return Logprobs(one.logprob, tuple(top.token_id for top in one.top), tuple(top.logprob for top in one.top))


def nothing_of(message: pb.DrainResponse | pb.ScaleResponse) -> None:
    """It has begun: that is all there is to say."""


def status_of(message: pb.GetStatusResponse) -> Status:
    events = tuple(_plain(ClusterEvent, event) for event in message.events)
    return _plain(Status, message, workers=loads_of(message), events=events)


def loads_of(message: pb.GetLoadsResponse | pb.GetStatusResponse) -> tuple[WorkerLoad, ...]:
    return tuple(
        _plain(
            WorkerLoad,
            load,
            warm_links=tuple(load.warm_links),
            links=tuple(_plain(WarmLink, link) for link in load.links),
        )
        for load in message.workers
    )


def model_info_of(message: pb.GetModelInfoResponse) -> ModelInfo:
    return _plain(ModelInfo, message, eos_token_ids=tuple(message.eos_token_ids))


def server_info_of(message: pb.GetServerInfoResponse) -> ServerInfo:
    return _plain(ServerInfo, message)


def route_of(message: pb.ExplainRouteResponse) -> Route:
    return _plain(
        Route,
        message,
        prefill_candidates=tuple(_plain(RouteCandidate, one) for one in message.prefill_candidates),
        decode_candidates=tuple(_plain(RouteCandidate, one) for one in message.decode_candidates),
    )


def _plain(cls: type[T], message: Any, **given: object) -> T:
    """A dataclass from a message's fields of the same names; `given` has those that need more than a copy."""
    copied = {one.name: getattr(message, one.name) for one in fields(cls) if one.name not in given}  # type: ignore[arg-type]
    return cls(**copied, **given)
