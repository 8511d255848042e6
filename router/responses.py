"""Between the public wire messages and the router's plain values. Decides nothing."""

from __future__ import annotations

from array import array
from typing import Any

from protos import inference_pb2 as pb
from protos.codec import pack_token_ids, unpack_token_ids
from protos.types import FinishReason, Logprobs, ServingMode
from router.account import RequestAccount
from router.cluster_view import WorkerView
from router.config import RouterConfig
from router.explain import Explanation, Option
from router.parts import End, Part
from router.published_view import KnownWorker
from router.validation import ChatMessage, InvalidArgument, PublicRequest

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


def request_from_proto(message: pb.GenerateRequest) -> PublicRequest:
    sampling, given = message.sampling_params, message.sampling_params.HasField
    kind = message.WhichOneof("input")
    return PublicRequest(
        request_id=message.request_id,
        text=message.text if kind == "text" else None,
        input_ids=message.tokenized.input_ids if kind == "tokenized" else None,
        messages=tuple(ChatMessage(one.role, one.content) for one in message.chat.messages) if kind == "chat" else None,
        temperature=sampling.temperature if given("temperature") else None,
        top_p=sampling.top_p if given("top_p") else None,
        top_k=sampling.top_k if given("top_k") else None,
        seed=sampling.seed if given("seed") else None,
        max_tokens=sampling.max_tokens if given("max_tokens") else None,
        stop_token_ids=tuple(sampling.stop_token_ids),
        stop=tuple(sampling.stop),
        ignore_eos=sampling.ignore_eos,
        min_p=sampling.min_p if given("min_p") else None,
        repetition_penalty=sampling.repetition_penalty if given("repetition_penalty") else None,
        presence_penalty=sampling.presence_penalty if given("presence_penalty") else None,
        frequency_penalty=sampling.frequency_penalty if given("frequency_penalty") else None,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        min_tokens=sampling.min_tokens,
        include_stop=sampling.include_stop,
        n=sampling.n if given("n") else 1,
        logprobs=sampling.logprobs if given("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if given("prompt_logprobs") else None,
        priority=message.priority,
        output_token_ids=_output_token_ids(message.output_token_ids),
    )


def _output_token_ids(packed: bytes) -> array[int]:
    try:
        return unpack_token_ids(packed)
    except ValueError:
        raise InvalidArgument(
            "output_token_ids", len(packed), "must be packed int32: whole groups of 4 bytes"
        ) from None


def generate_response(part: Part) -> pb.GenerateResponse:
    response = pb.GenerateResponse(request_id=part.request.client_request_id)
    if part.end is None:
        response.chunk.CopyFrom(pb.GenerateStreamChunk(**_output(part)))
    else:
        response.complete.CopyFrom(_complete(part, part.end))
    return response


def _output(part: Part) -> dict[str, Any]:
    """The fields that chunks and the last word share."""
    return {
        "token_ids": pack_token_ids(part.token_ids),
        "text": part.text,
        "first_index": part.first_index,
        "prompt_tokens": part.num_prompt_tokens,
        "completion_tokens": part.num_output_tokens,
        "cached_tokens": part.num_cached_tokens,
        "choice_index": part.request.choice_index,
        "logprobs": [_token_logprob(one) for one in part.logprobs],
    }


def _complete(part: Part, end: End) -> pb.GenerateComplete:
    complete = pb.GenerateComplete(
        **_output(part),
        finish_reason=FINISH_REASONS[end.finish_reason],
        placement=_placement(end.account),
        seed=part.request.sampling_params.seed,
    )
    if isinstance(end.matched, str):
        complete.matched_stop_string = end.matched
    elif end.matched is not None:
        complete.matched_token_id = end.matched
    return complete


def _token_logprob(logprobs: Logprobs) -> pb.TokenLogprob:
    top = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
    return pb.TokenLogprob(
        logprob=logprobs.logprob,
        top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in top],
    )


def worker_load(worker: KnownWorker, view: WorkerView | None) -> pb.WorkerLoad:
    """`view` is None for a worker that is down: then there are no figures of its present."""
    load = pb.WorkerLoad(
        worker_id=worker.ref.worker_id,
        role=worker.ref.role.value,
        incarnation=worker.ref.incarnation,
        address=worker.ref.address,
        state=("draining" if worker.is_draining else "up") if worker.is_up else "down",
        pid=worker.pid,
    )
    if view is not None:
        stats = view.stats
        load.num_running = stats.num_running
        load.num_waiting = stats.num_waiting
        load.num_queued = len(view.queue)
        load.num_blocks = stats.num_blocks
        load.num_free_blocks = stats.num_free_blocks
        load.num_cached_blocks = stats.num_cached_blocks
        load.num_held_blocks = stats.num_held_blocks
        load.num_leased_blocks = stats.num_leased_blocks
        load.ledger_balanced = stats.ledger_balanced
        load.num_pending_prefill_tokens = stats.num_pending_prefill_tokens
        load.prefill_s_per_token = stats.prefill_s_per_token
        load.warm_links.extend(stats.warm_links)
        connected = (link for link in stats.transfers.links if link.transport)
        load.links.extend(pb.WarmLink(worker_id=link.worker_id, transport=link.transport) for link in connected)
    return load


def server_info_response(
    config: RouterConfig, max_model_len: int, version: str, uptime_s: float
) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(
        version=version,
        mode=config.mode,
        uptime_s=uptime_s,
        max_model_len=max_model_len,
        max_in_flight=config.max_in_flight,
        max_message_bytes=config.max_message_bytes,
        max_stop_strings=config.max_stop_strings,
        max_stop_len=config.max_stop_len,
        max_n=config.max_n,
        max_logprobs=config.max_logprobs,
        ttft_slo_s=config.ttft_slo_s,
    )


def explain_response(explanation: Explanation, num_prompt_tokens: int, view_version: int) -> pb.ExplainRouteResponse:
    def candidate(option: Option) -> pb.RouteCandidate:
        one = option.candidate
        return pb.RouteCandidate(
            worker_id=one.worker_id,
            num_cached_tokens=one.num_cached_tokens,
            num_pending_tokens=one.num_pending_tokens,
            ttft_estimate_s=option.ttft_s,
            num_free_blocks=max(0, one.num_free_blocks),
            is_home=one.worker_id in explanation.home_worker_ids,
            num_pulled_tokens=option.num_pulled_tokens,
            num_queued=option.num_queued,
        )

    return pb.ExplainRouteResponse(
        prompt_tokens=num_prompt_tokens,
        prefill_candidates=[candidate(one) for one in explanation.prefill_candidates],
        prefill_worker=explanation.prefill_worker,
        prefill_reason=explanation.prefill_reason,
        decode_candidates=[candidate(one) for one in explanation.decode_candidates],
        decode_worker=explanation.decode_worker,
        decode_reason=explanation.decode_reason,
        view_version=view_version,
    )


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
        predicted_pulled_tokens=account.num_predicted_pulled_tokens,
        pulled_tokens=account.num_pulled_tokens,
        failed_pulls=account.num_failed_pulls,
        moves=account.num_moves,
        migrations=account.num_migrations,
        migration_pause_s=account.migration_pause_s,
        queued_s=account.queued_s,
        preemptions=account.num_preemptions,
        ttft_s=account.ttft_s,
        tpot_s=account.tpot_s,
        e2e_s=account.e2e_s,
    )
