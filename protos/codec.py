"""Between the frozen types of protos/types.py and the wire messages of protos/worker.proto. Decides nothing."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from dataclasses import fields

from protos import worker_pb2 as pb
from protos.cost_model import CostModel, PullCost, prefill_line
from protos.step_moments import StepKind, StepMoments
from protos.types import (
    Abort,
    FinishReason,
    GenerateRequest,
    Handoff,
    HandoffRefused,
    LinkStats,
    Logprobs,
    Migrate,
    MigrationFailed,
    PeerRef,
    PullOutcome,
    PullStats,
    Retarget,
    Role,
    RouterCommand,
    SamplingParams,
    ServingMode,
    TokenOutput,
    TransferFailure,
    TransferKind,
    TransferStats,
    WorkerAccount,
    WorkerReport,
    WorkerStats,
)


def pack_token_ids(token_ids: Iterable[int]) -> bytes:
    """Little-endian int32, packed. (A repeated field costs 50 times as much for a long prompt.)"""
    packed = token_ids if isinstance(token_ids, array) and token_ids.typecode == "i" else array("i", token_ids)
    if sys.byteorder == "big":
        packed = packed[:]
        packed.byteswap()
    return packed.tobytes()


def unpack_token_ids(packed: bytes) -> array[int]:
    """ValueError where the bytes are not whole int32 values."""
    if len(packed) % 4:
        raise ValueError(f"packed token ids of {len(packed)} bytes are not whole int32 values")
    token_ids = array("i")
    token_ids.frombytes(packed)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids


def peer_to_proto(peer: PeerRef) -> pb.PeerRef:
    return pb.PeerRef(
        worker_id=peer.worker_id, incarnation=peer.incarnation, address=peer.address, role=peer.role.value
    )


def peer_from_proto(message: pb.PeerRef) -> PeerRef:
    return PeerRef(message.worker_id, message.incarnation, message.address, Role(message.role))


def _handoff_to_proto(handoff: Handoff | None) -> pb.HandoffRef | None:
    if handoff is None:
        return None
    return pb.HandoffRef(transfer_id=handoff.transfer_id, peer=peer_to_proto(handoff.peer), kind=handoff.kind.value)


def _handoff_from_proto(holder: pb.Submit | pb.Retarget, name: str) -> Handoff | None:
    return _handoff(getattr(holder, name)) if holder.HasField(name) else None


def _handoff(message: pb.HandoffRef) -> Handoff:
    return Handoff(message.transfer_id, peer_from_proto(message.peer), TransferKind(message.kind))


def _sampling_to_proto(sampling: SamplingParams) -> pb.WorkerSamplingParams:
    return pb.WorkerSamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        stop_token_ids=pack_token_ids(sampling.stop_token_ids),
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=sampling.min_tokens,
        num_logprobs=sampling.num_logprobs,
    )


def _sampling_from_proto(message: pb.WorkerSamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
        max_tokens=message.max_tokens,
        stop_token_ids=tuple(unpack_token_ids(message.stop_token_ids)),
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        min_tokens=message.min_tokens,
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
    )


def submit_to_proto(request: GenerateRequest) -> pb.Submit:
    return pb.Submit(
        request_id=request.request_id,
        client_request_id=request.client_request_id,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        attempt=request.attempt,
        token_ids=pack_token_ids(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        sampling_params=_sampling_to_proto(request.sampling_params),
        priority=request.priority,
        deadline_s=request.deadline_s,
        choice_index=request.choice_index,
        handoff_to=_handoff_to_proto(request.handoff_to),
        handoff_from=_handoff_to_proto(request.handoff_from),
        home_worker_ids=request.home_worker_ids,
        trace_context=request.trace_context,
        return_worker_id=request.return_worker_id,
    )


def submit_from_proto(message: pb.Submit) -> GenerateRequest:
    return GenerateRequest(
        request_id=message.request_id,
        client_request_id=message.client_request_id,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        attempt=message.attempt,
        token_ids=unpack_token_ids(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling_params=_sampling_from_proto(message.sampling_params),
        priority=message.priority,
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        choice_index=message.choice_index,
        handoff_to=_handoff_from_proto(message, "handoff_to"),
        handoff_from=_handoff_from_proto(message, "handoff_from"),
        home_worker_ids=tuple(message.home_worker_ids),
        trace_context=message.trace_context,
        return_worker_id=message.return_worker_id,
    )


def command_to_proto(command: RouterCommand) -> pb.RouterFrame:
    frame = pb.RouterFrame(
        heartbeat=command.heartbeat,
        submits=[submit_to_proto(request) for request in command.submits],
        aborts=[pb.Abort(request_id=abort.request_id, attempt=abort.attempt) for abort in command.aborts],
        retargets=[
            pb.Retarget(
                request_id=retarget.request_id,
                attempt=retarget.attempt,
                handoff_to=_handoff_to_proto(retarget.handoff_to),
            )
            for retarget in command.retargets
        ],
        migrates=[
            pb.Migrate(
                request_id=migrate.request_id,
                attempt=migrate.attempt,
                migrate_to=_handoff_to_proto(migrate.migrate_to),
            )
            for migrate in command.migrates
        ],
    )
    if command.members is not None:
        frame.membership.version = command.membership_version
        frame.membership.workers.extend(peer_to_proto(peer) for peer in command.members)
    return frame


def command_from_proto(frame: pb.RouterFrame) -> RouterCommand:
    has_members = frame.HasField("membership")
    return RouterCommand(
        heartbeat=frame.heartbeat,
        membership_version=frame.membership.version if has_members else 0,
        members=tuple(peer_from_proto(peer) for peer in frame.membership.workers) if has_members else None,
        submits=tuple(submit_from_proto(submit) for submit in frame.submits),
        aborts=tuple(Abort(abort.request_id, abort.attempt) for abort in frame.aborts),
        retargets=tuple(
            Retarget(retarget.request_id, retarget.attempt, _handoff_from_proto(retarget, "handoff_to"))
            for retarget in frame.retargets
        ),
        migrates=tuple(
            Migrate(migrate.request_id, migrate.attempt, _handoff(migrate.migrate_to)) for migrate in frame.migrates
        ),
    )


def _account_to_proto(account: WorkerAccount) -> pb.WorkerAccount:
    return pb.WorkerAccount(
        num_cached_tokens=account.num_cached_tokens,
        queued_s=account.queued_s,
        prefill_s=account.prefill_s,
        num_preemptions=account.num_preemptions,
        num_kv_bytes=account.num_kv_bytes,
        transfer_s=account.transfer_s,
        transfer_exposed_s=account.transfer_exposed_s,
        num_held_tokens=account.num_held_tokens,
        mode="" if account.mode is None else account.mode.value,
        mode_reason=account.mode_reason,
        num_pulled_tokens=account.num_pulled_tokens,
        pull_s=account.pull_s,
        num_failed_pulls=account.num_failed_pulls,
    )


def _account_from_proto(message: pb.WorkerAccount) -> WorkerAccount:
    return WorkerAccount(
        num_cached_tokens=message.num_cached_tokens,
        queued_s=message.queued_s,
        prefill_s=message.prefill_s,
        num_preemptions=message.num_preemptions,
        num_kv_bytes=message.num_kv_bytes,
        transfer_s=message.transfer_s,
        transfer_exposed_s=message.transfer_exposed_s,
        num_held_tokens=message.num_held_tokens,
        mode=ServingMode(message.mode) if message.mode else None,
        mode_reason=message.mode_reason,
        num_pulled_tokens=message.num_pulled_tokens,
        pull_s=message.pull_s,
        num_failed_pulls=message.num_failed_pulls,
    )


def _output_to_proto(output: TokenOutput) -> pb.TokenOutput:
    return pb.TokenOutput(
        request_id=output.request_id,
        attempt=output.attempt,
        index=output.index,
        token_ids=pack_token_ids(output.token_ids),
        finish_reason="" if output.finish_reason is None else output.finish_reason.value,
        account=None if output.account is None else _account_to_proto(output.account),
        error=output.error,
        logprobs=[
            pb.Logprobs(
                logprob=each.logprob,
                top_token_ids=pack_token_ids(each.top_token_ids),
                top_logprobs=each.top_logprobs,
            )
            for each in output.logprobs
        ],
    )


def _output_from_proto(message: pb.TokenOutput) -> TokenOutput:
    return TokenOutput(
        request_id=message.request_id,
        attempt=message.attempt,
        index=message.index,
        token_ids=tuple(unpack_token_ids(message.token_ids)),
        finish_reason=FinishReason(message.finish_reason) if message.finish_reason else None,
        account=_account_from_proto(message.account) if message.HasField("account") else None,
        error=message.error,
        logprobs=tuple(
            Logprobs(each.logprob, tuple(unpack_token_ids(each.top_token_ids)), tuple(each.top_logprobs))
            for each in message.logprobs
        ),
    )


_LINK_FIELDS = [field.name for field in fields(LinkStats)]


def _transfers_to_proto(transfers: TransferStats) -> pb.TransferStats:
    num_failed = {reason.value: num for reason, num in transfers.num_failed}
    return pb.TransferStats(
        num_completed=transfers.num_completed,
        num_bytes=transfers.num_bytes,
        num_failed=num_failed,
        block_nbytes=transfers.block_nbytes,
        links=[pb.LinkStats(**{name: getattr(link, name) for name in _LINK_FIELDS}) for link in transfers.links],
        num_refused_peers=transfers.num_refused_peers,
    )


def _transfers_from_proto(message: pb.TransferStats) -> TransferStats:
    num_failed = tuple((TransferFailure(reason), num) for reason, num in sorted(message.num_failed.items()))
    links = tuple(LinkStats(**{name: getattr(link, name) for name in _LINK_FIELDS}) for link in message.links)
    return TransferStats(
        message.num_completed, message.num_bytes, num_failed, message.block_nbytes, links, message.num_refused_peers
    )


def _prefill_cost_to_proto(cost: CostModel | None) -> pb.PrefillCost | None:
    if cost is None:
        return None
    return pb.PrefillCost(
        base_s=cost.prefill_base_s,
        s_per_token=cost.prefill_s_per_token,
        s_per_token_pair=cost.prefill_s_per_token_pair,
    )


def _prefill_cost_from_proto(message: pb.PrefillCost) -> CostModel:
    return prefill_line(message.base_s, message.s_per_token, message.s_per_token_pair)


def _pulls_to_proto(pulls: PullStats) -> pb.PullStats:
    num_by_outcome = {outcome.value: num for outcome, num in pulls.num_by_outcome}
    return pb.PullStats(num_by_outcome=num_by_outcome, num_tokens=pulls.num_tokens)


def _pulls_from_proto(message: pb.PullStats) -> PullStats:
    num_by_outcome = tuple((PullOutcome(each), num) for each, num in sorted(message.num_by_outcome.items()))
    return PullStats(num_by_outcome, message.num_tokens)


def _stats_to_proto(stats: WorkerStats) -> pb.WorkerStats:
    pull = stats.pull_cost
    return pb.WorkerStats(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_blocks=stats.num_blocks,
        num_free_blocks=stats.num_free_blocks,
        num_cached_blocks=stats.num_cached_blocks,
        num_held_blocks=stats.num_held_blocks,
        num_leased_blocks=stats.num_leased_blocks,
        ledger_balanced=stats.ledger_balanced,
        num_pending_prefill_tokens=stats.num_pending_prefill_tokens,
        prefill_s_per_token=stats.prefill_s_per_token,
        warm_links=stats.warm_links,
        num_steps=stats.num_steps,
        transfers=_transfers_to_proto(stats.transfers),
        num_host_blocks=stats.num_host_blocks,
        num_cached_host_blocks=stats.num_cached_host_blocks,
        num_host_loaded_tokens=stats.num_host_loaded_tokens,
        step_moments=[pb.StepMoments(kind=each.kind.value, sums=each.sums) for each in stats.step_moments],
        prefill_cost=_prefill_cost_to_proto(stats.prefill_cost),
        pull_cost=None if pull is None else pb.PullCost(s_per_token=pull.s_per_token, base_s=pull.base_s),
        pulls=_pulls_to_proto(stats.pulls),
        max_num_seqs=stats.max_num_seqs,
    )


def _stats_from_proto(message: pb.WorkerStats) -> WorkerStats:
    pull = message.pull_cost
    return WorkerStats(
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_blocks=message.num_blocks,
        num_free_blocks=message.num_free_blocks,
        num_cached_blocks=message.num_cached_blocks,
        num_held_blocks=message.num_held_blocks,
        num_leased_blocks=message.num_leased_blocks,
        ledger_balanced=message.ledger_balanced,
        num_pending_prefill_tokens=message.num_pending_prefill_tokens,
        prefill_s_per_token=message.prefill_s_per_token,
        warm_links=tuple(message.warm_links),
        num_steps=message.num_steps,
        transfers=_transfers_from_proto(message.transfers),
        num_host_blocks=message.num_host_blocks,
        num_cached_host_blocks=message.num_cached_host_blocks,
        num_host_loaded_tokens=message.num_host_loaded_tokens,
        step_moments=tuple(StepMoments(StepKind(each.kind), tuple(each.sums)) for each in message.step_moments),
        prefill_cost=_prefill_cost_from_proto(message.prefill_cost) if message.HasField("prefill_cost") else None,
        pull_cost=PullCost(pull.s_per_token, pull.base_s) if message.HasField("pull_cost") else None,
        pulls=_pulls_from_proto(message.pulls),
        max_num_seqs=message.max_num_seqs,
    )


def report_to_proto(report: WorkerReport) -> pb.WorkerFrame:
    return pb.WorkerFrame(
        heartbeat=report.heartbeat,
        outputs=[_output_to_proto(output) for output in report.outputs],
        refusals=[
            pb.HandoffRefused(request_id=refusal.request_id, attempt=refusal.attempt, reason=refusal.reason)
            for refusal in report.refusals
        ],
        stats=None if report.stats is None else _stats_to_proto(report.stats),
        is_leaving=report.is_leaving,
        failed_migrations=[
            pb.MigrationFailed(
                request_id=failed.request_id,
                attempt=failed.attempt,
                transfer_id=failed.transfer_id,
                reason=failed.reason,
            )
            for failed in report.failed_migrations
        ],
    )


def report_from_proto(frame: pb.WorkerFrame) -> WorkerReport:
    return WorkerReport(
        heartbeat=frame.heartbeat,
        outputs=tuple(_output_from_proto(output) for output in frame.outputs),
        refusals=tuple(
            HandoffRefused(refusal.request_id, refusal.attempt, refusal.reason) for refusal in frame.refusals
        ),
        stats=_stats_from_proto(frame.stats) if frame.HasField("stats") else None,
        is_leaving=frame.is_leaving,
        failed_migrations=tuple(
            MigrationFailed(failed.request_id, failed.attempt, failed.transfer_id, failed.reason)
            for failed in frame.failed_migrations
        ),
    )
