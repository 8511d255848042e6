"""One worker that decodes what it prefills."""

from __future__ import annotations

import pytest

from engine.events import (
    AbortTransfer,
    TransferClosed,
    TransferLost,
    TransferOffered,
)
from engine.scheduler_output import SchedulerOutput
from protos.types import Abort, FinishReason, ServingMode, TokenOutput
from tests.engine.fake_worker import (
    PROMPT,
    T2,
    FakeWorker,
    T,
    expected_output,
    generate,
    held_and_leased,
)


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


def test_abort_all_ends_everything_without_a_word_to_the_router() -> None:
    worker = FakeWorker(num_blocks=16)
    worker.submit(generate("source", PROMPT, to=T2))
    worker.submit(generate("r", PROMPT, source=T))
    worker.submit(generate("local", [1, 2, 3]))
    worker.on(TransferOffered(T, "r", 1, 3))
    worker.begin_step()
    effects = worker.core.abort_all(worker.now, "lease ran out")
    assert effects == [AbortTransfer(T2, "lease ran out"), AbortTransfer(T, "lease ran out")]
    assert worker.end_step() == worker.run() == []
    worker.on(TransferClosed(T2))
    worker.on(TransferLost(T, "aborted"))
    assert held_and_leased(worker) == (0, 0)
