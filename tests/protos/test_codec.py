"""Everything a router and a worker say survives the wire unchanged."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import codec
from protos.cost_model import PullCost, prefill_line
from protos.step_moments import TERMS, StepKind, StepMoments
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

PEER = PeerRef("decode-1", "inc-7", "127.0.0.1:4000", Role.DECODE)


def a_request(**changes: object) -> GenerateRequest:
    fields: dict[str, object] = {
        "request_id": "r1",
        "client_request_id": "mine",
        "attempt": 2,
        "token_ids": array("i", [5, 6, 7, 2**31 - 1]),
        "num_prompt_tokens": 3,
        "sampling_params": SamplingParams(
            0.5, 1.0, 40, -3, 16, (2, 9), 0.25, 1.5, -0.5, 2.0, ((3, -100.0), (7, 0.5)), 4, 0
        ),
        "tenant": "acme",
        "cache_salt": b"\x00salt",
        "priority": -1,
        "deadline_s": 1.5,
        "choice_index": 1,
        "handoff_to": Handoff(bytes(range(16)), PEER),
        "handoff_from": None,
        "home_worker_ids": ("prefill-0", "prefill-1"),
        "trace_context": "00-ab-cd-01",
        "return_worker_id": "prefill-1",
    }
    return GenerateRequest(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "request_",
    [
        a_request(),
        a_request(deadline_s=None, handoff_to=None),
        a_request(handoff_from=Handoff(b"x" * 16, PEER), handoff_to=None),
    ],
)
def test_submit_survives_the_wire(request_: GenerateRequest) -> None:
    wire = codec.submit_to_proto(request_).SerializeToString()
    assert codec.submit_from_proto(type(codec.submit_to_proto(request_)).FromString(wire)) == request_


def test_command_survives_the_wire() -> None:
    command = RouterCommand(
        heartbeat=4,
        membership_version=9,
        members=(PEER,),
        submits=(a_request(),),
        aborts=(Abort("r2", 1),),
        retargets=(Retarget("r3", 1, None), Retarget("r4", 2, Handoff(b"y" * 16, PEER))),
        migrates=(Migrate("r5", 1, Handoff(b"z" * 16, PEER, TransferKind.MIGRATE)),),
    )
    assert codec.command_from_proto(codec.command_to_proto(command)) == command
    assert codec.command_from_proto(codec.command_to_proto(RouterCommand(heartbeat=1))).members is None
    assert codec.command_from_proto(codec.command_to_proto(RouterCommand(members=()))).members == ()


def test_report_survives_the_wire() -> None:
    account = WorkerAccount(3, 0.1, 0.2, 1, 4096, 0.3, 0.05, 64, ServingMode.RECOMPUTED, "checksum mismatch")
    num_failed = ((TransferFailure.CORRUPT, 3), (TransferFailure.REFUSED, 4))
    links = (LinkStats("decode-0", "gloo", 1 << 40, 0.25, 3, 4), LinkStats("decode-1", ""))
    transfers = TransferStats(1, 2, num_failed, 4096, links, 5)
    moments = tuple(StepMoments(kind, tuple(1.25 * i for i in range(len(TERMS)))) for kind in StepKind)
    report = WorkerReport(
        heartbeat=3,
        outputs=(
            TokenOutput("r1", 1, 7, (1, 2), logprobs=(Logprobs(-0.5), Logprobs(-1.5, (4, 2), (-0.25, -1.5)))),
            TokenOutput("r2", 1, 0, (), FinishReason.ERROR, account, "why"),
        ),
        refusals=(HandoffRefused("r1", 1, "no room"),),
        failed_migrations=(MigrationFailed("r5", 1, b"z" * 16, "no room"),),
        is_leaving=True,
        stats=WorkerStats(
            1,
            2,
            3,
            4,
            5,
            6,
            7,
            False,
            8,
            0.5,
            ("decode-0",),
            11,
            transfers,
            12,
            moments,
            prefill_cost=prefill_line(0.25, 0.5, 0.125),
            pull_cost=PullCost(0.5, 0.25),
            num_cached_host_blocks=13,
            num_host_loaded_tokens=14,
            pulls=PullStats(((PullOutcome.DONE, 3), (PullOutcome.LATE, 1)), 1024),
            max_num_seqs=15,
        ),
    )
    assert codec.report_from_proto(codec.report_to_proto(report)) == report


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_token_ids_survive_packing(token_ids: list[int]) -> None:
    assert codec.unpack_token_ids(codec.pack_token_ids(token_ids)) == array("i", token_ids)


def test_torn_token_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes"):
        codec.unpack_token_ids(b"12345")
