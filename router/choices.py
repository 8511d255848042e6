"""The choices of one call (n > 1) as requests of their own: what differs between them, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256

from protos.types import GenerateRequest


def choices_of(request: GenerateRequest, n: int) -> Iterator[GenerateRequest]:
    """Choice 0 is the request itself."""
    yield request
    for index in range(1, n):
        params = replace(request.sampling_params, seed=choice_seed(request.sampling_params.seed, index))
        request_id = f"{request.request_id}-{index}"
        yield replace(request, request_id=request_id, choice_index=index, sampling_params=params)


def choice_seed(seed: int, index: int) -> int:
    """Seed of choice `index`: the call's own for the first; then the first 8 bytes, big-endian, without the top bit, of
    SHA-256 over the text "seed:index" in decimal. Fixed for ever: a choice can be asked for again by itself."""
    if index == 0:
        return seed
    return int.from_bytes(sha256(f"{seed}:{index}".encode()).digest()[:8]) >> 1
