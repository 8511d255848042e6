"""The destination of a handoff: a WorkerCore that awaits the KV of a prompt."""

from __future__ import annotations

import pytest

from engine.events import (
    AbortTransfer,
    Event,
    ExpectTransfer,
    GrantTransfer,
    RefuseTransfer,
    SendBlocks,
    TransferArrived,
    TransferClosed,
    TransferLost,
    TransferOffered,
    TransferRefused,
)
from protos.types import Abort, Handoff, Retarget, ServingMode, TokenOutput
from tests.engine.fake_worker import (
    PEER,
    PROMPT,
    T2,
    TOKEN,
    FakeWorker,
    T,
    expected_output,
    generate,
    held_and_leased,
    next_token,
)


def arrived(transfer_id: bytes = T, first_index: int = 1, token_ids: tuple[int, ...] = (TOKEN,)) -> TransferArrived:
    return TransferArrived(transfer_id, first_index, token_ids, num_bytes=12, transfer_s=0.5, exposed_s=0.25)


def destination(prompt: list[int] = PROMPT, **changes: int | bool) -> FakeWorker:
    worker = FakeWorker(**changes)
    effects = worker.submit(generate("r", prompt, source=T))
    assert effects == [ExpectTransfer(Handoff(T, PEER), "r", 1)]
    assert worker.begin_step() == [] and worker.output is None
    assert held_and_leased(worker) == (0, 0)
    return worker


def grant(worker: FakeWorker, prompt: list[int] = PROMPT) -> GrantTransfer:
    num_blocks = worker.config.num_blocks_for(len(prompt))
    [granted] = worker.on(TransferOffered(T, "r", 1, num_blocks))
    assert isinstance(granted, GrantTransfer)
    return granted


def write(worker: FakeWorker, granted: GrantTransfer, prompt: list[int] = PROMPT) -> None:
    """As the transfer would: the KV of a worker that computed the prompt."""
    other = FakeWorker()
    other.submit(generate("r", prompt, to=T))
    effects = other.step()
    blocks = [block for effect in effects if isinstance(effect, SendBlocks) for block in effect.block_ids]
    for theirs, ours in zip(blocks[granted.num_held_blocks :], granted.block_ids, strict=True):
        worker.kv[ours] = list(other.kv[theirs])


def test_the_destination_grants_and_decodes_from_what_arrived() -> None:
    worker = destination()
    granted = grant(worker)
    assert (granted.num_held_blocks, len(granted.block_ids)) == (0, 3)
    assert held_and_leased(worker) == (0, 3)
    write(worker, granted)
    assert worker.on(arrived()) == []
    assert held_and_leased(worker) == (3, 0)
    worker.run()
    assert worker.tokens_of("r") == expected_output(PROMPT, 4)[1:]  # token 0 was sent by the source
    assert all(output.num_batched_tokens == 1 for output in worker.outputs)
    account = worker.last_output("r").account
    assert account is not None and account.mode is ServingMode.DISAGGREGATED
    assert (account.num_kv_bytes, account.transfer_s, account.transfer_exposed_s) == (12, 0.5, 0.25)
    assert (account.num_cached_tokens, account.num_held_tokens) == (0, 0)
    assert held_and_leased(worker) == (0, 0)
    assert worker.core.ledger().cached == 3  # 13 tokens computed: three full blocks


def test_the_destination_needs_only_what_it_does_not_hold() -> None:
    prompt = list(range(8))
    worker = FakeWorker()
    worker.submit(generate("before", prompt, max_tokens=1))
    worker.run()
    worker.submit(generate("r", prompt, source=T))
    granted = grant(worker, prompt)
    assert (granted.num_held_blocks, granted.block_ids) == (2, ())
    assert held_and_leased(worker) == (0, 2)
    worker.on(arrived(token_ids=(next_token(prompt),)))
    worker.run()
    assert worker.tokens_of("r") == expected_output(prompt, 4)[1:]
    account = worker.last_output("r").account
    assert account is not None and account.num_held_tokens == 8


