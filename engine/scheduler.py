"""What the next step computes: which requests run, how many tokens of each, who waits, who is preempted.

There is no prefill phase and no decode phase: num_computed_tokens of every request chases its num_tokens. Knows nothing
of outputs or other workers."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from engine.config import SchedulerConfig
from engine.kv_cache_manager import KVCacheManager
from engine.request import Request, RequestStatus
from engine.scheduler_output import ScheduledRequest, SchedulerOutput, StepResult
from protos.types import Logprobs


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did for one request: token_ids is what it sampled, empty in the middle of a prefill."""

    request: Request
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()  # one for each token, where asked for


class _Step:
    """One step while it is being filled."""

    def __init__(self, num_budget_tokens: int) -> None:
        self.num_budget_tokens = num_budget_tokens
        self.requests: list[Request] = []
        self.scheduled: list[ScheduledRequest] = []
        self.preempted: list[Request] = []
        self.changed_queues = False

    def add(self, request: Request, num_new_tokens: int, block_table: list[int]) -> None:
        self.num_budget_tokens -= num_new_tokens
        self.requests.append(request)
        self.scheduled.append(
            ScheduledRequest(
                request_id=request.request_id,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                num_computed_tokens=request.num_computed_tokens,
                num_scheduled_tokens=num_new_tokens,
                block_table=block_table,
                sampling_params=request.sampling_params,
                samples=request.num_computed_tokens + num_new_tokens == request.num_tokens,
            )
        )


