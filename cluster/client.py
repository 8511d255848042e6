"""A small synchronous client of the public gRPC service, for the command line and the demo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grpc

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc

STATUS_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Sampling:
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class Client:
    """One channel to one front door. Errors are grpc.RpcError with the server's status and message."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address)
        self._inference = pb_grpc.InferenceStub(self._channel)
        self._cluster = pb_grpc.ClusterStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._channel.close()

    def generate(
        self, prompt: str, sampling: Sampling, timeout_s: float | None = None
    ) -> Iterator[pb.GenerateResponse]:
        """Chunks as they come, then one complete response with the account of the request."""
        params = pb.SamplingParams(stop=sampling.stop, ignore_eos=sampling.ignore_eos)
        for name in ("max_tokens", "temperature", "top_p", "top_k", "seed"):
            value = getattr(sampling, name)
            if value is not None:
                setattr(params, name, value)
        request = pb.GenerateRequest(text=prompt, sampling_params=params, stream=True)
        return iter(self._inference.Generate(request, timeout=timeout_s))

    def status(self) -> pb.GetStatusResponse:
        answer = self._cluster.GetStatus(pb.GetStatusRequest(), timeout=STATUS_TIMEOUT_S)
        assert isinstance(answer, pb.GetStatusResponse)
        return answer


def text_of(response: pb.GenerateResponse) -> str:
    return response.chunk.text if response.HasField("chunk") else response.complete.text
