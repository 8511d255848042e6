"""Reads generation streams to their end, and checks on the way what every stream must keep: indices without gap or
repeat, text that concatenates, counts that agree."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc.aio

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from protos.codec import unpack_token_ids


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    complete: pb.GenerateComplete = field(default_factory=pb.GenerateComplete)

    @property
    def placement(self) -> pb.Placement:
        return self.complete.placement

    def take(self, part: pb.GenerateStreamChunk | pb.GenerateComplete) -> None:
        ids = list(unpack_token_ids(part.token_ids))
        assert part.first_index == len(self.token_ids), (part.first_index, len(self.token_ids))
        self.token_ids += ids
        self.text += part.text
        self.logprobs += part.logprobs
        assert len(part.logprobs) in (0, len(ids))
        assert part.completion_tokens == len(self.token_ids)


async def generate(
    channel: grpc.aio.Channel,
    request: pb.GenerateRequest,
    timeout_s: float = 90.0,
    on_chunk: Callable[[Answer], None] = lambda answer: None,
) -> Answer:
    answer = Answer(token_ids=list(unpack_token_ids(request.output_token_ids)))  # a resumed one goes on behind them
    async for response in pb_grpc.InferenceStub(channel).Generate(request, timeout=timeout_s):
        if response.HasField("chunk"):
            answer.take(response.chunk)
            on_chunk(answer)
        else:
            answer.take(response.complete)
            answer.complete = response.complete
    assert answer.complete.finish_reason, "the stream ended without a Complete"
    return answer


async def generate_choices(address: str, request: pb.GenerateRequest, timeout_s: float = 90.0) -> list[Answer]:
    """All choices of one call, by choice_index."""
    answers = [Answer() for _ in range(request.sampling_params.n)]
    async with grpc.aio.insecure_channel(address) as channel:
        async for response in pb_grpc.InferenceStub(channel).Generate(request, timeout=timeout_s):
            part = response.chunk if response.HasField("chunk") else response.complete
            answer = answers[part.choice_index]
            assert not answer.complete.finish_reason, "a choice went on after its Complete"
            answer.take(part)
            if isinstance(part, pb.GenerateComplete):
                answer.complete = part
    assert all(answer.complete.finish_reason for answer in answers), "the stream ended without every Complete"
    return answers


async def generate_all(address: str, requests: list[pb.GenerateRequest]) -> list[Answer]:
    """All at once, over one channel."""
    async with grpc.aio.insecure_channel(address) as channel:
        return list(await asyncio.gather(*(generate(channel, request) for request in requests)))
