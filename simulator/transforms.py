"""Changes what a list of requests asks for, or when: jitter, cuts, rates. Values in, values out; randomness is handed
in. Also what an infinite cache would hold of each prompt, which no placement can beat."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from random import Random

    from simulator.requests import SimRequest


def from_zero(requests: Iterable[SimRequest]) -> tuple[SimRequest, ...]:
    """In order of time, the first at 0."""
    ordered = sorted(requests, key=lambda request: request.at_s)
    start_s = ordered[0].at_s if ordered else 0.0
    return tuple(replace(request, at_s=request.at_s - start_s) for request in ordered)


def jittered(requests: Iterable[SimRequest], jitter_s: float, rng: Random) -> tuple[SimRequest, ...]:
    """Each later by a uniform draw from [0, jitter_s): a trace with coarse ticks has bursts that nobody sent."""
    if not (math.isfinite(jitter_s) and jitter_s >= 0):
        raise ValueError(f"jitter must not be negative, but is {jitter_s}")
    return from_zero(replace(request, at_s=request.at_s + rng.uniform(0, jitter_s)) for request in requests)


def without_longer(requests: Iterable[SimRequest], max_prompt_tokens: int) -> tuple[SimRequest, ...]:
    """Longer prompts are left out."""
    _require_positive("drop", max_prompt_tokens)
    return from_zero(request for request in requests if request.num_prompt_tokens <= max_prompt_tokens)


def with_sessions(requests: Iterable[SimRequest]) -> tuple[SimRequest, ...]:
    """In order of time. A request without a session continues the one that said the longest earlier prompt which it
    extends by whole blocks, if no other session began likewise; else it begins a session of its own."""
    nodes: dict[tuple[int, int], _Node] = {}
    return tuple(_with_session(nodes, number, request) for number, request in enumerate(requests))


@dataclass(slots=True)
class _Node:
    """A chain of blocks with which prompts begin."""

    number: int
    session: str  # the first that had it
    is_prompt: bool = False  # all full blocks of one
    is_shared: bool = False  # by several sessions


def _with_session(nodes: dict[tuple[int, int], _Node], number: int, request: SimRequest) -> SimRequest:
    num_full = request.num_prompt_tokens // request.block_tokens
    path, known, parent = [], "", 0
    for hash_id in request.hash_ids[:num_full]:
        node = nodes.get((parent, hash_id))
        if node is None:
            node = nodes[parent, hash_id] = _Node(len(nodes) + 1, "")
        elif node.is_prompt and not node.is_shared:
            known = node.session
        path.append(node)
        parent = node.number
    session = request.session or known or f"from {number}"
    for node in path:
        node.is_shared |= node.session not in ("", session)
        node.session = node.session or session
    if path:
        path[-1].is_prompt = True
    return replace(request, session=session)


def truncated(requests: Iterable[SimRequest], max_prompt_tokens: int) -> tuple[SimRequest, ...]:
    """Longer prompts end after max_prompt_tokens."""
    _require_positive("cut", max_prompt_tokens)
    return tuple(_truncated(request, max_prompt_tokens) for request in requests)


def _truncated(request: SimRequest, max_prompt_tokens: int) -> SimRequest:
    num_tokens = min(request.num_prompt_tokens, max_prompt_tokens)
    hash_ids = request.hash_ids[: -(-num_tokens // request.block_tokens)]
    return replace(request, num_prompt_tokens=num_tokens, hash_ids=hash_ids)


def rate_of(requests: Sequence[SimRequest]) -> float:
    """Requests per second, from the first to the last; infinite where all come at once."""
    duration_s = requests[-1].at_s - requests[0].at_s
    return math.inf if duration_s == 0 else (len(requests) - 1) / duration_s


def at_rate(requests: Sequence[SimRequest], rate: float) -> tuple[SimRequest, ...]:
    """The same requests, all gaps stretched or compressed alike, so that they come at this mean rate."""
    _require_positive("rate", rate)
    present_rate = rate_of(requests)
    if not math.isfinite(present_rate):
        raise ValueError(f"requests that all come at once have no rate to change to {rate:g}")
    factor = present_rate / rate
    return tuple(replace(request, at_s=request.at_s * factor) for request in requests)


def renumbered(requests: Iterable[SimRequest]) -> tuple[SimRequest, ...]:
    """Block ids 0, 1, 2, ... by first appearance; what was equal stays equal."""
    numbers: dict[int, int] = {}
    return tuple(
        replace(request, hash_ids=tuple(numbers.setdefault(hash_id, len(numbers)) for hash_id in request.hash_ids))
        for request in requests
    )


def ideal_cached_tokens(requests: Iterable[SimRequest]) -> list[int]:
    """What an infinite cache, filled at once, has of each prompt: the leading full blocks that an earlier prompt had
    too. At least one token is always left to compute."""
    children: dict[tuple[int, int], int] = {}  # (node, block id) -> node; 0 is the root
    return [_take_ideal(children, request) for request in requests]


def _take_ideal(children: dict[tuple[int, int], int], request: SimRequest) -> int:
    num_full = request.num_prompt_tokens // request.block_tokens
    node, num_cached = 0, 0
    for index, hash_id in enumerate(itertools.islice(request.hash_ids, num_full)):
        child = children.get((node, hash_id))
        if child is None:
            child = children[node, hash_id] = len(children) + 1
        elif num_cached == index:
            num_cached += 1
        node = child
    num_usable = (request.num_prompt_tokens - 1) // request.block_tokens
    return min(num_cached, num_usable) * request.block_tokens


def ideal_hit_rate(requests: Sequence[SimRequest]) -> float:
    """The share of all prompt tokens that an infinite cache would have."""
    return sum(ideal_cached_tokens(requests)) / sum(request.num_prompt_tokens for request in requests)


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive, not {value}")
