"""Between the public wire messages and the router's plain values. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protos import inference_pb2 as pb
from protos.codec import pack_token_ids
from protos.types import FinishReason, ServingMode
from router.account import RequestAccount
from router.cluster_view import WorkerView
from router.status import KnownWorker
from router.validation import PublicRequest

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
SERVING_MODES = {
    None: pb.SERVING_MODE_UNSPECIFIED,
    ServingMode.DISAGGREGATED: pb.SERVING_MODE_DISAGGREGATED,
    ServingMode.LOCAL: pb.SERVING_MODE_LOCAL,
    ServingMode.RECOMPUTED: pb.SERVING_MODE_RECOMPUTED,
}


@dataclass(frozen=True, slots=True)
class Progress:
    """Output tokens [first_index, first_index + len(token_ids)) with their text, and the counts so far."""

    first_index: int
    token_ids: Sequence[int]
    text: str
    num_prompt_tokens: int
    num_cached_tokens: int

    @property
    def num_output_tokens(self) -> int:
        return self.first_index + len(self.token_ids)


def request_from_proto(message: pb.GenerateRequest) -> PublicRequest:
    sampling, given = message.sampling_params, message.sampling_params.HasField
    kind = message.WhichOneof("input")
    return PublicRequest(
        request_id=message.request_id,
        text=message.text if kind == "text" else None,
        input_ids=message.tokenized.input_ids if kind == "tokenized" else None,
        temperature=sampling.temperature if given("temperature") else None,
        top_p=sampling.top_p if given("top_p") else None,
        top_k=sampling.top_k if given("top_k") else None,
        seed=sampling.seed if given("seed") else None,
        max_tokens=sampling.max_tokens if given("max_tokens") else None,
        stop_token_ids=tuple(sampling.stop_token_ids),
        stop=tuple(sampling.stop),
        ignore_eos=sampling.ignore_eos,
    )


def chunk_response(client_request_id: str, progress: Progress) -> pb.GenerateResponse:
    chunk = pb.GenerateStreamChunk(
        token_ids=pack_token_ids(progress.token_ids),
        text=progress.text,
        first_index=progress.first_index,
        prompt_tokens=progress.num_prompt_tokens,
        completion_tokens=progress.num_output_tokens,
        cached_tokens=progress.num_cached_tokens,
    )
    return pb.GenerateResponse(request_id=client_request_id, chunk=chunk)


def complete_response(
    client_request_id: str,
    progress: Progress,
    finish_reason: FinishReason,
    matched: str | int | None,
    account: RequestAccount,
) -> pb.GenerateResponse:
    """`matched`: the stop string or the stop token that ended the output."""
    complete = pb.GenerateComplete(
        token_ids=pack_token_ids(progress.token_ids),
        text=progress.text,
        first_index=progress.first_index,
        prompt_tokens=progress.num_prompt_tokens,
        completion_tokens=progress.num_output_tokens,
        cached_tokens=progress.num_cached_tokens,
        finish_reason=FINISH_REASONS[finish_reason],
        placement=_placement(account),
    )
    if isinstance(matched, str):
        complete.matched_stop_string = matched
    elif matched is not None:
        complete.matched_token_id = matched
    return pb.GenerateResponse(request_id=client_request_id, complete=complete)


def worker_load(worker: KnownWorker, view: WorkerView | None) -> pb.WorkerLoad:
    """`view` is None for a worker that is down: then there are no figures of its present."""
    load = pb.WorkerLoad(
        worker_id=worker.ref.worker_id,
        role=worker.ref.role.value,
        incarnation=worker.ref.incarnation,
        address=worker.ref.address,
        state="up" if worker.is_up else "down",
        pid=worker.pid,
    )
    if view is not None:
        stats = view.stats
        load.num_running = stats.num_running
        load.num_waiting = stats.num_waiting
        load.num_blocks = stats.num_blocks
        load.num_free_blocks = stats.num_free_blocks
        load.num_cached_blocks = stats.num_cached_blocks
        load.num_held_blocks = stats.num_held_blocks
        load.num_leased_blocks = stats.num_leased_blocks
        load.ledger_balanced = stats.ledger_balanced
        load.num_pending_prefill_tokens = stats.num_pending_prefill_tokens
        load.prefill_s_per_token = stats.prefill_s_per_token
        load.warm_links.extend(stats.warm_links)
    return load


def _placement(account: RequestAccount) -> pb.Placement:
    return pb.Placement(
        prefill_worker=account.prefill_worker,
        prefill_reason=account.prefill_reason,
        decode_worker=account.decode_worker,
        decode_reason=account.decode_reason,
        mode=SERVING_MODES[account.mode],
        mode_reason=account.mode_reason,
        attempts=account.num_attempts,
        kv_bytes_moved=account.num_kv_bytes,
        transfer_s=account.transfer_s,
        transfer_exposed_s=account.transfer_exposed_s,
        predicted_cached_tokens=account.num_predicted_cached_tokens,
        decode_held_tokens=account.num_held_tokens,
        preemptions=account.num_preemptions,
        ttft_s=account.ttft_s,
        tpot_s=account.tpot_s,
        e2e_s=account.e2e_s,
    )
