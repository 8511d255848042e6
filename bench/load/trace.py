"""How a trace is replayed against a server: how fast, how much of it, with which lengths. Reading one is
simulator/traces.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.load.arrivals import require_positive
from simulator.requests import SimRequest

if TYPE_CHECKING:
    from simulator.traces import Trace


def replayed(
    trace: Trace, *, speed: float, scale: float, duration_s: float | None, num_requests: int | None
) -> tuple[SimRequest, ...]:
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


def _scaled(request: SimRequest, speed: float, scale: float) -> SimRequest:
    block_tokens = max(1, round(request.block_tokens * scale))
    num_prompt_tokens = max(1, round(request.num_prompt_tokens * scale))
    num_prompt_tokens = min(num_prompt_tokens, block_tokens * len(request.hash_ids))
    return SimRequest(
        at_s=request.at_s / speed,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=max(1, round(request.num_output_tokens * scale)),
        hash_ids=request.hash_ids[: -(-num_prompt_tokens // block_tokens)],
        block_tokens=block_tokens,
    )