class Scheduler:
    """Invariant: a request is in `waiting`, in `running` or in neither; in `running` every one has blocks, in `waiting`
    only those that came back with theirs (resume). Blocks that a step under way reads or writes are not freed."""

    def __init__(self, config: SchedulerConfig, manager: KVCacheManager) -> None:
        self._config = config
        self._manager = manager
        self.waiting: list[Request] = []  # by waiting_order
        self.running: list[Request] = []
        self.num_steps = 0
        self._in_step: list[Request] = []

    # --- joining and leaving --------------------------------------------------------------------------------------

    def refusal(self, request: Request) -> str:
        """Why the request could never finish here, with the numbers; empty where it could."""
        num_tokens, max_model_len = request.num_tokens, self._config.max_model_len
        if num_tokens >= max_model_len:
            return f"{num_tokens} tokens leave no room for output within max_model_len {max_model_len}"
        max_tokens = request.sampling_params.max_tokens
        if request.num_output_tokens >= max_tokens:
            return f"{request.num_output_tokens} output tokens given, max_tokens is {max_tokens}"
        max_num_tokens = min(request.num_prompt_tokens + max_tokens, max_model_len)
        num_blocks = self._config.num_blocks_for(max_num_tokens - 1)  # the last token needs no KV
        if num_blocks > self._manager.num_blocks:
            return (
                f"{max_num_tokens} tokens of prompt and output need {num_blocks} KV blocks, "
                f"this worker has {self._manager.num_blocks}"
            )
        return ""

    def add(self, request: Request) -> None:
        self._queue(request, RequestStatus.WAITING)

    def resume(self, request: Request) -> None:
        """Run a request that comes with its blocks. Where all are busy it waits with them, before all others."""
        assert self._manager.block_table(request) and 0 < request.num_computed_tokens < request.num_tokens
        if len(self.running) < self._config.max_num_seqs:
            self._run(request)
        else:
            self._queue(request, RequestStatus.WAITING)

    def park(self, request: Request) -> None:
        """Take a request off the queues, with its blocks; resume brings it back."""
        self._leave_queues(request)
        request.status = RequestStatus.HANDING_OFF

    @property
    def next_to_start(self) -> Request | None:
        """The first that waits, where it has never run and could as soon as there is room for it."""
        head = self.waiting[0] if self.waiting and len(self.running) < self._config.max_num_seqs else None
        return head if head is not None and head.status is RequestStatus.WAITING and self._is_fresh(head) else None

    def withdraw(self, request: Request) -> None:
        """Take a request off the queue that waits there without blocks; add brings it back."""
        assert self._is_fresh(request)
        self._leave_queues(request)

    def remove(self, request: Request) -> None:
        """The request has ended. Its blocks are freed, after the step where one is under way with them."""
        self._leave_queues(request)
        request.status = RequestStatus.FINISHED
        if request not in self._in_step:
            self._manager.free(request)

    @property
    def num_spoken_for_blocks(self) -> int:
        """What newcomers from other workers must leave: a block for each running request, and all that the first
        waiting one needs, which would starve otherwise."""
        head = self.waiting[0] if self.waiting else None
        num_head_blocks = 0
        if head is not None and not self._manager.block_table(head):
            num_head_blocks = self._config.num_blocks_for(head.num_tokens)
        return len(self.running) + num_head_blocks

    # --- the step -------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> SchedulerOutput | None:
        """The next step, or None where there is nothing to compute. update_from_output must follow."""
        assert not self._in_step
        step = self._fill_step(now)
        while not step.scheduled and step.changed_queues:  # a preemption or a resumed request may have made way
            step = self._fill_step(now)
        if not step.scheduled:
            return None
        self.num_steps += 1
        self._in_step = step.requests
        return SchedulerOutput(
            step=self.num_steps,
            scheduled=tuple(step.scheduled),
            num_batched_tokens=self._config.max_num_batched_tokens - step.num_budget_tokens,
            preempted_request_ids=tuple(request.request_id for request in step.preempted),
        )

    def update_from_output(self, output: SchedulerOutput, result: StepResult, now: float) -> list[Progress]:
        """Take over what the step computed, for the requests that are still here. The finished ones are out already."""
        requests, self._in_step = self._in_step, []
        progress = []
        for request, scheduled in zip(requests, output.scheduled, strict=True):
            assert request.request_id == scheduled.request_id
            if request.status is RequestStatus.FINISHED:
                self._manager.free(request)  # ended while the step was under way
                continue
            request.num_computed_tokens += scheduled.num_scheduled_tokens
            token_ids: tuple[int, ...] = ()
            if scheduled.samples:
                token_ids = self._take_sampled(request, result.sampled[request.request_id], now)
            self._manager.cache_full_blocks(request)
            if request.finish_reason is not None:
                self.remove(request)
            logprobs = result.logprobs.get(request.request_id, ())[: len(token_ids)]
            progress.append(Progress(request, token_ids, logprobs))
        return progress

    def _fill_step(self, now: float) -> _Step:
        step = _Step(self._config.max_num_batched_tokens)
        self._schedule_running(step)
        if not step.preempted:  # what a preemption made free is for the running ones
            self._schedule_waiting(step, now)
        return step

    def _schedule_running(self, step: _Step) -> None:
        """Most urgent first, so the one to preempt, the last, never has been scheduled in the same step."""
        self.running.sort(key=_urgency)
        index = 0
        while index < len(self.running) and step.num_budget_tokens > 0:
            request = self.running[index]
            num_behind = len(self.running) - index - 1  # a long prefill leaves a token to each of them
            num_new_tokens = min(
                request.num_tokens - request.num_computed_tokens, max(1, step.num_budget_tokens - num_behind)
            )
            if self._make_room(request, num_new_tokens, step):
                step.add(request, num_new_tokens, self._manager.block_table(request))
            index += 1

    def _make_room(self, request: Request, num_new_tokens: int, step: _Step) -> bool:
        """Slots for a running request, at the cost of at most one preemption a step."""
        if self._manager.allocate_slots(request, num_new_tokens):
            return True
        if step.preempted:
            return False
        victim = self.running[-1]
        self._preempt(victim, step)
        return victim is not request and self._manager.allocate_slots(request, num_new_tokens)

    def _preempt(self, request: Request, step: _Step) -> None:
        """It starts again when there is room; what it computed may still be found in the prefix cache then."""
        self.running.remove(request)
        self._manager.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._queue(request, RequestStatus.PREEMPTED)
        step.preempted.append(request)
        step.changed_queues = True

    def _schedule_waiting(self, step: _Step, now: float) -> None:
        while self.waiting and len(self.running) < self._config.max_num_seqs and step.num_budget_tokens > 0:
            request = self.waiting[0]
            if self._manager.block_table(request):
                self._readmit(request, step)
            elif not self._admit(request, step, now):
                break

    def _readmit(self, request: Request, step: _Step) -> None:
        """It holds blocks, so it must be where it can make progress or be preempted: in `running`."""
        self.waiting.pop(0)
        self._run(request)
        step.changed_queues = True
        if self._manager.allocate_slots(request, 1):
            step.add(request, 1, self._manager.block_table(request))

    def _admit(self, request: Request, step: _Step, now: float) -> bool:
        """Start a request from its cached prefix, where there is room for all of it now and for a block more of each
        running one: to start more than fits is to preempt it soon."""
        hits = self._manager.get_computed_blocks(request)
        if not self._manager.can_hold(request, hits, num_spare_blocks=len(self.running)):
            return False
        num_hit_tokens = len(hits) * self._config.block_size
        num_new_tokens = min(request.num_tokens - num_hit_tokens, step.num_budget_tokens)
        allocated = self._manager.allocate_slots(request, num_new_tokens, hits)
        assert allocated
        request.num_computed_tokens = num_hit_tokens
        request.num_hashed_blocks = len(hits)
        if request.first_scheduled_at is None:
            request.start(len(hits), self._config.block_size, now)
        self.waiting.pop(0)
        self._run(request)
        step.add(request, num_new_tokens, self._manager.block_table(request))
        return True

    def _take_sampled(self, request: Request, sampled: tuple[int, ...], now: float) -> tuple[int, ...]:
        """Several tokens at once mean that all but the last have been computed as well. Where there is no room for
        their KV they count as not computed, and are computed again."""
        assert sampled, request.request_id
        if request.handoff_to is not None:
            sampled = sampled[:1]  # the next one is the destination's
        taken = request.append(sampled, self._config.max_model_len, now)
        num_extra = len(taken) - 1
        if num_extra and self._manager.allocate_slots(request, num_extra):
            request.num_computed_tokens += num_extra
        return taken

    # --- queues ---------------------------------------------------------------------------------------------------

    def _run(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        self.running.append(request)

    def _queue(self, request: Request, status: RequestStatus) -> None:
        """Behind those that take memory while they wait (own blocks, or blocks that an open transfer leases); then by
        priority, in each priority those that were preempted first; then by arrival."""
        request.status = status
        takes_memory = bool(self._manager.block_table(request)) or request.open_transfer_id is not None
        is_preempted = status is RequestStatus.PREEMPTED
        request.waiting_order = (not takes_memory, -request.priority, not is_preempted, request.arrival)
        insort(self.waiting, request, key=lambda each: each.waiting_order)

    def _is_fresh(self, request: Request) -> bool:
        return not self._manager.block_table(request) and request.open_transfer_id is None

    def _leave_queues(self, request: Request) -> None:
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)


def _urgency(request: Request) -> tuple[int, int]:
    """Higher priority first, then earlier arrival."""
    return (-request.priority, request.arrival)
