"""Trace requests as the front door would pass them on: token ids, the chain of their hashes, and what an infinite cache
would have had. Keeps nothing of a request but its links in that cache."""

from __future__ import annotations

from protos.block_hash import chain_hashes, chain_root
from protos.types import GenerateRequest, SamplingParams
from router.events import Arrived
from simulator.requests import SimRequest, prompt_token_ids
from simulator.result import RequestRecord
from simulator.setup import Setup

HASH_KEY = bytes(32)
MODEL = "simulated"


class FrontDoor:
    """Invariant: `_seen` has the links of all prompts so far, each with all links before it."""

    def __init__(self, setup: Setup) -> None:
        self._is_prefill_only = setup.is_prefill_only
        self._block_size = setup.router.hash_block_size
        self._root = chain_root(HASH_KEY, MODEL)
        self._seen: set[bytes] = set()

    def open(self, request: SimRequest, number: int) -> tuple[Arrived, RequestRecord]:
        token_ids = prompt_token_ids(request)
        links = tuple(chain_hashes(token_ids, self._block_size, self._root, HASH_KEY))
        num_ideal_cached = self._num_ideal_cached(links, len(token_ids))
        self._seen.update(links)
        generate = GenerateRequest(
            request_id=str(number),
            client_request_id=str(number),
            attempt=0,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling_params=SamplingParams(
                temperature=0.0,
                top_p=1.0,
                top_k=0,
                seed=0,
                max_tokens=1 if self._is_prefill_only else request.num_output_tokens,
            ),
        )
        return Arrived(generate, links), RequestRecord(number, request.at_s, len(token_ids), num_ideal_cached)

    def _num_ideal_cached(self, links: tuple[bytes, ...], num_tokens: int) -> int:
        """The last token is always computed."""
        num_usable = (num_tokens - 1) // self._block_size
        num_cached = next((i for i, link in enumerate(links[:num_usable]) if link not in self._seen), num_usable)
        return num_cached * self._block_size
