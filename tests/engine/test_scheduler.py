"""The scheduler alone: requests in, steps out. Whole lives, with handoffs, are in test_worker_core.py."""

from __future__ import annotations

from engine.kv_cache_manager import KVCacheManager
from engine.request import Request, RequestStatus
from engine.scheduler import Progress, Scheduler
from engine.scheduler_output import SchedulerOutput, StepResult
from protos.types import FinishReason
from tests.engine.fake_worker import KEY, config, generate, next_token


class Bench:
    """A scheduler and the least that makes it go."""

    def __init__(self, num_blocks: int = 8, **changes: int | bool) -> None:
        self.manager = KVCacheManager(config(**changes), num_blocks, KEY, "model")
        self.scheduler = Scheduler(config(**changes), self.manager)
        self.num_added = 0

    def add(self, num_tokens: int, first_token: int = 0, max_tokens: int = 4, priority: int = 0) -> Request:
        """Prompts with another first_token share no prefix."""
        name = f"r{self.num_added}"
        tokens = [first_token, *range(1, num_tokens)]
        request = Request(
            generate(name, tokens, max_tokens=max_tokens, priority=priority), self.num_added, float(self.num_added)
        )
        self.num_added += 1
        assert self.scheduler.refusal(request) == ""
        self.scheduler.add(request)
        return request

    def begin(self) -> SchedulerOutput:
        output = self.scheduler.schedule(0.0)
        assert output is not None
        return output

    def end(self, output: SchedulerOutput, num_sampled: int = 1) -> list[Progress]:
        sampled = {}
        for each in output.scheduled:
            if each.samples:
                tokens = list(each.token_ids)
                for _ in range(num_sampled):
                    tokens.append(next_token(tokens))
                sampled[each.request_id] = tuple(tokens[-num_sampled:])
        progress = self.scheduler.update_from_output(output, StepResult(sampled), 0.0)
        assert self.manager.ledger().balanced
        return progress

    def step(self) -> dict[str, int]:
        """Tokens scheduled by request id."""
        output = self.begin()
        self.end(output)
        return {each.request_id: each.num_scheduled_tokens for each in output.scheduled}


def test_nothing_to_compute() -> None:
    assert Bench().scheduler.schedule(0.0) is None


def test_a_long_prompt_is_computed_in_chunks_and_sampled_once_at_its_end() -> None:
    bench = Bench(num_blocks=16)
    request = bench.add(40)
    assert [bench.step() for _ in range(3)] == [{"r0": 16}, {"r0": 16}, {"r0": 8}]
    assert request.num_output_tokens == 1
    assert bench.step() == {"r0": 1}


def test_waiting_requests_share_what_the_budget_leaves() -> None:
    bench = Bench()
    bench.add(10, first_token=1)
    bench.add(10, first_token=2)
    assert bench.step() == {"r0": 10, "r1": 6}
    assert bench.step() == {"r0": 1, "r1": 4}


def test_a_long_prefill_leaves_a_token_to_each_running_request_behind_it() -> None:
    bench = Bench(num_blocks=32)
    bench.add(60, max_tokens=2)
    bench.step()
    arrived = Request(generate("arrived", [9, 1]), 1, 0.0)  # its KV came from another worker
    assert bench.manager.allocate_slots(arrived, 2)
    arrived.num_computed_tokens = 2
    arrived.token_ids.append(7)
    bench.scheduler.resume(arrived)
    assert bench.step() == {"r0": 15, "arrived": 1}


def test_at_most_max_num_seqs_run() -> None:
    bench = Bench(num_blocks=16, max_num_seqs=2)
    for first_token in range(4):
        bench.add(2, first_token=first_token)
    assert list(bench.step()) == ["r0", "r1"]


def test_waiting_goes_by_priority_then_arrival() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add(2, first_token=1, max_tokens=1)
    bench.add(2, first_token=2, max_tokens=1, priority=5)
    bench.add(2, first_token=3, max_tokens=1, priority=5)
    assert [list(bench.step()) for _ in range(3)] == [["r1"], ["r2"], ["r0"]]


def test_prefix_hits_are_not_computed_again_and_never_the_whole_prompt() -> None:
    bench = Bench()
    first = bench.add(8, max_tokens=1)
    bench.step()
    second = bench.add(8, max_tokens=1)
    third = bench.add(11, max_tokens=1)
    assert bench.step() == {"r1": 4, "r2": 3}
    assert (first.num_cached_tokens, second.num_cached_tokens, third.num_cached_tokens) == (0, 4, 8)


