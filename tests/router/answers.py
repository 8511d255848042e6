"""Reading the answers of Generate."""

from __future__ import annotations

from array import array
from typing import Any

from protos import inference_pb2 as pb
from protos.codec import unpack_token_ids
from tests.router.conftest import SERVED


def ids(text: str) -> list[int]:
    return list(SERVED.encode(text))


def sampling(**fields: Any) -> pb.SamplingParams:
    return pb.SamplingParams(**{"max_tokens": 8, **fields})


def tokens_of(responses: list[pb.GenerateResponse]) -> list[int]:
    """All output tokens; each index must come once and in order."""
    found = array("i")
    for response in responses:
        part = response.chunk if response.HasField("chunk") else response.complete
        assert part.first_index == len(found)
        found += unpack_token_ids(part.token_ids)
        assert part.completion_tokens == len(found)
    return list(found)


def text_of(responses: list[pb.GenerateResponse]) -> str:
    return "".join((r.chunk if r.HasField("chunk") else r.complete).text for r in responses)
