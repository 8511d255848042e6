"""Makes public requests that nobody would write by hand: valid ones, bent in a few fields to whatever the wire can
carry. The same seed makes the same requests."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from protos import inference_pb2 as pb
from protos.codec import pack_token_ids

WORDS = [
    "",
    "a",
    "the quick brown fox ",
    "\x00",
    "\ud7ff",
    "日本語",
    "🦊" * 40,
    "<|eos|>",
    "{{ 7 * 7 }}",
    " " * 300,
    "x" * 3000,
]
FLOATS = [0.0, -0.0, 0.3, 1.0, 1.5, -1.0, 100.0, 1e-30, 3e38, math.nan, math.inf, -math.inf]
SMALL = [0, 1, 2, 5, 20, 255, 256, 299, 300]
LARGE = [1000, 2**15, 2**31 - 1]
EXTREMES = {
    FieldDescriptor.TYPE_UINT32: [2**32 - 1, 2**31],
    FieldDescriptor.TYPE_INT32: [-1, -(2**31)],
    FieldDescriptor.TYPE_SINT32: [-1, -(2**31)],
    FieldDescriptor.TYPE_INT64: [-1, -(2**63), 2**63 - 1],
}


def requests(seed: int, num: int) -> Iterator[pb.GenerateRequest]:
    rng = random.Random(seed)
    for _ in range(num):
        request = _valid(rng)
        for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
            _bend(request, rng)
        yield request


def _valid(rng: random.Random) -> pb.GenerateRequest:
    request = pb.GenerateRequest(stream=rng.random() < 0.5)
    request.sampling_params.max_tokens = rng.choice([1, 2, 8])
    request.sampling_params.temperature = rng.choice([0.0, 0.8])
    if rng.random() < 0.5:
        request.text = rng.choice(WORDS[1:])
    else:
        request.tokenized.input_ids.extend(rng.choices(range(256), k=rng.choice([1, 3, 40, 200])))
    return request


def _bend(message: Any, rng: random.Random) -> None:
    """Give one field of the message, or of one within it, some value of its type."""
    field = rng.choice(message.DESCRIPTOR.fields)
    value = getattr(message, field.name)
    if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
        for _ in range(rng.choice([1, 3, 400])):
            value[rng.choice(SMALL + LARGE)] = rng.choice(FLOATS)
    elif field.type == FieldDescriptor.TYPE_MESSAGE and field.is_repeated:
        for _ in range(rng.choice([1, 2, 50])):
            _bend(value.add(), rng)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        value.SetInParent()
        _bend(value, rng)
    elif field.is_repeated:
        value.extend(_scalar(field, rng) for _ in range(rng.choice([1, 3, 30])))
    else:
        setattr(message, field.name, _scalar(field, rng))


def _scalar(field: FieldDescriptor, rng: random.Random) -> object:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return rng.choice(WORDS)
        case FieldDescriptor.TYPE_BYTES:
            return rng.choice([b"", b"\xff", b"abc", pack_token_ids([1, 2, 3]), pack_token_ids([-1]), bytes(4000)])
        case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
            return rng.choice(FLOATS)
        case FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.TYPE_ENUM:
            return rng.choice(field.enum_type.values).number
        case _:
            return rng.choice(SMALL + LARGE + EXTREMES[field.type])