def test_finishes_by_stop_token_by_max_tokens_and_by_max_model_len() -> None:
    bench = Bench(num_blocks=16)
    by_length = bench.add(3, max_tokens=2)
    by_context = bench.add(62, first_token=7, max_tokens=9)
    stop = Request(generate("stop", [5], stop=(next_token([5]),)), 9, 0.0)
    bench.scheduler.add(stop)
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.end(bench.begin())
    assert (by_length.finish_reason, by_length.num_output_tokens) == (FinishReason.LENGTH, 2)
    assert (by_context.finish_reason, by_context.num_tokens) == (FinishReason.LENGTH, 64)
    assert (stop.finish_reason, list(stop.token_ids)) == (FinishReason.STOP, [5, next_token([5])])
    assert bench.manager.ledger().held == 0


def test_max_tokens_counts_the_output_that_came_with_the_request() -> None:
    bench = Bench()
    request = Request(generate("r", [1, 2, 3, 4], num_committed=2, max_tokens=3), 0, 0.0)
    bench.scheduler.add(request)
    bench.step()
    assert (request.finish_reason, request.num_output_tokens) == (FinishReason.LENGTH, 3)


def test_what_can_never_finish_is_refused_with_the_numbers() -> None:
    scheduler = Bench(num_blocks=4).scheduler

    def refusal(num_tokens: int, max_tokens: int, num_committed: int = 0) -> str:
        tokens = range(num_tokens)
        return scheduler.refusal(
            Request(generate("r", tokens, max_tokens=max_tokens, num_committed=num_committed), 0, 0.0)
        )

    assert refusal(64, 1) == "64 tokens leave no room for output within max_model_len 64"
    assert refusal(10, 8) == "18 tokens of prompt and output need 5 KV blocks, this worker has 4"
    assert refusal(10, 7) == ""
    assert refusal(10, 2, num_committed=2) == "2 output tokens given, max_tokens is 2"


def test_the_latest_of_the_lowest_priority_is_preempted_and_starts_again() -> None:
    bench = Bench(num_blocks=7, enable_prefix_caching=False)
    bench.add(3, first_token=1, max_tokens=9, priority=1)
    victim = bench.add(5, first_token=2, max_tokens=9)
    bench.add(3, first_token=3, max_tokens=9, priority=1)
    for _ in range(6):
        bench.step()
    assert bench.manager.num_available_blocks == 0
    output = bench.begin()  # r0 and r2 need a third block each
    assert output.preempted_request_ids == ("r1",)
    assert [each.request_id for each in output.scheduled] == ["r0", "r2"]
    assert (victim.status, victim.num_computed_tokens, victim.num_preemptions) == (RequestStatus.PREEMPTED, 0, 1)
    bench.end(output)


def resume(bench: Bench, name: str, num_tokens: int, num_computed: int) -> Request:
    request = Request(generate(name, range(num_tokens), max_tokens=1), bench.num_added, 0.0)
    bench.num_added += 1
    assert bench.manager.allocate_slots(request, num_computed)
    request.num_computed_tokens = num_computed
    request.first_scheduled_at = 0.0
    bench.scheduler.resume(request)
    return request


def test_what_a_preemption_frees_is_for_the_running_ones() -> None:
    bench = Bench(num_blocks=5, enable_prefix_caching=False)
    resume(bench, "head", num_tokens=20, num_computed=4)
    resume(bench, "middle", num_tokens=4, num_computed=3)
    resume(bench, "last", num_tokens=12, num_computed=11)
    bench.add(2, first_token=7, max_tokens=1, priority=1)  # there would be room for it
    output = bench.begin()
    assert output.preempted_request_ids == ("last",)
    assert [each.request_id for each in output.scheduled] == ["middle"]  # head still lacks a block
    bench.end(output)
    assert "head" in bench.step()


def test_at_most_one_is_preempted_in_a_step() -> None:
    bench = Bench(num_blocks=4, enable_prefix_caching=False)
    resume(bench, "head", num_tokens=5, num_computed=4)
    resume(bench, "inner", num_tokens=4, num_computed=3)
    resume(bench, "middle", num_tokens=5, num_computed=4)
    last = resume(bench, "last", num_tokens=4, num_computed=3)
    bench.manager.lease(b"t", bench.manager.block_table(last))  # so that its preemption frees nothing
    output = bench.begin()
    assert output.preempted_request_ids == ("last",)
    assert [each.request_id for each in output.scheduled] == ["inner"]
    bench.end(output)


