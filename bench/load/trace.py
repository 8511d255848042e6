"""Reads a trace in Mooncake's format: one JSON object per line, with `timestamp` (ms), `input_length` and
`output_length` (tokens), and `hash_ids`, one per block of 512 prompt tokens; equal ids mean equal tokens.

Format: Qin et al., Mooncake, FAST '25. Knows nothing of what the tokens are."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.load.arrivals import require_positive

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK_TOKENS = 512
MAX_LINES_TOLD = 3
COUNTS = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True)
class TracedRequest:
    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...]
    block_tokens: int = BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class BadLine:
    number: int  # from 1
    reason: str


@dataclass(frozen=True, slots=True)
class Trace:
    requests: tuple[TracedRequest, ...]  # by time; the first at 0
    bad_lines: tuple[BadLine, ...] = ()

    def notes(self) -> list[str]:
        """What a reader of the results must know of lines that were left out."""
        if not self.bad_lines:
            return []
        told = "; ".join(f"line {bad.number}: {bad.reason}" for bad in self.bad_lines[:MAX_LINES_TOLD])
        more = ", ..." if len(self.bad_lines) > MAX_LINES_TOLD else ""
        return [f"{len(self.bad_lines)} lines of the trace left out ({told}{more})"]


def parse_trace(lines: Iterable[str]) -> Trace:
    """ValueError where no line holds a request."""
    requests: list[TracedRequest] = []
    bad_lines: list[BadLine] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            requests.append(_parse_line(line))
        except ValueError as error:
            bad_lines.append(BadLine(number, str(error)))
    if not requests:
        reasons = Trace((), tuple(bad_lines)).notes() or ["it is empty"]
        raise ValueError(f"no request in the trace: {reasons[0]}")
    requests.sort(key=lambda request: request.at_s)
    start_s = requests[0].at_s
    return Trace(tuple(replace(r, at_s=r.at_s - start_s) for r in requests), tuple(bad_lines))


def _parse_line(line: str) -> TracedRequest:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    if not isinstance(record, dict):
        raise ValueError("not an object")
    timestamp, num_prompt_tokens, num_output_tokens = (_count(record, name) for name in COUNTS)
    hash_ids = record.get("hash_ids")
    if not isinstance(hash_ids, list) or not all(type(hash_id) is int for hash_id in hash_ids):
        raise ValueError("hash_ids is not a list of integers")
    if len(hash_ids) != -(-num_prompt_tokens // BLOCK_TOKENS):
        raise ValueError(f"{len(hash_ids)} hash_ids for input_length {num_prompt_tokens}")
    if not num_prompt_tokens or not num_output_tokens:
        raise ValueError("input_length and output_length must be positive")
    return TracedRequest(timestamp / 1e3, int(num_prompt_tokens), int(num_output_tokens), tuple(hash_ids))


def _count(record: dict[str, object], name: str) -> int:
    value = record.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return value


def replayed(
    trace: Trace, *, speed: float, scale: float, duration_s: float | None, num_requests: int | None
) -> tuple[TracedRequest, ...]:
    """The requests as they are sent: `speed` times as fast; lengths times `scale`, blocks likewise, so that what is
    shared stays shared; those of [0, duration_s) after that, or the first num_requests."""
    require_positive("speed", speed)
    require_positive("trace-scale", scale)
    if duration_s is not None:
        require_positive("duration", duration_s)
    if num_requests is not None:
        require_positive("requests", num_requests)
    scaled = (_scaled(request, speed, scale) for request in trace.requests)
    return tuple(r for r in scaled if duration_s is None or r.at_s < duration_s)[:num_requests]


def _scaled(request: TracedRequest, speed: float, scale: float) -> TracedRequest:
    block_tokens = max(1, round(request.block_tokens * scale))
    num_prompt_tokens = max(1, round(request.num_prompt_tokens * scale))
    return TracedRequest(
        at_s=request.at_s / speed,
        num_prompt_tokens=min(num_prompt_tokens, block_tokens * len(request.hash_ids)),
        num_output_tokens=max(1, round(request.num_output_tokens * scale)),
        hash_ids=request.hash_ids,
        block_tokens=block_tokens,
    )
