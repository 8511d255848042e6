"""Short-hands for the values that router tests are made of."""

from __future__ import annotations

from array import array

from protos.block_hash import chain_hashes, chain_root
from protos.types import (
    FinishReason,
    GenerateRequest,
    PeerRef,
    Role,
    SamplingParams,
    TokenOutput,
    WorkerAccount,
    WorkerReport,
    WorkerStats,
)
from router.config import RouterConfig
from router.events import Arrived, Effect, Reported, Send, WorkerUp
from router.policies.config import PolicyConfig
from router.router import Router

BLOCK = 4
HASH_KEY = b"k" * 32
# The simplest placement: what is tested with it is how the router keeps requests, not where it puts them.
CONFIG = RouterConfig(
    hash_block_size=BLOCK,
    block_size=BLOCK,
    policy=PolicyConfig("dual_map"),
    queue_order="first_come",
    dispatch_tokens=0,
)


def links_of(token_ids: array[int]) -> tuple[bytes, ...]:
    return tuple(chain_hashes(token_ids, BLOCK, chain_root(HASH_KEY, "model"), HASH_KEY))


def arrived(request_id: str, prompt: list[int], max_tokens: int = 8, client_id: str = "") -> Arrived:
    token_ids = array("i", prompt)
    request = GenerateRequest(
        request_id=request_id,
        client_request_id=client_id or f"client-{request_id}",
        attempt=0,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling_params=SamplingParams(0.0, 1.0, 0, 1, max_tokens),
    )
    return Arrived(request, links_of(token_ids))


def peer(worker_id: str, incarnation: str = "1") -> PeerRef:
    role = Role.PREFILL if worker_id.startswith("p") else Role.DECODE
    return PeerRef(worker_id, incarnation, f"{worker_id}:1", role)


def stats(**fields: object) -> WorkerStats:
    return WorkerStats(**{"num_blocks": 100, "num_free_blocks": 100, **fields})  # type: ignore[arg-type]


def reported(worker_id: str, *outputs: TokenOutput, incarnation: str = "1", **fields: object) -> Reported:
    return Reported(worker_id, incarnation, WorkerReport(outputs=outputs, **fields))  # type: ignore[arg-type]


def output(
    request_id: str,
    index: int,
    *token_ids: int,
    attempt: int = 1,
    finish: FinishReason | None = None,
    account: WorkerAccount | None = None,
    error: str = "",
) -> TokenOutput:
    return TokenOutput(request_id, attempt, index, token_ids, finish, account, error)


class Transfers:
    """Transfer ids that count up."""

    def __init__(self) -> None:
        self.num_made = 0

    def __call__(self) -> bytes:
        self.num_made += 1
        return self.num_made.to_bytes(16, "little")


def make_router(*worker_ids: str, config: RouterConfig = CONFIG) -> Router:
    router = Router(config, Transfers())
    for worker_id in worker_ids:
        router.on(WorkerUp(peer(worker_id)), 0.0)
        router.on(reported(worker_id, stats=stats()), 0.0)
    return router


def sends(effects: list[Effect]) -> dict[str, Send]:
    """By worker, where each has one at most."""
    found = [effect for effect in effects if isinstance(effect, Send)]
    by_worker = {send.worker_id: send for send in found}
    assert len(by_worker) == len(found), found
    return by_worker