def test_offers_that_do_not_fit_are_refused_with_the_numbers() -> None:
    worker = destination()

    def reason(event: TransferOffered) -> str:
        [refusal] = worker.on(event)
        assert isinstance(refusal, RefuseTransfer) and refusal.transfer_id == event.transfer_id
        return refusal.reason

    assert reason(TransferOffered(T, "r", 2, 3)) == "request r attempt 2 does not await this transfer here"
    assert reason(TransferOffered(T2, "r", 1, 3)) == "request r attempt 1 does not await this transfer here"
    assert reason(TransferOffered(T2, "x", 1, 3)) == "request x attempt 1 does not await this transfer here"
    assert reason(TransferOffered(T, "r", 1, 4)) == "4 blocks offered, 10 tokens have 3"
    assert held_and_leased(worker) == (0, 0)
    grant(worker)
    assert worker.on(TransferOffered(T, "r", 1, 3)) == []  # repeated


def test_a_grant_leaves_a_block_for_each_running_request_and_room_for_the_first_waiting_one() -> None:
    worker = FakeWorker(num_blocks=4, max_num_seqs=1)
    worker.submit(generate("running", [1, 2], max_tokens=9))
    worker.step()
    worker.submit(generate("r", PROMPT, source=T))
    [refusal] = worker.on(TransferOffered(T, "r", 1, 3))
    assert refusal == RefuseTransfer(T, "3 blocks needed, 3 of 4 available, 1 of them spoken for")
    worker.submit(generate("waiting", range(12)))
    [refusal] = worker.on(TransferOffered(T, "r", 1, 3))
    assert refusal == RefuseTransfer(T, "3 blocks needed, 3 of 4 available, 4 of them spoken for")


def test_arrived_requests_wait_with_their_blocks_where_max_num_seqs_run() -> None:
    worker = FakeWorker(max_num_seqs=1)
    worker.submit(generate("running", [1, 2], max_tokens=4))
    worker.step()
    worker.submit(generate("waiting", [3, 4], max_tokens=4))
    worker.submit(generate("r", PROMPT, source=T))
    write(worker, grant(worker))
    worker.on(arrived())
    assert worker.core.stats().num_waiting == 2
    worker.run()
    order = [effect.request_id for effect in worker.effects if isinstance(effect, TokenOutput) and effect.account]
    assert order == ["running", "r", "waiting"]


@pytest.mark.parametrize("granted_first", [False, True])
def test_a_lost_transfer_is_recomputed(granted_first: bool) -> None:
    worker = destination()
    if granted_first:
        grant(worker)
    assert worker.on(TransferLost(T, "checksum of block 1")) == []
    assert held_and_leased(worker) == (0, 0)
    worker.run()
    assert worker.tokens_of("r") == expected_output(PROMPT, 4)
    account = worker.last_output("r").account
    assert account is not None
    assert (account.mode, account.mode_reason) == (ServingMode.RECOMPUTED, "checksum of block 1")
    assert account.prefill_s == 1.0


@pytest.mark.parametrize("event", [arrived(first_index=2), arrived(first_index=0, token_ids=())])
def test_a_commit_that_does_not_fit_the_request_is_recomputed(event: TransferArrived) -> None:
    worker = destination()
    grant(worker)
    worker.on(event)
    worker.run()
    assert worker.tokens_of("r") == expected_output(PROMPT, 4)
    account = worker.last_output("r").account
    assert account is not None and account.mode is ServingMode.RECOMPUTED
    assert f"goes on at index {event.first_index}" in account.mode_reason


@pytest.mark.parametrize("granted_first", [False, True])
@pytest.mark.parametrize("answer", [TransferLost(T, "aborted"), arrived()])
def test_abort_while_the_kv_is_awaited(granted_first: bool, answer: Event) -> None:
    worker = destination()
    if granted_first:
        grant(worker)
    assert worker.on(Abort("r", 1)) == [AbortTransfer(T, "aborted")]
    assert held_and_leased(worker) == (0, 3 if granted_first else 0)  # still written to
    assert worker.on(answer) == []
    assert held_and_leased(worker) == (0, 0)
    assert worker.run() == []


def test_late_and_repeated_events_change_nothing() -> None:
    worker = destination()
    assert worker.on(arrived()) == []  # nothing was granted
    write(worker, grant(worker))
    worker.on(arrived())
    late: list[Event] = [
        arrived(),
        TransferLost(T, "late"),
        TransferOffered(T, "r", 1, 3),
        TransferClosed(T),
        TransferRefused(T, "late"),
        Retarget("r", 1, Handoff(T2, PEER)),
    ]
    for event in late:
        assert worker.on(event) == [], event
        assert held_and_leased(worker) == (3, 0)
    worker.run()
    assert worker.tokens_of("r") == expected_output(PROMPT, 4)[1:]
