from __future__ import annotations

import pytest

from engine.events import (
    AbortTransfer,
    CommitTransfer,
    Effect,
    Event,
    ExpectTransfer,
    GrantTransfer,
    OpenTransfer,
    RefuseTransfer,
    SendBlocks,
    TransferArrived,
    TransferClosed,
    TransferLost,
    TransferOffered,
    TransferRefused,
)
from engine.scheduler_output import SchedulerOutput
from protos.types import Abort, FinishReason, Handoff, HandoffRefused, Retarget, ServingMode, TokenOutput
from tests.engine.fake_worker import PEER, FakeWorker, expected_output, generate, next_token

T, T2 = b"transfer-one", b"transfer-two"
PROMPT = list(range(10))  # two full blocks and a tail
TOKEN = next_token(PROMPT)


def held_and_leased(worker: FakeWorker) -> tuple[int, int]:
    ledger = worker.core.ledger()
    assert ledger.balanced
    return ledger.held, ledger.leased


def kinds(effects: list[Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def arrived(transfer_id: bytes = T, first_index: int = 1, token_ids: tuple[int, ...] = (TOKEN,)) -> TransferArrived:
    return TransferArrived(transfer_id, first_index, token_ids, num_bytes=12, transfer_s=0.5, exposed_s=0.25)


# --- one worker -------------------------------------------------------------------------------------------------------


def test_a_local_request_streams_its_tokens_and_accounts_with_the_last() -> None:
    worker = FakeWorker()
    assert worker.submit(generate("r", PROMPT, max_tokens=3)) == []
    effects = worker.run()
    assert worker.tokens_of("r") == expected_output(PROMPT, 3)
    outputs = [effect for effect in effects if isinstance(effect, TokenOutput)]
    assert [(output.index, output.account is None) for output in outputs] == [(0, True), (1, True), (2, False)]
    account = outputs[-1].account
    assert account is not None and outputs[-1].finish_reason is FinishReason.LENGTH
    assert (account.mode, account.queued_s, account.prefill_s) == (ServingMode.LOCAL, 1.0, 1.0)
    assert held_and_leased(worker) == (0, 0)


def test_the_account_names_the_prefix_hits_of_the_first_schedule() -> None:
    worker = FakeWorker()
    worker.submit(generate("first", PROMPT, max_tokens=1))
    worker.run()
    worker.submit(generate("second", [*PROMPT, 1, 2], max_tokens=1))
    worker.run()
    account = worker.last_output("second").account
    assert account is not None and account.num_cached_tokens == 8


def test_output_committed_by_an_earlier_attempt_is_gone_on_from() -> None:
    worker = FakeWorker()
    before = expected_output(PROMPT, 2)
    worker.submit(generate("r", [*PROMPT, *before], num_committed=2, max_tokens=4, attempt=2))
    worker.run()
    assert worker.last_output("r").index == 3
    assert worker.tokens_of("r") == expected_output(PROMPT, 4)[2:]


def test_what_can_never_finish_gets_an_error_and_leaves_nothing() -> None:
    worker = FakeWorker(num_blocks=2)
    [output] = worker.submit(generate("r", PROMPT, max_tokens=4))
    assert isinstance(output, TokenOutput) and output.finish_reason is FinishReason.ERROR
    assert output.error == "14 tokens of prompt and output need 4 KV blocks, this worker has 2"
    assert worker.begin_step() == [] and worker.output is None


def test_abort_between_schedule_and_update_emits_nothing_and_keeps_the_blocks_until_then() -> None:
    worker = FakeWorker()
    worker.submit(generate("r", PROMPT))
    worker.begin_step()
    assert worker.on(Abort("r", 1)) == []
    assert held_and_leased(worker) == (3, 0)
    assert worker.end_step() == []
    assert held_and_leased(worker) == (0, 0)


def test_aborts_of_unknown_requests_and_other_attempts_change_nothing() -> None:
    worker = FakeWorker()
    worker.submit(generate("r", PROMPT, attempt=2))
    assert worker.on(Abort("r", 1)) == worker.on(Abort("other", 1)) == []
    worker.run()
    assert len(worker.tokens_of("r")) == 4


def test_a_newer_attempt_replaces_the_older_even_during_its_step() -> None:
    worker = FakeWorker()
    worker.submit(generate("r", PROMPT, attempt=1))
    worker.begin_step()
    worker.submit(generate("r", PROMPT, attempt=3))
    worker.submit(generate("r", [5], attempt=2))
    worker.submit(generate("r", [5], attempt=3))
    assert worker.end_step() == []
    worker.run()
    assert {effect.attempt for effect in worker.effects if isinstance(effect, TokenOutput)} == {3}
    assert worker.tokens_of("r") == expected_output(PROMPT, 4)


def test_a_hundred_requests_share_eight_blocks_and_all_finish() -> None:
    worker = FakeWorker(num_blocks=8, max_num_seqs=16)
    for number in range(100):
        prompt = [number % 3, *range(number % 17)]
        worker.submit(generate(f"r{number}", prompt, max_tokens=1 + number % 15, priority=number % 2))
    worker.run(max_steps=3000)
    assert any(output.preempted_request_ids for output in worker.outputs)
    assert all(len(output.preempted_request_ids) <= 1 for output in worker.outputs)
    for number in range(100):
        prompt = [number % 3, *range(number % 17)]
        assert worker.tokens_of(f"r{number}") == expected_output(prompt, 1 + number % 15)
    assert held_and_leased(worker) == (0, 0)


def test_stats_count_what_waits_and_what_is_still_to_prefill() -> None:
    worker = FakeWorker(max_num_seqs=1)
    worker.submit(generate("running", range(20)))
    worker.submit(generate("waiting", range(5)))
    worker.submit(generate("remote", range(7), source=T))
    worker.step()
    stats = worker.core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pending_prefill_tokens) == (1, 2, 4 + 5)
    assert (stats.num_blocks, stats.num_held_blocks, stats.num_free_blocks, stats.num_steps) == (8, 4, 4, 1)
    assert stats.ledger_balanced


def test_prefill_cost_is_measured_from_steps_with_enough_prefill() -> None:
    worker = FakeWorker(max_num_batched_tokens=20)
    worker.submit(generate("r", range(25), max_tokens=2))
    costs = []
    for duration_s in (2.0, 50.0, 50.0):  # 20 tokens, 5 tokens, a decode
        worker.begin_step()
        assert isinstance(worker.output, SchedulerOutput)
        worker.core.note_step(worker.output, duration_s)
        costs.append(worker.core.stats().prefill_s_per_token)
        worker.end_step()
    assert costs == pytest.approx([0.1, 0.1, 0.1])
    worker.submit(generate("s", range(100, 120), max_tokens=2))
    worker.begin_step()
    assert worker.output is not None
    worker.core.note_step(worker.output, 4.0)
    assert worker.core.stats().prefill_s_per_token == pytest.approx(0.1 + 0.2 * 0.1)


# --- the source of a handoff ------------------------------------------------------------------------------------------


def source(prompt: list[int] = PROMPT, **changes: int | bool) -> FakeWorker:
    worker = FakeWorker(**changes)  # type: ignore[arg-type]
    worker.submit(generate("r", prompt, to=T))
    return worker


def test_the_source_opens_before_the_step_then_sends_and_commits_with_the_first_token() -> None:
    worker = source()
    assert worker.begin_step() == [OpenTransfer(Handoff(T, PEER), "r", 1, num_blocks=3)]
    output, sent, commit = worker.end_step()
    assert isinstance(output, TokenOutput) and (output.index, output.token_ids) == (0, (TOKEN,))
    assert output.finish_reason is None and output.account is not None and output.account.mode is None
    assert isinstance(sent, SendBlocks) and (sent.first_block, len(sent.block_ids)) == (0, 3)
    assert commit == CommitTransfer(T, first_index=1, token_ids=(TOKEN,))
    assert held_and_leased(worker) == (0, 3)
    assert worker.run() == []
    assert worker.on(TransferClosed(T)) == []
    assert held_and_leased(worker) == (0, 0)
    assert worker.on(TransferClosed(T)) == worker.on(Abort("r", 1)) == []


def test_finished_chunks_are_sent_while_the_rest_computes() -> None:
    worker = source(list(range(10)), max_num_batched_tokens=6)
    assert [kinds(worker.step()) for _ in range(2)] == [
        ["OpenTransfer", "SendBlocks"],
        ["TokenOutput", "SendBlocks", "CommitTransfer"],
    ]
    sends = [effect for effect in worker.effects if isinstance(effect, SendBlocks)]
    assert [(send.first_block, len(send.block_ids)) for send in sends] == [(0, 1), (1, 2)]


def test_prefix_hits_go_out_with_the_first_blocks() -> None:
    worker = FakeWorker(max_num_batched_tokens=4)
    worker.submit(generate("before", PROMPT, max_tokens=1))
    worker.run()
    worker.submit(generate("r", [*range(9), 0, 0, 0, 0, 0], to=T))
    effects = worker.step()
    [send] = [effect for effect in effects if isinstance(effect, SendBlocks)]
    assert (send.first_block, len(send.block_ids)) == (0, 3)  # two hits, and the block just computed


def test_the_first_index_counts_committed_output() -> None:
    worker = FakeWorker()
    before = expected_output(PROMPT, 2)
    worker.submit(generate("r", [*PROMPT, *before], num_committed=2, max_tokens=5, to=T))
    worker.step()
    assert worker.effects[-1] == CommitTransfer(T, first_index=3, token_ids=(expected_output(PROMPT, 3)[2],))
    assert worker.last_output("r").index == 2


def test_a_first_token_that_ends_the_request_aborts_the_transfer() -> None:
    worker = FakeWorker(max_num_batched_tokens=8)
    worker.submit(generate("r", PROMPT, stop=(TOKEN,), to=T))
    worker.step()
    output, abort = worker.step()
    assert isinstance(output, TokenOutput) and output.finish_reason is FinishReason.STOP
    assert output.token_ids == (TOKEN,)
    assert output.account is not None and output.account.mode is ServingMode.LOCAL
    assert abort == AbortTransfer(T, "finished")
    assert held_and_leased(worker) == (0, 2)  # what was sent may still be read
    worker.on(TransferClosed(T))
    assert held_and_leased(worker) == (0, 0)


def test_abort_at_the_source_leaves_sent_blocks_leased_until_closed() -> None:
    worker = source(max_num_batched_tokens=8)
    worker.step()
    assert worker.on(Abort("r", 1)) == [AbortTransfer(T, "aborted")]
    assert held_and_leased(worker) == (0, 2)
    assert worker.run() == worker.on(TransferClosed(T)) == []
    assert held_and_leased(worker) == (0, 0)


def test_abort_after_the_commit() -> None:
    worker = source()
    worker.step()
    assert worker.on(Abort("r", 1)) == [AbortTransfer(T, "aborted")]
    assert held_and_leased(worker) == (0, 3)
    worker.on(TransferClosed(T))
    assert held_and_leased(worker) == (0, 0)


def test_abort_of_a_queued_request_opens_nothing() -> None:
    worker = source()
    assert worker.on(Abort("r", 1)) == worker.run() == []


@pytest.mark.parametrize("during_step", [False, True])
def test_a_transfer_closed_before_the_commit_ends_the_request_here(during_step: bool) -> None:
    worker = source(max_num_batched_tokens=4)
    worker.step()
    if during_step:
        worker.begin_step()
    assert worker.on(TransferClosed(T)) == []
    if during_step:
        assert held_and_leased(worker) == (2, 0)
        assert worker.end_step() == []
    assert worker.run() == []
    assert held_and_leased(worker) == (0, 0)


def test_preemption_in_mid_prefill_does_not_open_again_and_goes_on_sending() -> None:
    worker = FakeWorker(num_blocks=12, max_num_batched_tokens=5)
    worker.submit(generate("urgent", [7, 7, 7], max_tokens=30, priority=1))
    worker.step()
    worker.submit(generate("r", list(range(30)), to=T))
    for _ in range(3):
        worker.step()
    num_blocks = worker.config.num_blocks_for(worker.core._manager.num_available_blocks * 4)
    worker.submit(generate("remote", range(500, 500 + 4 * num_blocks - 8), source=T2))
    [granted] = worker.on(TransferOffered(T2, "remote", 1, num_blocks - 2))
    assert isinstance(granted, GrantTransfer)  # it leaves one block for each of the two that run
    while not worker.outputs[-1].preempted_request_ids:
        worker.step()
    assert worker.outputs[-1].preempted_request_ids == ("r",)
    worker.on(Abort("remote", 1))
    worker.on(TransferLost(T2, "aborted"))
    worker.run()
    assert kinds(worker.effects).count("OpenTransfer") == 1
    sends = [effect for effect in worker.effects if isinstance(effect, SendBlocks)]
    assert [block for send in sends for block in range(send.first_block, send.first_block + len(send.block_ids))] == [
        *range(8)
    ]
    account = worker.last_output("r").account
    assert account is not None and account.num_preemptions == 1
    worker.on(TransferClosed(T))
    assert held_and_leased(worker) == (0, 0)


def test_refused_then_retargeted_in_mid_prefill() -> None:
    worker = source(max_num_batched_tokens=4)
    worker.step()
    assert worker.on(TransferRefused(T, "full")) == [HandoffRefused("r", 1, "full")]
    assert worker.on(TransferRefused(T, "full")) == []
    assert kinds(worker.step()) == []  # it goes on prefilling and sends nothing
    assert held_and_leased(worker) == (2, 0)
    opened, sent = worker.on(Retarget("r", 1, Handoff(T2, PEER)))
    assert isinstance(opened, OpenTransfer) and opened.handoff.transfer_id == T2
    assert isinstance(sent, SendBlocks) and (sent.first_block, len(sent.block_ids)) == (0, 2)
    assert kinds(worker.step()) == ["TokenOutput", "SendBlocks", "CommitTransfer"]
    assert held_and_leased(worker) == (0, 3)


def test_refused_before_the_token_and_retargeted_after_it() -> None:
    worker = source(max_num_batched_tokens=8)
    worker.step()
    worker.on(TransferRefused(T, "full"))
    assert kinds(worker.step()) == ["TokenOutput"]
    assert worker.run() == []  # waits for the router's word
    assert held_and_leased(worker) == (3, 0)
    effects = worker.on(Retarget("r", 1, Handoff(T2, PEER)))
    assert kinds(effects) == ["OpenTransfer", "SendBlocks", "SendBlocks", "CommitTransfer"]
    assert effects[-1] == CommitTransfer(T2, 1, (TOKEN,))
    assert worker.on(Retarget("r", 1, Handoff(T2, PEER))) == []
    assert held_and_leased(worker) == (0, 3)


def test_refused_after_the_commit_and_retargeted() -> None:
    worker = source()
    worker.step()
    assert kinds(worker.on(TransferRefused(T, "full"))) == ["HandoffRefused"]
    assert held_and_leased(worker) == (3, 0)
    effects = worker.on(Retarget("r", 1, Handoff(T2, PEER)))
    assert kinds(effects) == ["OpenTransfer", "SendBlocks", "SendBlocks", "CommitTransfer"]
    worker.on(TransferClosed(T2))
    assert held_and_leased(worker) == (0, 0)


@pytest.mark.parametrize("refused_at", ["mid-prefill", "after the commit"])
@pytest.mark.parametrize("retargeted_at", ["at once", "when there is nothing else to do", "during a step"])
def test_refused_and_told_to_decode_here(refused_at: str, retargeted_at: str) -> None:
    worker = source(max_num_batched_tokens=8)
    worker.step()
    if refused_at == "after the commit":
        worker.step()
    worker.on(TransferRefused(T, "no room: 3 of 2"))
    if retargeted_at == "when there is nothing else to do":
        worker.run()
    if retargeted_at == "during a step":
        worker.submit(generate("other", [9]))
        worker.begin_step()
    assert worker.on(Retarget("r", 1, None)) == []
    if retargeted_at == "during a step":
        worker.end_step()
    worker.run()
    assert worker.tokens_of("r") == expected_output(PROMPT, 4)
    account = worker.last_output("r").account
    assert account is not None
    assert (account.mode, account.mode_reason) == (ServingMode.LOCAL, "no room: 3 of 2")
    assert worker.on(Retarget("r", 1, None)) == []
    assert held_and_leased(worker) == (0, 0)


def test_retargeted_with_the_transfer_open_keeps_the_old_lease_until_it_is_closed() -> None:
    worker = source()
    worker.step()
    effects = worker.on(Retarget("r", 1, Handoff(T2, PEER)))
    assert effects[0] == AbortTransfer(T, "retargeted")
    assert kinds(effects[1:]) == ["OpenTransfer", "SendBlocks", "SendBlocks", "CommitTransfer"]
    worker.on(TransferClosed(T2))
    assert held_and_leased(worker) == (0, 3)
    worker.on(TransferClosed(T))
    assert held_and_leased(worker) == (0, 0)


def test_retargeted_while_queued_opens_only_the_new_transfer() -> None:
    worker = source()
    assert worker.on(Retarget("r", 1, Handoff(T2, PEER))) == []
    opened = worker.begin_step()
    assert [effect.handoff.transfer_id for effect in opened if isinstance(effect, OpenTransfer)] == [T2]


def test_a_refused_transfer_is_not_opened_again_after_a_preemption() -> None:
    worker = source(max_num_batched_tokens=4)
    worker.step()
    worker.on(TransferRefused(T, "full"))
    request = worker.core._requests["r"]
    scheduler = worker.core._scheduler
    scheduler.running.remove(request)
    scheduler._manager.free(request)
    request.num_computed_tokens = 0
    scheduler.add(request)
    assert kinds(worker.run()) == ["TokenOutput"]


# --- the destination of a handoff -------------------------------------------------------------------------------------


def destination(prompt: list[int] = PROMPT, **changes: int | bool) -> FakeWorker:
    worker = FakeWorker(**changes)  # type: ignore[arg-type]
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


def test_abort_all_ends_everything_without_a_word_to_the_router() -> None:
    worker = FakeWorker(num_blocks=16)
    worker.submit(generate("source", PROMPT, to=T2))
    worker.submit(generate("r", PROMPT, source=T))
    worker.submit(generate("local", [1, 2, 3]))
    grant(worker)
    worker.begin_step()
    effects = worker.core.abort_all(worker.now, "lease ran out")
    assert effects == [AbortTransfer(T2, "lease ran out"), AbortTransfer(T, "lease ran out")]
    assert worker.end_step() == worker.run() == []
    worker.on(TransferClosed(T2))
    worker.on(TransferLost(T, "aborted"))
    assert held_and_leased(worker) == (0, 0)
