"""The source of a handoff: a WorkerCore that prefills for another."""

from __future__ import annotations

import pytest

from engine.events import (
    AbortTransfer,
    CommitTransfer,
    GrantTransfer,
    OpenTransfer,
    SendBlocks,
    TransferClosed,
    TransferLost,
    TransferOffered,
    TransferRefused,
)
from engine.scheduler_output import StepResult
from protos.types import Abort, FinishReason, Handoff, HandoffRefused, Retarget, ServingMode, TokenOutput
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
    kinds,
)


def source(prompt: list[int] = PROMPT, **changes: int | bool) -> FakeWorker:
    worker = FakeWorker(**changes)
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
    num_blocks = worker.core.ledger().free - 2
    worker.submit(generate("remote", range(500, 500 + 4 * num_blocks), source=T2))
    [granted] = worker.on(TransferOffered(T2, "remote", 1, num_blocks))
    assert isinstance(granted, GrantTransfer)  # it leaves one block for each of the two that run
    for _ in range(4):
        worker.step()
    assert held_and_leased(worker)[0] == 0  # full: both were preempted, what had been sent stays leased
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
    worker.run()  # `urgent` has waited for what was leased
    assert worker.tokens_of("urgent") == expected_output([7, 7, 7], 30)
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
    assert worker.on(Retarget("r", 1, Handoff(T, PEER))) == []  # late: a transfer id is used once
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


def test_the_source_takes_one_token_where_a_step_yields_several() -> None:
    worker = source()
    worker.begin_step()
    assert worker.output is not None
    effects = worker.core.update_from_output(worker.output, StepResult({"r": (5, 6, 7)}), worker.now)
    assert [effect.token_ids for effect in effects if isinstance(effect, TokenOutput)] == [(5,)]
    assert effects[-1] == CommitTransfer(T, 1, (5,))


def test_retargeted_again_after_the_commit_the_blocks_are_taken_back_first() -> None:
    worker = source(num_blocks=4)
    worker.step()
    worker.on(Retarget("r", 1, Handoff(T2, PEER)))
    worker.on(TransferClosed(T))
    worker.submit(generate("other", range(50, 60), max_tokens=2))
    assert worker.run() == []  # three blocks are still leased
    worker.on(TransferClosed(T2))
    worker.run()
    assert worker.tokens_of("other") == expected_output(range(50, 60), 2)