def test_a_request_that_is_itself_the_latest_preempts_itself() -> None:
    bench = Bench(num_blocks=4, enable_prefix_caching=False)
    bench.add(7, first_token=1, max_tokens=5)
    victim = bench.add(3, first_token=2, max_tokens=5)
    bench.step()
    bench.step()
    output = bench.begin()  # r0 takes the last block, r1 needs one
    assert output.preempted_request_ids == ("r1",)
    assert [each.request_id for each in output.scheduled] == ["r0"]
    assert victim.status is RequestStatus.PREEMPTED
    bench.end(output)


def test_a_preempted_request_goes_to_the_front_of_its_priority() -> None:
    bench = Bench(num_blocks=4, enable_prefix_caching=False, max_num_seqs=2)
    bench.add(7, first_token=1, max_tokens=5)
    bench.add(3, first_token=2, max_tokens=5)
    late = bench.add(2, first_token=3)
    urgent = bench.add(2, first_token=4, priority=1)
    late.arrival = -1  # even before one that arrived earlier
    for request in (late, urgent):
        bench.scheduler.remove(request)
    bench.step()
    bench.step()
    bench.scheduler.add(late)
    bench.end(bench.begin())
    bench.scheduler.add(urgent)
    assert [request.request_id for request in bench.scheduler.waiting] == ["r3", "r1", "r2"]


def test_waiting_requests_never_preempt_running_ones() -> None:
    bench = Bench(num_blocks=2)
    bench.add(4, first_token=1, max_tokens=4)
    bench.step()
    bench.add(4, first_token=2, max_tokens=4, priority=9)
    for _ in range(2):
        output = bench.begin()
        assert output.preempted_request_ids == ()
        assert [each.request_id for each in output.scheduled] == ["r0"]
        bench.end(output)


def test_a_request_that_ends_during_a_step_keeps_its_blocks_until_the_update() -> None:
    bench = Bench()
    request = bench.add(8)
    output = bench.begin()
    bench.scheduler.remove(request)
    assert bench.manager.ledger().held == 2
    assert bench.end(output) == []
    assert bench.manager.ledger().held == 0


def test_several_tokens_in_one_step_are_taken_up_to_the_end() -> None:
    bench = Bench()
    request = bench.add(3, max_tokens=10)
    [progress] = bench.end(bench.begin(), num_sampled=6)
    assert (len(progress.token_ids), request.num_tokens, request.num_computed_tokens) == (6, 9, 8)
    [progress] = bench.end(bench.begin(), num_sampled=6)
    assert (len(progress.token_ids), request.num_output_tokens) == (4, 10)
    assert request.finish_reason is FinishReason.LENGTH


def test_several_tokens_that_end_a_request_leave_its_full_blocks_in_the_cache() -> None:
    """As they would, had they come one by one."""
    for num_sampled in (1, 4):
        bench = Bench()
        request = bench.add(5, max_tokens=4)
        while request.finish_reason is None:
            bench.end(bench.begin(), num_sampled)
        assert bench.manager.ledger().cached == 2  # eight tokens have been computed


def test_several_tokens_without_room_for_them_are_computed_again() -> None:
    bench = Bench(num_blocks=3, enable_prefix_caching=False)
    first = bench.add(3, first_token=1, max_tokens=9)
    second = bench.add(3, first_token=2, max_tokens=9)
    bench.end(bench.begin(), num_sampled=5)
    assert (first.num_tokens - first.num_computed_tokens, second.num_tokens - second.num_computed_tokens) == (1, 5)
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.end(bench.begin(), num_sampled=5)
    assert (first.num_output_tokens, second.num_output_tokens) == (9, 9)


def test_requests_that_bring_their_blocks_wait_in_front_and_do_not_block_each_other() -> None:
    bench = Bench(num_blocks=2, max_num_seqs=1, enable_prefix_caching=False)
    requests = [Request(generate(f"x{i}", [i, 1, 2, 3], max_tokens=3), i, 0.0) for i in range(2)]
    for request in requests:  # as if both prompts had come from another worker, and fill the pool
        assert bench.manager.allocate_slots(request, 4)
        request.num_computed_tokens = 4
        request.token_ids.append(9)
        request.first_scheduled_at = 0.0
        bench.scheduler.resume(request)
    urgent = bench.add(2, first_token=7, priority=9)
    assert bench.scheduler.waiting == [requests[1], urgent]
    for _ in range(30):
        if not (bench.scheduler.running or bench.scheduler.waiting):
            break
        bench.end(bench.begin())
    assert {request.finish_reason for request in [*requests, urgent]} == {FinishReason.LENGTH}
