"""What the simulator serves: requests whose prompts are named by block ids. Knows nothing of where they come from
(traces.py, generator.py) and nothing of workers."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

TRACE_BLOCK_TOKENS = 512  # of Mooncake's format
MAX_TOKEN_ID = 1 << 30  # ids of prompts lie below; what is generated takes its ids from above


@dataclass(frozen=True, slots=True)
class SimRequest:
    """Invariant: hash_ids cover the prompt, one per block_tokens tokens, the last one perhaps of fewer. Equal ids at
    equal places are equal tokens."""

    at_s: float  # since the first request
    num_output_tokens: int
    hash_ids: tuple[int, ...]
    num_prompt_tokens: int
    block_tokens: int = TRACE_BLOCK_TOKENS
    session: str = ""  # turns of one conversation; empty where that is not known

    def __post_init__(self) -> None:
        if not (math.isfinite(self.at_s) and self.at_s >= 0):
            raise ValueError(f"at_s must be a time from 0 on, not {self.at_s}")
        for name in ("num_prompt_tokens", "num_output_tokens", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if len(self.hash_ids) != -(-self.num_prompt_tokens // self.block_tokens):
            raise ValueError(f"{len(self.hash_ids)} hash_ids for {self.num_prompt_tokens} tokens")


def prompt_token_ids(request: SimRequest) -> array[int]:
    """A block is its id, over and over: cheap to make, and equal exactly as far as the ids are. ValueError for an id
    outside [0, MAX_TOKEN_ID): see transforms.renumbered."""
    if not all(0 <= hash_id < MAX_TOKEN_ID for hash_id in request.hash_ids):
        bad = next(hash_id for hash_id in request.hash_ids if not 0 <= hash_id < MAX_TOKEN_ID)
        raise ValueError(f"hash id {bad} must lie in [0, {MAX_TOKEN_ID})")
    token_ids = array("i")
    for hash_id in request.hash_ids:
        token_ids.extend(array("i", (hash_id,)) * request.block_tokens)
    del token_ids[request.num_prompt_tokens :]
    return token_ids
